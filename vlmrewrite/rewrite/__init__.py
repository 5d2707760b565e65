"""The one rewrite from a plan to a graph, for every technique, and its verification.

In: a captured graph, its anatomy and a plan. Out: a :class:`Program` whose graph does what the plan says.
"""

from vlmrewrite.rewrite.legalize import with_blocks
from vlmrewrite.rewrite.program import Program, program_of, rewrite

__all__ = ["Program", "program_of", "rewrite", "with_blocks"]
