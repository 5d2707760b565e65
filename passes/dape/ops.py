"""DAPE's operators; see :mod:`vlmrewrite.passes.dape.technique` for what they are for.

The technique is known here from a summary alone: **every formula is this project's own**, and stands at the function
that computes it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from vlmrewrite.ops import define, like_member
from vlmrewrite.passes.dape.blocks import WIDTH, Matching
from vlmrewrite.passes.dape.matching import all_gains, match
from vlmrewrite.passes.dape.regions import (
    SCALES,
    coarsest,
    density,
    moments,
    owners,
    pool,
    refined,
    representatives,
)


@torch.no_grad()
def dape_cover(
    features: Tensor,
    stream: Tensor,
    prompt: Tensor,
    flat: Tensor,
    grid: Tensor,
    member: Tensor,
    lengths: Tensor,
    keep: Tensor,
    *weights: Tensor,
) -> Tensor:
    """The cover of each image: from 4 x 4 blocks on, the one with the largest gain is split until ``keep`` are there.

    Args:
        features: [F, H], any float dtype.
        stream: hidden states at the decoder's entry, [B, T, H].
        prompt: the prompt's text tokens, bool [B, T].
        flat: ``row * T + column`` of each vision token, int64 [F].
        grid: rows and columns of each image, int64 [I, 2], on the CPU.
        member, lengths, keep: see :class:`vlmrewrite.plan.Policy`; all tokens are members.
        weights: of :class:`Matching`, or none; see :func:`gains`.

    Returns:
        the regions' representatives, bool [F], exactly ``keep`` of each image.

    Raises:
        ValueError: ``keep`` is less than an image has blocks of 4 x 4, or a grid does not fit.
    """
    base = coarsest(lengths, grid, keep.tolist()).to(member.device)
    spare = [k - int(part.sum()) for k, part in zip(keep.tolist(), base.cpu().split(lengths.tolist()), strict=True)]
    return base | refined(base, lengths, grid, all_gains(features, stream, prompt, flat, lengths, grid, weights), spare)


def _located(index: Tensor, valid: Tensor, flat: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where the tokens of a set stand among the vision tokens, int64 [B, n], and which of these it holds, bool [F]."""
    rows = torch.arange(len(index), device=index.device)[:, None]
    at = torch.searchsorted(flat, rows * length + index).clamp(max=len(flat) - 1)
    counts = torch.zeros_like(flat).index_add(0, at.flatten(), valid.flatten().long())
    return at, counts > 0


def dape_pool(
    hidden: Tensor,
    index: Tensor,
    valid: Tensor,
    stream: Tensor,
    flat: Tensor,
    lengths: Tensor,
    grid: Tensor,
    prompt: Tensor | None = None,
    *weights: Tensor | None,
) -> Tensor:
    """Replace each token by the average of its region, of the hidden states as they stand in the stream.

    With weights, and only where gradients are recorded, each average is multiplied by ``1 + g - stop(g)``, which is 1:
    the discrete choice of the cover has no gradient, and this straight-through gate is how the matching learns.
    g_j is the largest ``rho_i softmax_j(z_ij)`` over the row's text tokens, the softmax over the row's tokens j.

    Args:
        hidden, index, valid: see :class:`vlmrewrite.plan.Edit`; the set is a cover, or what was added to one.
        stream: [B, T, H]. flat, lengths, grid, prompt, weights: as for :func:`dape_cover`.

    Returns:
        [B, n, H].
    """
    at, member = _located(index, valid, flat, stream.shape[1])
    owner, level = torch.ops.vlm.region_owner(member, lengths, grid).unbind(0)
    x = stream.flatten(0, 1)[flat]
    slots, places = index.numel(), torch.where(valid, at, len(flat)).flatten()
    slot = torch.full((len(flat) + 1,), slots, dtype=torch.int64, device=flat.device)
    slot = slot.scatter(0, places, torch.arange(slots, device=flat.device))
    new = pool(x, slot[owner], slots + 1)[0][:slots].view(*index.shape, -1)
    given = [w for w in weights if w is not None]
    if given and prompt is not None and torch.is_grad_enabled():
        visual = density(x.detach(), owner)[at].float() * valid
        visual = visual / visual.amax(1, keepdim=True).clamp(min=1e-12)
        rho, z = match(stream, new, level[at], visual, given)
        weight = rho[..., None] * z.masked_fill(~valid[:, None], -1e9).softmax(-1)
        gate = weight.masked_fill(~prompt[..., None], 0.0).amax(1)
        new = new * (1 + (gate - gate.detach()))[..., None]
    return torch.where(valid[..., None], new.to(hidden.dtype), hidden)


