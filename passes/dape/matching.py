"""How text tokens match an image's regions, and what splitting a region gains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrewrite.passes.dape.regions import moments, representatives, sizes


def match(
    text: Tensor, regions: Tensor, level: Tensor, visual: Tensor, weights: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Text density of each text token, and how well it matches each region.

    With weights, for text token i and region j of scale s, LN without parameters:
    ``rho_i = sigmoid(text . LN t_i + bias)``,
    ``z_ij = (query LN t_i) . (key LN R_j) / sqrt(d) + scale_s + slope_s rho_i + visual v_j``.
    Without: ``z_ij = LN t_i . LN R_j / sqrt(H)``, rho_i = 1 - entropy of softmax_j z_ij, in units of log R.

    Args:
        text: [..., n, H]. regions: [..., R, H]. level: index into :data:`SCALES` of each region, int64 [..., R].
        visual: density v_j of each region, [..., R], in units of the largest.
        weights: query [d, H], key [d, H], text [H], bias [1], scale [3], slope [3] and visual [1], or none.

    Returns:
        rho [..., n] and z [..., n, R], fp32.
    """
    size = text.shape[-1:]
    t, r = F.layer_norm(text.float(), size), F.layer_norm(regions.float(), size)
    if not weights:
        z = t @ r.transpose(-1, -2) / math.sqrt(size[0])
        log_p = z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return (1 - entropy / math.log(max(2, z.shape[-1]))).clamp(0.0, 1.0), z
    query, key, dense, bias, scale, slope, seen = (w.float() for w in weights)
    rho = torch.sigmoid(t @ dense + bias)
    z = (t @ query.T) @ (r @ key.T).transpose(-1, -2) / math.sqrt(len(query))
    offset = scale[level] + seen * visual
    return rho, z + offset[..., None, :] + slope[level][..., None, :] * rho[..., None]


def bar(rho: Tensor) -> Tensor:
    """From where on, on a scale of 0 to 1, a text token of density rho matches a region: dense ones match more."""
    return 0.9 - 0.3 * rho


def aligned(rho: Tensor, z: Tensor, most: int) -> Tensor:
    """Which regions belong to which text token: z, scaled to [0, 1], is kept from 0.9 - 0.3 rho on, and normalised.

    Args:
        rho: [..., n]. z: [..., n, R]. most: how many regions a token may have.

    Returns:
        weights [..., n, R]; each row's sum is 1, or 0 if it matches all regions alike.
    """
    low, high = z.aminmax(dim=-1, keepdim=True)
    z = (z - low) / (high - low).clamp(min=1e-12)
    best = z.topk(min(most, z.shape[-1]), dim=-1).values[..., -1:]
    kept = torch.where((z >= bar(rho)[..., None]) & (z >= best), z, 0.0)
    return kept / kept.sum(-1, keepdim=True).clamp(min=1e-12)


TEXT_BLOCK = 512

TOGETHER = 2**20
"""Numbers in the features of images that are looked at together: more would not stay in a processor's cache."""


def gains(features: Tensor, blocks: Tensor, text: Tensor, weights: Sequence[Tensor] = ()) -> Tensor:
    """What splitting a block of one image gains: the squared error of pooling it, times 0.1 + its score.

    A region's score is ``max_i rho_i a_ij`` over the text tokens i, in units of the largest, where ``a`` keeps at most
    an eighth as many regions as the image has tokens (see :func:`match` and :func:`aligned`). A block's score is the
    largest one of the regions in it; a location's error is its squared distance from the average of its 2 x 2 block.

    Args:
        features: of images of one grid, [..., n, H]. blocks: representatives, int64 [3, n].
        text: hidden states of the text of each image's row, [..., m, H]. weights: of :class:`Matching`, or none.

    Returns:
        fp32 [..., 3, n], at the representatives of each scale; also that of a location.
    """
    n, size = features.shape[-2:]
    x = features.float().reshape(-1, n, size)
    start = n * torch.arange(len(x), device=x.device)
    found = moments(x.flatten(0, 1), (blocks[:, None] + start[:, None]).flatten(1))
    few = [len(at) // len(x) for at in found.at]
    at = torch.cat([blocks[0], *(at[:k] for at, k in zip(found.at, few, strict=True))])
    level = torch.repeat_interleave(torch.tensor([n, *few], device=x.device))
    regions = torch.cat([x, *(mean.view(len(x), -1, size) for mean in found.mean)], 1)
    error, visual = (y.view(3, len(x), n).transpose(0, 1) for y in (found.error, found.density))
    seen = visual[:, level, at]
    visible = seen / seen.amax(1, keepdim=True).clamp(min=1e-12)
    best = torch.zeros_like(seen)
    for some in text.reshape(len(x), -1, size).split(TEXT_BLOCK, 1) if text.shape[-2] else ():
        rho, z = match(some, regions, level, visible, weights)
        best = best.maximum((rho[..., None] * aligned(rho, z, max(1, n // 8))).amax(1))
    score = torch.zeros_like(visual)
    score[:, level, at] = best / best.amax(1, keepdim=True).clamp(min=1e-12)
    for s in (1, 2):
        score[:, s].scatter_reduce_(1, blocks[s].expand(len(x), -1), score[:, s - 1, blocks[s - 1]], "amax")
    return (error * (0.1 + score)).view(*features.shape[:-2], 3, n)


def all_gains(
    features: Tensor,
    stream: Tensor,
    prompt: Tensor,
    flat: Tensor,
    lengths: Tensor,
    grid: Tensor,
    weights: Sequence[Tensor] = (),
) -> Tensor:
    """:func:`gains` of all images, those of equal grids and equally much text together.

    Args:
        features: [F, H]. stream, prompt, flat, lengths, grid, weights: as for :func:`.ops.dape_cover`.

    Returns:
        fp32 [3, F].
    """
    out = torch.zeros(3, len(features), device=features.device)
    starts = (lengths.cumsum(0) - lengths).tolist()
    seen = [(i, size) for i, size in zip(starts, sizes(lengths, grid), strict=True) if size[0] * size[1]]
    rows = (flat[[i for i, _ in seen]] // prompt.shape[1]).tolist()
    texts = {row: stream[row][prompt[row]] for row in set(rows)}
    groups = dict[tuple[tuple[int, int], int], list[tuple[int, int]]]()
    for (i, size), row in zip(seen, rows, strict=True):
        groups.setdefault((size, len(texts[row])), []).append((i, row))
    for (size, _), images in groups.items():
        n = size[0] * size[1]
        blocks = representatives(torch.tensor([n], device="cpu"), torch.tensor([size], device="cpu")).to(out.device)
        together = max(1, TOGETHER // (n * features.shape[1]))
        for begin in range(0, len(images), together):
            some = images[begin : begin + together]
            x, text = torch.stack([features[i : i + n] for i, _ in some]), torch.stack([texts[row] for _, row in some])
            with torch.autocast(features.device.type, enabled=False):
                found = gains(x, blocks, text, weights)
            for (i, _), own in zip(some, found, strict=True):
                out[:, i : i + n] = own
    return out
