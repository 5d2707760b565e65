"""Recipes that a budget buys on a user's data: searched, judged beside controls on held-out samples, and written."""

from vlmrewrite.tune.auto import automatic
from vlmrewrite.tune.results import Point, Tuned
from vlmrewrite.tune.run import check_wish, tune

__all__ = ["Point", "Tuned", "automatic", "check_wish", "tune"]
