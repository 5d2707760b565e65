"""Facts about a captured graph, read only: layers, residual stream, what is token-wise, and costs.

In: a captured graph. Out: an :class:`Anatomy` and numbers.
"""

from vlmrewrite.analysis.anatomy import Anatomy, Layer, LayerCost, Merge, analyse, costs
from vlmrewrite.analysis.graph import axis, needed, reachable, same, value, where
from vlmrewrite.analysis.merging import merges_as_new
from vlmrewrite.analysis.operators import hidden_write, writes
from vlmrewrite.analysis.tokenwise import not_token_wise

__all__ = [
    "Anatomy",
    "Layer",
    "LayerCost",
    "Merge",
    "analyse",
    "axis",
    "costs",
    "hidden_write",
    "merges_as_new",
    "needed",
    "not_token_wise",
    "reachable",
    "same",
    "value",
    "where",
    "writes",
]
