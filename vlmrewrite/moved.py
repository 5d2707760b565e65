"""Where modules of version 0.1 have gone: their names can be imported for one release more, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED = {
    "blocks": ("plan.blocks", "hf.decoder"),
    "budget": ("plan.budget", "plan.pipeline"),
    "cache": ("kvcache",),
    "call": ("plan.call",),
    "choice": ("ops.choice",),
    "dialect": ("ops.attention", "ops.selection", "ops.scoring", "ops.library"),
    "install": ("api", "runtime.install", "oracle.verify"),
    "layerwise": ("report.layer_profile",),
    "observer": ("report.observe",),
    "operators": ("ops.library",),
    "passes.dape_losses": ("passes.dape.losses",),
    "passes.dape_ops": ("passes.dape.ops", "passes.dape.blocks"),
    "program": ("compiler", "rewrite.program", "plan.pipeline"),
    "regions": ("passes.dape.regions", "passes.dape.matching"),
    "testing.aot": ("testing.triton.aot",),
    "testing.edited": ("oracle.edits", "oracle.masks"),
    "testing.interleaving": ("testing.triton.interleaving",),
    "testing.interpreter": ("testing.triton.interpreter",),
    "testing.oracle": ("oracle.hooks", "oracle.masks", "testing.agreement"),
    "tokens": ("plan.tokens", "plan"),
    "traced": ("runtime.session",),
    "words": ("plan.vocabulary",),
}
"""Old module -> the modules that hold its names now, both without ``vlmrewrite.``."""


class _Moved(ModuleType):
    def __getattr__(self, name: str) -> Any:
        old = self.__name__.removeprefix("vlmrewrite.")
        for new in () if name.startswith("__") else MOVED[old]:
            module = importlib.import_module(f"vlmrewrite.{new}")
            if hasattr(module, name):
                warnings.warn(
                    f"vlmrewrite.{old}.{name} is now vlmrewrite.{new}.{name}; the old name goes with the next release",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def register(under: str = "") -> None:
    """Let the old names of the core be imported, or those under a package that brings its own."""
    for old in (name for name in MOVED if name.startswith("passes.") == (under == "passes")):
        parent, _, name = f"vlmrewrite.{old}".rpartition(".")
        module = sys.modules.setdefault(f"{parent}.{name}", _Moved(f"{parent}.{name}", "See `vlmrewrite.moved`."))
        if parent in sys.modules:  # as importing it would; vlmrewrite.testing may not be there yet
            setattr(sys.modules[parent], name, module)
