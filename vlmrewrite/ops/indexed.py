"""Attention over the keys that an index selects, as two operators: the model's own module, in two parts.

One part makes what the cache holds of each token: keys, values, and what the index holds of it. The other takes the
queries, and all that is held. Between them lie the cache and the plan, so that a layer may hold any set of tokens.

What selects keys may go by their places (blocks of neighbours), so each row is taken alone, without its padding and
without tokens that are not held, one key behind the other. ``position_ids`` that the module asks for are these places.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.ops.attention import everywhere, visible
from vlmrewrite.ops.gradients import differentiate
from vlmrewrite.ops.index_mixer import IndexedMixer, dropout_of, dtype_of, packed, parts_of
from vlmrewrite.ops.library import define
from vlmrewrite.ops.mixers import MIXERS, numbered


def index_keys(q: Tensor, given: str, widths: list[int], weights: list[Tensor], mixer: int) -> tuple[Tensor, Tensor]:
    """What a layer with an index over its keys holds of each token.

    Args:
        q: all that the module is given of each token, [B, 1, n, W].
        given, widths: which arguments that is, in words for :func:`indexed` alone.
        weights: the module's parameters, in order.
        mixer: which module.

    Returns:
        keys and what the index holds, [B, 1, n, K], and values [B, Hk, n, Dv].
    """
    module: Any = MIXERS[mixer]
    return module.keys(parts_of(q, given, widths), weights)  # type: ignore[no-any-return]


def indexed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float | None,
    plain: bool,
    softcap: float | None,
    dropout: float,
    given: str,
    widths: list[int],
    weights: list[Tensor],
    mixer: int,
) -> Tensor:
    """What a layer that attends to the keys that its index selects makes of some tokens.

    Args:
        q, given, widths, weights, mixer: as for :func:`index_keys`.
        k, v: what is held, as that returned it.
        mask, q_pos, k_pos, plain: as for :func:`vlmrewrite.ops.attention.attention`.
        scale, softcap, dropout: of no meaning here, where the module's own code says it.

    Returns:
        [B, n, 1, H]; 0 for tokens that see no key.
    """
    module: Any = MIXERS[mixer]
    last, every = everywhere(q, k)
    q_pos, k_pos = last if q_pos is None else q_pos, every if k_pos is None else k_pos
    found = visible(None if plain else mask, q_pos, k_pos, False)
    assert found is not None
    seen = (found if found.dtype == torch.bool else found > torch.finfo(found.dtype).min / 2)[:, 0]
    seen = seen.expand(q.shape[0], -1, -1)
    held = seen.any(1)
    places = (held[:, None] & (k_pos[:, None] <= q_pos[:, :, None])).sum(-1) - 1
    out = q.new_zeros(q.shape[0], q.shape[2], widths[0], dtype=dtype_of(given))
    for rows, at, keys in _groups(seen.any(2), held):
        if at is None or keys is None:
            parts, here = parts_of(q, given, widths), (k, v, seen, places)
            out = module.attend(parts, *here, weights)
        else:
            which = rows[:, None]
            parts = parts_of(q[which, :, at].transpose(1, 2), given, widths)
            some = k[which, :, keys].transpose(1, 2), v[which, :, keys].transpose(1, 2)
            here = *some, seen[which[:, :, None], at[:, :, None], keys[:, None]], places[which, at]
            out[which, at] = (part := module.attend(parts, *here, weights))
        module.try_apart(parts, *here, out if at is None else part, weights)
    return out.unsqueeze(2)


def _groups(queries: Tensor, keys: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Rows with as many queries and keys as one another, with the places of both; None where that is all of all rows.

    Args:
        queries: which there are, bool [B, n]. keys: likewise, [B, m].
    """
    every = torch.arange(len(queries), device=queries.device)
    if bool(queries.all()) and bool(keys.all()):
        yield every, None, None
        return
    counts = torch.stack([queries.sum(1), keys.sum(1)], 1)
    for n, m in counts.unique(dim=0).tolist():
        if n:
            rows = every[(counts == counts.new_tensor([n, m])).all(1)]
            yield rows, queries[rows].nonzero()[:, 1].view(-1, n), keys[rows].nonzero()[:, 1].view(-1, m)


