"""Recipes on a user's samples: accuracy with intervals beside the unmodified model, costs, and a page about it."""

from vlmrewrite.evaluate.asking import with_image_tokens
from vlmrewrite.evaluate.data import read_data
from vlmrewrite.evaluate.metrics import METRICS, Metric
from vlmrewrite.evaluate.results import Evaluation, Row, Scored
from vlmrewrite.evaluate.run import evaluate
from vlmrewrite.evaluate.sample import Sample

__all__ = ["METRICS", "Evaluation", "Metric", "Row", "Sample", "Scored", "evaluate", "read_data", "with_image_tokens"]
