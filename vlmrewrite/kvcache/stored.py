"""One layer whose keys and values are kept by a layer of a transformers cache: quantised, or away from their device."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from vlmrewrite.compat import tree_leaves
from vlmrewrite.kvcache.layer import PositionLayer, Shared

_KNOWN = ("positions", "seen", "holes", "is_initialized")
"""What a layer knows of its tokens, wherever their keys and values are."""


class StoredLayer(PositionLayer):
    """Positions are here; keys and values are in ``store``, which is fed those that this layer keeps, a call at a time.

    ``keys`` and ``values`` are None. What a captured graph takes and returns is a plain layer, that :meth:`opened`
    makes of this one and :meth:`take` stores.

    Args:
        empty: a transformers layer that holds nothing; ``store`` starts as a copy of it.
    """

    def __init__(self, empty: CacheLayerMixin) -> None:
        super().__init__()
        self.empty, self.store = empty, cast(Any, copy.copy(empty))
        self.nothing: tuple[Tensor, ...] | None = None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether it can forget tokens."""
        return type(self.empty) is DynamicLayer

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.empty)  # type: ignore[misc]

    def prefetch(self) -> None:
        """Bring keys and values to where they are used."""
        self.store.prefetch()

    def offload(self) -> None:
        """Take them to the CPU."""
        self.store.offload()

    def opened(self) -> PositionLayer:
        """A plain layer that holds what an attention sees of this one, which stays as it is."""
        plain = PositionLayer()
        for name in _KNOWN:
            setattr(plain, name, getattr(self, name))
        if self.nothing is not None:
            look, rows = copy.copy(self.store), len(self.positions)  # a store changes its attributes, never its tensors
            look.prefetch()
            plain.keys, plain.values = look.update(*(x.expand(rows, -1, -1, -1) for x in self.nothing))
        return plain

    def take(self, plain: PositionLayer) -> None:
        """Become what a plain layer that :meth:`opened` made has grown to; its keys and values are let go."""
        n = 0 if self.positions is None else self.positions.shape[1]
        for name in _KNOWN:
            setattr(self, name, getattr(plain, name))
        if plain.keys is not None and plain.keys.shape[2] > n:
            self._append(*(x.narrow(2, n, x.shape[2] - n) for x in (plain.keys, plain.values)))
        plain.keys = plain.values = None

    def nbytes(self) -> int:
        """Bytes of what is stored, scales and the like included."""
        return _nbytes(vars(self.store))

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.nothing = self.nothing or tuple(x.new_empty(1, x.shape[1], 0, x.shape[3]) for x in (k, v))
        shown: tuple[Tensor, Tensor] = self.store.update(k, v)
        return shown

    def _take_rows(self, rows: Tensor) -> None:
        self.store.reorder_cache(rows)  # any rows, as often as they are named

    def crop(self, tokens_to_remove: int, shared: Shared | None = None) -> None:
        """Forget the last ``-tokens_to_remove`` logical tokens.

        Raises:
            NotImplementedError: there are tokens to forget, and they were quantised together with others.
        """
        if tokens_to_remove and not self.is_croppable:
            raise NotImplementedError(
                f"crop({tokens_to_remove}) of a quantised cache, whose tokens share their scales, was called: start"
                " with an empty cache, and generate without an assistant"
            )
        super().crop(tokens_to_remove, shared)

    def _keep(self, n: int, before: int) -> None:
        self.store.crop(n - before)


def _nbytes(held: Any) -> int:
    """Bytes of the tensors in nested containers, and of those that others are made of."""
    total = 0
    for x in tree_leaves(held):
        if hasattr(x, "__tensor_flatten__"):
            total += _nbytes([getattr(x, name) for name in x.__tensor_flatten__()[0]])
        elif isinstance(x, torch.Tensor):
            total += x.nbytes
    return total
