"""DAPE, dynamic non-uniform alignment and progressive detail enhancement: see :mod:`.technique`."""

from vlmrewrite.passes.dape.regions import representatives
from vlmrewrite.passes.dape.technique import DAPE

__all__ = ["DAPE", "representatives"]
