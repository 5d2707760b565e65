"""Recipes that a budget buys on a user's data: searched, judged beside controls on held-out samples, and written."""

from vlmrewrite.tune.auto import automatic
from vlmrewrite.tune.prompts import Prompts
from vlmrewrite.tune.results import Point, Tuned
from vlmrewrite.tune.run import check_wish, tune
from vlmrewrite.tune.space import Space, solve

__all__ = ["Point", "Prompts", "Space", "Tuned", "automatic", "check_wish", "solve", "tune"]
