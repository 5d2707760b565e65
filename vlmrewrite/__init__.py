"""vlmrewrite: a compiler for the vision tokens of vision-language models.

    import vlmrewrite as vr

    vr.apply(model, "sts-128")
    model.generate(**inputs)
    print(vr.report(model))
    vr.restore(model)

Everything else is in the README and in docs/.
"""

import importlib
import importlib.util
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vlmrewrite import moved

if TYPE_CHECKING:
    from vlmrewrite.public import *  # noqa: F403
    from vlmrewrite.public import __all__ as __all__

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())


_FUNCTIONS = ("evaluate", "export", "report", "rewrite", "tune")
"""Those that have the names of folders, which importing a folder must not hide."""


class _Lazy(ModuleType):
    """This module: what is in :mod:`vlmrewrite.public`, and folders, are loaded when asked for: imports are quick."""

    def __getattr__(self, name: str) -> Any:
        if name != "__all__" and name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        path = f"vlmrewrite.{name}"
        if name not in _FUNCTIONS and importlib.util.find_spec(path) is not None:
            return importlib.import_module(path)  # alone, or a folder would meet itself half imported
        public = importlib.import_module("vlmrewrite.public")
        if name == "__all__" or name in getattr(public, "__all__", ()):  # none while it is being imported
            vars(self)[name] = getattr(public, name)
            return vars(self)[name]
        if name in _FUNCTIONS:
            return importlib.import_module(path)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FUNCTIONS and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


sys.modules[__name__].__class__ = _Lazy
moved.register(__name__)
