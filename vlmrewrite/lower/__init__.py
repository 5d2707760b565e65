"""Lowering: each operator of a rewritten graph becomes its reference or a kernel, and the graph is made ready to run.

In: a rewritten program. Out: an :class:`Executable`.
"""

from vlmrewrite import moved
from vlmrewrite.lower.decode_step import DecodeStep
from vlmrewrite.lower.lowering import Executable, by_kind, lower
from vlmrewrite.lower.pieces import behind
from vlmrewrite.lower.placing import placed
from vlmrewrite.lower.recompute import recomputed

__all__ = ["DecodeStep", "Executable", "behind", "by_kind", "lower", "placed", "recomputed"]

moved.register(__name__)
