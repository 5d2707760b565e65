"""The one rewrite from a plan to a graph, for every technique, and its verification.

In: a captured graph, its anatomy and a plan. Out: a :class:`Program` whose graph does what the plan says.
"""

from vlmrewrite.rewrite.dispatch import dispatch
from vlmrewrite.rewrite.legalize import legalize, with_blocks
from vlmrewrite.rewrite.program import Program, RunResult
from vlmrewrite.rewrite.verifier import check_sets

__all__ = ["Program", "RunResult", "check_sets", "dispatch", "legalize", "with_blocks"]
