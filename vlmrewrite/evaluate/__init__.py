"""Recipes on a user's samples: accuracy with intervals beside the unmodified model, costs, and a page about it."""

from vlmrewrite.evaluate.asking import answer_tokens, encode, refuse_chats, with_image_tokens
from vlmrewrite.evaluate.data import fingerprint, read_data
from vlmrewrite.evaluate.journal import write_whole
from vlmrewrite.evaluate.metrics import METRICS, Metric
from vlmrewrite.evaluate.page import STYLE
from vlmrewrite.evaluate.plot import front, pareto
from vlmrewrite.evaluate.results import AGREEMENT, Evaluation, Row, Scored
from vlmrewrite.evaluate.run import FEW, evaluate, identity_of, metric_of
from vlmrewrite.evaluate.sample import Sample
from vlmrewrite.evaluate.statistics import Paired, paired
from vlmrewrite.evaluate.subject import UNMODIFIED, end_tokens, plain_costs

__all__ = [
    "AGREEMENT",
    "FEW",
    "METRICS",
    "STYLE",
    "UNMODIFIED",
    "Evaluation",
    "Metric",
    "Paired",
    "Row",
    "Sample",
    "Scored",
    "answer_tokens",
    "encode",
    "end_tokens",
    "evaluate",
    "fingerprint",
    "front",
    "identity_of",
    "metric_of",
    "paired",
    "pareto",
    "plain_costs",
    "read_data",
    "refuse_chats",
    "with_image_tokens",
    "write_whole",
]
