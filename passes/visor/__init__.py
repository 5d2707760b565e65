"""VISOR, vision on request: see :mod:`.technique`."""

from vlmrewrite.passes.visor.technique import VISOR

__all__ = ["VISOR"]