@torch.no_grad()
def dape_split(
    attention: Tensor, features: Tensor, grid: Tensor, member: Tensor, lengths: Tensor, keep: Tensor
) -> Tensor:
    """Split the regions with the largest (attention of the last prompt token x visual density) further.

    Parts have the attention of the region's token and the density of their own block.

    Args:
        attention: paid to the tokens of the cover, fp32 [F].
        features: [F, C]. grid, lengths: as for :func:`dape_cover`.
        member: the locations without a token, bool [F]: all others are the cover.
        keep: how many tokens to add to each image, int64 [I], on the CPU.

    Returns:
        the tokens added, bool [F].
    """
    blocks = representatives(lengths, grid).to(member.device)
    found, start = [torch.zeros(3, 0, device=member.device)], 0
    for n in lengths.tolist():
        x = features[start : start + n].to(torch.promote_types(features.dtype, torch.float32))
        of = moments(x, blocks[:, start : start + n] - start)
        found.append(torch.cat([of.error[:1], of.density[1:]]))
        start += n
    priority, paid = torch.cat(found, 1), attention[owners(~member, blocks)]
    return refined(~member, lengths, grid, priority * paid, keep.tolist())


@torch.no_grad()
def dape_focus(
    attention: Tensor, features: Tensor, owner: Tensor, member: Tensor, lengths: Tensor, share: float
) -> Tensor:
    """The ``share`` of each image's regions with the largest (attention x visual density), none without density.

    Args:
        attention: fp32 [F]. features: [F, C]. owner: of each location, int64 [F].
        member: the regions' tokens, bool [F].
        lengths: int64 [I], on the CPU.

    Returns:
        their tokens, bool [F].
    """
    value = torch.where(member, attention * density(features, owner), 0.0)
    chosen = torch.zeros_like(member)
    for part, inside, out in zip(*(x.split(lengths.tolist()) for x in (value, member, chosen)), strict=True):
        best = part.argsort(descending=True, stable=True)[: round(share * int(inside.sum()))]
        out[best] = part[best] > 0
    return chosen


def dape_inject(
    hidden: Tensor,
    index: Tensor,
    valid: Tensor,
    attention: Tensor,
    features: Tensor,
    prompt: Tensor,
    flat: Tensor,
    lengths: Tensor,
    grid: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    gate: Tensor,
    share: float,
) -> Tensor:
    """Let the tokens of the regions in focus take up the full-resolution features U of their region.

    ``h_j += tanh(gate) out softmax((query h_j) . (key U) / sqrt(64)) value U``; the other tokens stay as they are. The
    choice of the regions has no gradient, everything else has.

    Args:
        hidden, index, valid: of a cover, see :class:`vlmrewrite.plan.vocabulary.Edit`.
        attention, features, share: as for :func:`dape_focus`, which chooses the regions.
        prompt, flat, lengths, grid: as for :func:`dape_cover`. The rest: parameters of :class:`Detail`.

    Returns:
        [B, n, H].
    """
    at, member = _located(index, valid, flat, prompt.shape[1])
    owner = torch.ops.vlm.region_owner(member, lengths, grid)[0]
    chosen = torch.ops.vlm.dape_focus(attention, features, owner, member, lengths, share)
    places = torch.where(valid, at, len(flat)).flatten()
    asked, wide = hidden.flatten(0, 1) @ query.T, torch.promote_types(hidden.dtype, torch.float32)
    q = asked.new_zeros(len(flat) + 1, len(query)).index_copy(0, places, asked)[owner].to(wide)
    score = (q * (features @ key.T)).sum(1) / math.sqrt(len(query))
    top = torch.full_like(score, -torch.inf).scatter_reduce(0, owner, score.detach(), "amax")
    weight = (score - top[owner]).exp()
    weight = weight / torch.zeros_like(weight).index_add(0, owner, weight)[owner]
    seen = torch.zeros_like(q).index_add(0, owner, weight[:, None] * (features @ value.T).to(wide))[at]
    new = hidden + (torch.tanh(gate) * (seen.to(hidden.dtype) @ out.T)).to(hidden.dtype)
    return torch.where((valid & chosen[at])[..., None], new, hidden)


