"""Attention over the keys that an index selects, as two operators: the model's own module, in two parts.

One part makes what the cache holds of each token: keys, values, and what the index holds of it. The other takes the
queries, and all that is held. Between them lie the cache and the plan, so that a layer may hold any set of tokens.

What selects keys may go by their places (blocks of neighbours), so each row's keys are laid one behind the other,
without its padding and without tokens that are not held. ``position_ids`` that the module asks for are these places.
Rows are run together: behind the keys of a row that has fewer lie some that it does not see, as later tokens do in a
prompt. A step of one token runs the module once, which makes what is held of it and takes that at its place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    q_pos = (last if q_pos is None else q_pos).expand(q.shape[0], -1)
    k_pos = (every if k_pos is None else k_pos).expand(q.shape[0], -1)
    out = q.new_zeros(q.shape[0], q.shape[2], widths[0], dtype=dtype_of(given))
    for rows in looked_at(None if plain else mask, q_pos, k_pos):
        here = rows.held(k), rows.held(v), rows.seen, rows.places
        if rows.at is None:
            parts = parts_of(q, given, widths)
            part = out = module.attend(parts, *here, weights)
        else:
            parts = parts_of(q[rows.which, :, rows.at].transpose(1, 2), given, widths)
            out[rows.which, rows.at] = part = module.attend(parts, *here, weights)
        module.try_apart(parts, *here, part, weights)
    return out.unsqueeze(2)


class Rows(NamedTuple):
    """Rows with as many tokens that see a key as one another.

    Attributes:
        which: the rows, int64 [R, 1].
        at: those tokens, int64 [R, n]; None for all tokens of all rows.
        keys: what they see, and behind it, where a row has fewer keys than another, some that none of them sees, int64
            [R, m]; None for all keys as they lie.
        seen: who sees which of these, bool [R, n, m].
        places: of the tokens among their row's keys, int64 [R, n].
    """

    which: Tensor
    at: Tensor | None
    keys: Tensor | None
    seen: Tensor
    places: Tensor

    def held(self, x: Tensor) -> Tensor:
        """Of keys or values [B, Hk, M, D] these rows', one behind the other: [R, Hk, m, D]."""
        return x if self.keys is None else x[self.which, :, self.keys].transpose(1, 2)


def looked_at(mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, plain: bool = False) -> list[Rows]:
    """How the rows lie for an index: the keys of each one behind the other.

    Args:
        mask, q_pos, k_pos: as for :func:`vlmrewrite.ops.attention.visible`, with all rows.
        plain: of no meaning: what is seen is told one by one in any case.
    """
    found = visible(mask, q_pos, k_pos, False)
    assert found is not None
    seen = (found if found.dtype == torch.bool else found > torch.finfo(found.dtype).min / 2)[:, 0]
    asking, held = seen.any(2), seen.any(1)
    places = (held[:, None] & (k_pos[:, None] <= q_pos[:, :, None])).sum(-1) - 1
    every, all_ask = torch.arange(len(seen), device=seen.device)[:, None], bool(asking.all())
    if all_ask and bool(held.all()):
        return [Rows(every, None, None, seen, places)]
    counts, groups = asking.sum(1), list[Rows]()
    for n in counts.unique().tolist():
        if n:
            which = every[counts == n]
            own = held[which[:, 0]]
            keys = own.byte().argsort(dim=1, descending=True, stable=True)[:, : int(own.sum(1).max())]
            at = asking[which[:, 0]].nonzero()[:, 1].view(-1, n)
            some = seen[which[:, :, None], at[:, :, None], keys[:, None]]
            groups.append(Rows(which, None if all_ask else at, keys, some, places[which, at]))
    return groups


def looked_at_alone(mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, plain: bool = False) -> Rows | None:
    """:func:`looked_at` for the last token of each row; None unless all of them see themselves."""
    found = looked_at(mask, q_pos, k_pos)
    if not found or found[0].at is not None:
        return None
    keys, last = found[0].keys, k_pos.shape[1] - 1
    return found[0] if keys is None or bool((keys.gather(1, found[0].places) == last).all()) else None


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


def _room(cache: Any, layer_idx: int, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """A layer's keys and values, the last of them empty for a step's token; None where those have to be made first."""
    layer = cache.layer(layer_idx)
    if hidden.shape[1] != 1 or layer.keys is None or cache.stores or torch.is_grad_enabled():
        return None
    room = [x.new_zeros(len(hidden), x.shape[1], 1, x.shape[3]) for x in (layer.keys, layer.values)]
    return cache.update(*room, layer_idx)  # type: ignore[no-any-return]


def _fill(room: tuple[Tensor, Tensor], made: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put what was made of a step's token into its place."""
    for x, new in zip(room, made, strict=True):
        x[:, :, -1:] = new
    return room


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
        tracing, n = torch.compiler.is_dynamo_compiling(), hidden.shape[1]
        room = None if tracing or cache is None else _room(cache, self.layer_idx, hidden)
        if room is not None:
            rows: Rows | None = cache.seen_by(cache.layers[self.layer_idx], hidden[:, None], mask, looked_at_alone)
            if rows is not None:
                here = rows.held(room[0]), rows.held(room[1]), rows.seen, rows.places
                out, *made = mixer.step(parts, *here)
                _fill(room, made)
                return out, None
        q, said, widths = packed(parts)
        more = said, widths, list(self.parameters()), number
        k, v = INDEX_KEYS(q, *more)
        q_pos = k_pos = None
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx) if room is None else _fill(room, (k, v))
            if not tracing:
                layer = cache.layers[self.layer_idx]
                k_pos = layer.positions
                q_pos = torch.arange(layer.seen - n, layer.seen, device=q.device).repeat(q.shape[0], 1)
        plain = mask is None and q_pos is None
        return INDEXED(q, k, v, mask, q_pos, k_pos, None, plain, None, 0.0, *more).squeeze(2), None

    return forward