def flops_of_indexed(node_args: Sequence[Any], weights: Sequence[Tensor]) -> tuple[int, int, int]:
    """FLOPs of a layer with an index over its keys: see :meth:`IndexedMixer.flops`.

    Args:
        node_args: of a captured :func:`indexed` node.
        weights: tensors of the shapes and dtypes of the module's parameters.
    """
    given, widths, _, mixer = node_args[-4:]
    module: Any = MIXERS[mixer]
    return module.flops(given, widths, weights)  # type: ignore[no-any-return]


def _indexed_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], 1, rest[-3][0], dtype=dtype_of(rest[-4]))


_GIVEN = "str given, int[] widths, Tensor[] weights, int mixer"

_KEYS = f"Tensor q, {_GIVEN}"

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? q_pos, Tensor? k_pos, float? scale, bool plain,"
    f" float? softcap, float dropout, {_GIVEN}"
)

define(f"index_keys({_KEYS}) -> (Tensor, Tensor)", index_keys, index_keys)
define(f"indexed({_ARGUMENTS}) -> Tensor", indexed, _indexed_fake)
differentiate("index_keys", _KEYS, index_keys)
differentiate("indexed", _ARGUMENTS, indexed)

INDEX_KEYS, INDEXED = torch.ops.vlm.index_keys.default, torch.ops.vlm.indexed.default


def indexed_forward(module: nn.Module, index: str) -> Callable[..., Any]:
    """A forward for a module that attends to the keys that its index selects, by way of the two operators.

    Args:
        module: it.
        index: the method of its cache layer that takes what the index holds.
    """
    mixer = numbered(module, lambda number: IndexedMixer(module, number, index))
    own = type(module).forward
    names, number, cached = tuple(inspect.signature(own).parameters)[1:], mixer.number, mixer.cache
    name_of, dropped = type(module).__name__, dropout_of(module)

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and dropped:
            raise NotImplementedError(
                f"{name_of} has a dropout of {dropped} in training mode; expected 0 where an index selects keys: set it"
                " to 0, or call model.eval()"
            )
        given = dict(zip(names, args, strict=False)) | kwargs
        cache, mask = given.pop(cached, None), given.pop("attention_mask", None)
        positions, hidden = given.pop("position_ids", None), given["hidden_states"]
        if positions is not None and positions.dim() > 2:
            raise NotImplementedError(f"{name_of} has an index over its keys, and positions of more than one axis")
        parts = {"hidden_states": hidden}
        for name, x in given.items():
            several = x if isinstance(x, tuple) else (x,)
            if name == "hidden_states" or x is None or isinstance(x, bool) or (isinstance(x, Tensor) and not x.dim()):
                continue
            for each in several:
                if not isinstance(each, Tensor) or each.dim() != 3 or each.dtype != several[0].dtype:
                    raise NotImplementedError(f"{name_of} is given {name}, which is not known to follow its tokens")
                if each.shape[1] != hidden.shape[1]:
                    raise NotImplementedError(f"{name_of} is given {name} of other tokens than its own")
            parts[name] = x
        q, said, widths = packed(parts)
        more = said, widths, list(self.parameters()), number
        tracing = torch.compiler.is_dynamo_compiling()
        k, v = INDEX_KEYS(q, *more)
        q_pos = k_pos = None
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
            if not tracing:
                layer, n = cache.layers[self.layer_idx], q.shape[2]
                k_pos = layer.positions
                q_pos = torch.arange(layer.seen - n, layer.seen, device=q.device).repeat(q.shape[0], 1)
        plain = mask is None and q_pos is None
        return INDEXED(q, k, v, mask, q_pos, k_pos, None, plain, None, 0.0, *more).squeeze(2), None

    return forward
