"""Recipes on a user's samples: accuracy with intervals beside the unmodified model, costs, and a page about it."""

from vlmrewrite.evaluate.asking import answer_tokens, encode, refuse_chats, with_image_tokens
from vlmrewrite.evaluate.data import fingerprint, read_data
from vlmrewrite.evaluate.journal import write_whole
from vlmrewrite.evaluate.metrics import METRICS, Metric
from vlmrewrite.evaluate.results import Evaluation, Row, Scored
from vlmrewrite.evaluate.run import evaluate
from vlmrewrite.evaluate.sample import Sample
from vlmrewrite.evaluate.subject import end_tokens

__all__ = [
    "METRICS",
    "Evaluation",
    "Metric",
    "Row",
    "Sample",
    "Scored",
    "answer_tokens",
    "encode",
    "end_tokens",
    "evaluate",
    "fingerprint",
    "read_data",
    "refuse_chats",
    "with_image_tokens",
    "write_whole",
]
