"""Facts about a captured graph, read only: layers, residual stream, what is token-wise, and costs.

In: a captured graph. Out: an :class:`Anatomy` and numbers.
"""

from vlmrewrite.analysis.anatomy import Anatomy, Layer, analyse, append_of, cache_of
from vlmrewrite.analysis.costs import LayerCost, costs
from vlmrewrite.analysis.experiment import try_operators
from vlmrewrite.analysis.functional import functional
from vlmrewrite.analysis.graph import axis, closure, is_number, needed, reachable, same, sizes, symbols, value, where
from vlmrewrite.analysis.merge import Merge
from vlmrewrite.analysis.operators import hidden_write, writes, written
from vlmrewrite.analysis.regions import CASTING, as_cast, cast, regions
from vlmrewrite.analysis.rows import ALONG, Rows
from vlmrewrite.analysis.tokenwise import VERDICT, mixes
from vlmrewrite.analysis.wanted import of_last_column

__all__ = [
    "ALONG",
    "CASTING",
    "VERDICT",
    "Anatomy",
    "Layer",
    "LayerCost",
    "Merge",
    "Rows",
    "analyse",
    "append_of",
    "as_cast",
    "axis",
    "cache_of",
    "cast",
    "closure",
    "costs",
    "functional",
    "hidden_write",
    "is_number",
    "mixes",
    "needed",
    "of_last_column",
    "reachable",
    "regions",
    "same",
    "sizes",
    "symbols",
    "try_operators",
    "value",
    "where",
    "writes",
    "written",
]
