"""Recipes that a budget buys on a user's data: searched, judged beside controls on held-out samples, and written."""

from vlmrewrite.tune.auto import automatic
from vlmrewrite.tune.checks import check_wish
from vlmrewrite.tune.pictures import smaller_pictures
from vlmrewrite.tune.prompts import Prompts
from vlmrewrite.tune.results import Point, Tuned
from vlmrewrite.tune.run import tune
from vlmrewrite.tune.space import Shape, Space, solve
from vlmrewrite.tune.wish import drop_of

__all__ = [
    "Point",
    "Prompts",
    "Shape",
    "Space",
    "Tuned",
    "automatic",
    "check_wish",
    "drop_of",
    "smaller_pictures",
    "solve",
    "tune",
]