def _pooling_flops(locations: int, channels: int, scales: int) -> int:
    """Means and densities of regions, 1 and 3 FLOPs for each number."""
    return 4 * scales * locations * channels


def _cover_flops(*given: Tensor | None, **_: object) -> int:
    """Of what :func:`dape_cover` is given."""
    features, _stream, prompt, flat, grid, _member, lengths, _keep, *weights = cast(tuple[Tensor, ...], given)
    channels, learned = features.shape[1], any(w is not None for w in weights)
    total, start = _pooling_flops(features.shape[0], channels, len(SCALES)), 0
    for (rows, columns), n in zip(grid.tolist(), lengths.tolist(), strict=True):
        if n:
            text = int(prompt[int(flat[start]) // prompt.shape[1]].sum())
            found = sum(-(-rows // s) * -(-columns // s) for s in SCALES)
            total += 2 * text * found * (WIDTH if learned else channels)
            total += 2 * channels * (WIDTH * (text + found) + text) if learned else 0
        start += n
    return total


def _inject_flops(*shapes: list[int], **_: object) -> int:
    """Of the shapes of what :func:`dape_inject` is given."""
    (batch, n, size), _index, _valid, _attention, (locations, channels), *_others = shapes
    maps = 2 * WIDTH * (2 * batch * n * size + 2 * locations * channels)
    return maps + _pooling_flops(locations, channels, 1)


_OPTIONAL = ", ".join(f"Tensor? {name}=None" for name in Matching.NAMES)

define(
    "dape_cover(Tensor features, Tensor stream, Tensor prompt, Tensor flat, Tensor grid, Tensor member, Tensor lengths,"
    f" Tensor keep, {_OPTIONAL}) -> Tensor",
    dape_cover,
    like_member,
    kernel="vlmrewrite.passes.dape.kernels.matching:dape_cover",
    flops=_cover_flops,
    flops_by_value=True,
)

define(
    "dape_pool(Tensor hidden, Tensor index, Tensor valid, Tensor stream, Tensor flat, Tensor lengths, Tensor grid,"
    f" Tensor? prompt=None, {_OPTIONAL}) -> Tensor",
    dape_pool,
    kernel="vlmrewrite.passes.dape.kernels.regions:dape_pool",
    kernel_fake=lambda hidden, *_: hidden.new_empty(hidden.shape),
    backward=True,
    flops=lambda hidden, index, valid, stream, flat, *_, **__: flat[0] * hidden[2],
)

define(
    "dape_split(Tensor attention, Tensor features, Tensor grid, Tensor member, Tensor lengths, Tensor keep) -> Tensor",
    dape_split,
    like_member,
    kernel="vlmrewrite.passes.dape.kernels.quadtree:dape_split",
    flops=lambda _, features, *__, **___: _pooling_flops(features[0], features[1], len(SCALES)),
)

define(
    "dape_focus(Tensor attention, Tensor features, Tensor owner, Tensor member, Tensor lengths, float share) -> Tensor",
    dape_focus,
    like_member,
    flops=lambda _, features, *__, **___: _pooling_flops(features[0], features[1], 1),
)

define(
    "dape_inject(Tensor hidden, Tensor index, Tensor valid, Tensor attention, Tensor features, Tensor prompt,"
    " Tensor flat, Tensor lengths, Tensor grid, Tensor query, Tensor key, Tensor value, Tensor out, Tensor gate,"
    " float share) -> Tensor",
    dape_inject,
    kernel="vlmrewrite.passes.dape.kernels.detail:dape_inject",
    kernel_fake=lambda hidden, *_: hidden.new_empty(hidden.shape),
    backward=True,
    flops=_inject_flops,
)

COVER, POOL = torch.ops.vlm.dape_cover.default, torch.ops.vlm.dape_pool.default
SPLIT, INJECT = torch.ops.vlm.dape_split.default, torch.ops.vlm.dape_inject.default
