"""What takes changes of a model back, and can be copied with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import nn


class Undo:
    """Calls that take changes back, the last one first.

    They are functions of modules, with their arguments, and not closures: a copy of this that is made with a copy of
    the model (by one memo) takes the changes of the copy back. As a context, it is closed if an error leaves the block.

    Attributes:
        frozen: parameters that asked for a gradient; they do again, unless others were asked meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.frozen = model, list[nn.Parameter]()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def callback(self, function: Callable[..., Any], /, *args: Any) -> None:
        """A call to be made: functions that a module defines, or partials of them."""
        self._calls.append((function, args))

    def put(self, module: nn.Module, name: str, value: object) -> None:
        """Let a module have an attribute of its own, until what was there before is put back."""
        own = vars(module)
        if name in own:
            self.callback(_set, module, name, own[name])
        else:
            self.callback(drop, module, name)
        own[name] = value

    def close(self, *, thaw: bool = True) -> None:
        """Make the calls, and let the frozen parameters ask for a gradient."""
        while self._calls:
            function, args = self._calls.pop()
            function(*args)
        if thaw and not any(p.requires_grad for p in self._model.parameters()):
            for p in self.frozen:
                p.requires_grad_(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.close()


def drop(module: nn.Module, name: str) -> None:
    """Take an attribute of its own from a module, if it has it."""
    vars(module).pop(name, None)


def _set(module: nn.Module, name: str, value: object) -> None:
    vars(module)[name] = value
