"""Recipes on a user's samples: accuracy with intervals beside the unmodified model, costs, and a page about it."""

from vlmrewrite.evaluate.asking import groups_of, refuse_chats, said, with_image_tokens
from vlmrewrite.evaluate.data import each_row, number_of_rows, read_data
from vlmrewrite.evaluate.journal import Journal, write_whole
from vlmrewrite.evaluate.metrics import METRICS, Metric
from vlmrewrite.evaluate.results import Evaluation, Row, Scored
from vlmrewrite.evaluate.rows import sample_of
from vlmrewrite.evaluate.run import evaluate
from vlmrewrite.evaluate.sample import Sample
from vlmrewrite.evaluate.subject import Answered, Subject, identity

__all__ = [
    "METRICS",
    "Answered",
    "Evaluation",
    "Journal",
    "Metric",
    "Row",
    "Sample",
    "Scored",
    "Subject",
    "each_row",
    "evaluate",
    "groups_of",
    "identity",
    "number_of_rows",
    "read_data",
    "refuse_chats",
    "said",
    "sample_of",
    "with_image_tokens",
    "write_whole",
]
