"""Lowering: each operator of a rewritten graph becomes its reference or a kernel, and the graph is made ready to run.

In: a rewritten program. Out: an :class:`Executable`.
"""

from vlmrewrite.lower.decode_step import DecodeStep, positioned
from vlmrewrite.lower.executable import Executable
from vlmrewrite.lower.lowering import by_kind, compiled, lower

__all__ = ["DecodeStep", "Executable", "by_kind", "compiled", "lower", "positioned"]
