"""Recipes on a user's samples: accuracy with intervals beside the unmodified model, costs, and a page about it."""

from vlmrewrite.evaluate.asking import answer_tokens, encode, groups_of, refuse_chats, said, with_image_tokens
from vlmrewrite.evaluate.data import each_row, fingerprint, number_of_rows, read_data
from vlmrewrite.evaluate.given import check_counts, identity_of, metric_of
from vlmrewrite.evaluate.journal import Journal, alone, write_whole
from vlmrewrite.evaluate.metrics import METRICS, Metric
from vlmrewrite.evaluate.page import STYLE
from vlmrewrite.evaluate.plot import cost_of, front, pareto
from vlmrewrite.evaluate.results import AGREEMENT, Evaluation, Row, Scored, rows_of
from vlmrewrite.evaluate.rows import id_of, sample_of
from vlmrewrite.evaluate.run import FEW, evaluate
from vlmrewrite.evaluate.sample import Sample
from vlmrewrite.evaluate.statistics import Paired, paired
from vlmrewrite.evaluate.subject import UNMODIFIED, Answered, Subject, end_tokens, numbers_of, plain_costs
from vlmrewrite.evaluate.together import Together

__all__ = [
    "AGREEMENT",
    "FEW",
    "METRICS",
    "STYLE",
    "UNMODIFIED",
    "Answered",
    "Evaluation",
    "Journal",
    "Metric",
    "Paired",
    "Row",
    "Sample",
    "Scored",
    "Subject",
    "Together",
    "alone",
    "answer_tokens",
    "check_counts",
    "cost_of",
    "each_row",
    "encode",
    "end_tokens",
    "evaluate",
    "fingerprint",
    "front",
    "groups_of",
    "id_of",
    "identity_of",
    "metric_of",
    "number_of_rows",
    "numbers_of",
    "paired",
    "pareto",
    "plain_costs",
    "read_data",
    "refuse_chats",
    "rows_of",
    "said",
    "sample_of",
    "with_image_tokens",
    "write_whole",
]
