"""vlmrewrite: a compiler for the vision tokens of vision-language models.

    import vlmrewrite as vr

    vr.apply(model, "sts-128")
    model.generate(**inputs)
    print(vr.report(model))
    vr.restore(model)

Everything else is in the README and in docs/.
"""

import importlib
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


class _Lazy(ModuleType):
    """This module: what is in :mod:`vlmrewrite.public`, and folders, are loaded when asked for: imports are quick."""

    def __getattr__(self, name: str) -> Any:
        if name != "__all__" and name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        public, path = importlib.import_module("vlmrewrite.public"), f"vlmrewrite.{name}"
        if name == "__all__" or name in getattr(public, "__all__", ()):  # none while it is being imported
            vars(self)[name] = getattr(public, name)
            return vars(self)[name]
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as e:
            if e.name != path:
                raise
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("evaluate", "export", "report", "rewrite", "tune") and isinstance(value, ModuleType):
            return  # functions that have the names of folders, which importing a folder must not hide
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


sys.modules[__name__].__class__ = _Lazy
moved.register(__name__)
