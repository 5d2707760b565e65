"""Parameters that are a model's, in modules that are nobody's but vlmrewrite's."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from vlmrewrite.compat.modules import changes_of


class Apart(nn.Module):
    """A module that shows the parameters and buffers of others as its own, by their full names, and not the modules.

    Optimizers, state dicts and ``to`` find the parameters. A library that exchanges the linear maps of a model, by
    their names or their class, finds none here. Children are attributes and items, as of an ``nn.ModuleDict``.

    Args:
        tree: whose parameters and buffers these are.
    """

    def __init__(self, tree: nn.ModuleDict) -> None:
        super().__init__()
        vars(self)["_tree"] = tree  # not by setattr, which would make it a child
        kept = tree.state_dict(keep_vars=True)
        for name, p in tree.named_parameters(remove_duplicate=False):
            self._parameters[name] = p
        for name, b in tree.named_buffers(remove_duplicate=False):
            self._buffers[name] = b
            if name not in kept:
                self._non_persistent_buffers_set.add(name)
        vars(self)["_tied"] = self._own()

    @property
    def tree(self) -> nn.ModuleDict:
        """The modules, which hold what is shown here, also where another tensor has been put in the place of one."""
        tree: nn.ModuleDict = vars(self)["_tree"]
        own, tied = self._own(), vars(self)["_tied"]
        for name in (n for n, x in own.items() if x is not tied[n]):
            path, _, last = name.rpartition(".")
            setattr(tree.get_submodule(path), last, own[name])
        vars(self)["_tied"] = own
        return tree

    def _own(self) -> dict[str, Tensor | None]:
        return {**self._parameters, **self._buffers}

    def remember(self) -> None:
        """Take what the tensors hold now for what a file holds."""
        vars(self)["_remembered"] = self._changes()

    @property
    def as_remembered(self) -> bool:
        """Whether no tensor was written to since :meth:`remember`."""
        return vars(self).get("_remembered") == self._changes()

    def _changes(self) -> list[tuple[int, int]]:
        return [(id(x), changes_of(x)) for x in self._own().values() if x is not None]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Put another parameter in the place of one of these, whose names have dots."""
        if name not in self._parameters:
            raise KeyError(f"expected one of {', '.join(self._parameters)}, got {name!r}")
        self._parameters[name] = param

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *lists: list[str]
    ) -> None:
        unexpected, own = list[str](), self._own()  # which a name with dots is, where there is no such child
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, *lists[1:])
        lists[0].extend(name for name in unexpected if name.removeprefix(prefix) not in own)

    def train(self, mode: bool = True) -> Self:
        """As of any module; the modules that are not shown follow."""
        vars(self)["_tree"].train(mode)
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("_tree", ()):
            return self.tree[name]
        return super().__getattr__(name)

    def __getitem__(self, name: str) -> nn.Module:
        return self.tree[name]

    def __contains__(self, name: object) -> bool:
        return name in vars(self)["_tree"]

    def extra_repr(self) -> str:
        """The modules."""
        return repr(vars(self)["_tree"])


def tree_in(held: Any) -> nn.ModuleDict:
    """The modules of an :class:`Apart`, or of whatever stands in its place and hands its attributes on.

    A library that trains a copy of it puts a module there that answers as the copy which is in use.

    Raises:
        ValueError: it hands on nothing.
    """
    found = getattr(held, "tree", None)
    if not isinstance(found, nn.ModuleDict):
        raise ValueError(
            f"a {type(held).__name__} stands where the blocks of the recipe were, and does not lead to them; expected"
            " the blocks, or a wrapper that hands their attributes on"
        )
    return found
