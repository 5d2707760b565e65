"""How well text matches regions, without the matches of all text tokens at once.

A region's average is linear in its locations, and so is what a text token's product with it is: one matrix product of
the text with the locations gives the matches with regions of all scales. The layer norms of averages need two numbers
of each, which the pass over the features found. Matches are kept for :data:`SPACE` bytes of text at a time; each row is
scaled and cut where it lies, and leaves only the maxima over the text behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite.passes.dape.kernels.quadtree import moments, refined
from vlmrewrite.passes.dape.kernels.regions import BLOCKS, COLUMNS, FIELDS, FIRST, ROWS, START, block, places, table
from vlmrewrite.passes.dape.regions import affordable

SPACE = 2**26
"""Bytes for matches."""

PRECISION = "tf32x3"
"""Exact products are far below fp32's peak on a GPU; three products of TF32 parts are as exact to about 2**-21."""


@triton.jit(do_not_specialize=["ssb", "spb", "slots"])
def _normed(  # type: ignore[no-untyped-def]
    Stream, Order, Count, Out, slots, channels, ssb, sst, ssc, sob, C: tl.constexpr
) -> None:
    """One text token: its hidden state behind a layer norm without parameters, fp32."""
    i, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if i < tl.load(Count + b):
        row = Stream + b * ssb + tl.load(Order + b * sob + i) * sst
        c = tl.arange(0, C)
        mask = c < channels
        x = tl.load(row + c.to(tl.int64) * ssc, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - tl.sum(x, 0) / channels, 0.0)
        x = x / tl.sqrt(tl.sum(x * x, 0) / channels + 1e-5)
        tl.store(Out + (b * slots + i) * channels + c, x, mask=mask)


@triton.jit(do_not_specialize=["first", "slots", "length", "stride", "stb"])
def _match(  # type: ignore[no-untyped-def]
    Table, Flat, Text, Count, X, Mean, Scale, Seen, Most, Rho, Offsets, Out,
    first, slots, length, stride, channels, scale, stb, sxf, sxc,
    RAW: tl.constexpr, LEARNED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """M text tokens and N 4 x 4 blocks of an image; with RAW, M rows of any matrix, written per location."""
    image = tl.program_id(2).to(tl.int64)
    at = Table + image * FIELDS
    i = tl.program_id(0) * M + tl.arange(0, M)
    if RAW:
        b = image * 0
        count = slots
    else:
        b = tl.load(Flat + tl.load(at + START)) // length
        count = tl.minimum(tl.load(Count + b) - first, slots).to(tl.int32)
    start = tl.program_id(1) * N
    if (tl.program_id(0) * M < count) & (start < tl.load(at + BLOCKS)):
        lane = tl.arange(0, N * 16)
        there, place, _, _ = places(Table, image, start + lane // 16, lane % 16 // 4, lane % 4)
        mean = tl.zeros((N * 16, 1), tl.float32)
        if not LEARNED:
            mean = tl.load(Mean + place[:, None], mask=there[:, None], other=0.0)
        text = Text + b * stb + (first + i).to(tl.int64) * channels
        total = tl.zeros((M, N * 16), tl.float32)
        for k in range(0, channels, K):
            c = k + tl.arange(0, K)
            a = tl.load(text[:, None] + c[None, :], mask=(i < count)[:, None] & (c < channels)[None, :], other=0.0)
            mask = there[:, None] & (c < channels)[None, :]
            x = tl.load(X + (place * sxf)[:, None] + (c * sxc)[None, :], mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, x - mean, 0.0)
            total = tl.dot(a.to(tl.float32), tl.trans(x), total, input_precision=PRECISION)
        if RAW:
            out = Out + place[None, :] * slots + i[:, None]
            tl.store(out, total, mask=(i < count)[:, None] & there[None, :])
        else:
            one = there.to(tl.float32)
            n2, n4 = tl.sum(tl.reshape(one, (N * 4, 4)), 1), tl.sum(tl.reshape(one, (N, 16)), 1)
            two = tl.sum(tl.reshape(total, (M, N * 4, 4)), 2) / tl.maximum(n2, 1.0)[None, :]
            four = tl.sum(tl.reshape(total, (M, N, 16)), 2) / tl.maximum(n4, 1.0)[None, :]
            out = Out + (image * slots + i)[:, None] * stride
            base = (tl.load(at + FIRST) + start) * 21
            inside, blocks = (i < count)[:, None], tl.load(at + BLOCKS).to(tl.int32)
            most = tl.maximum(tl.load(Most + image), 1e-12)
            rho = tl.zeros((M,), tl.float32)
            if LEARNED:
                rho = tl.load(Rho + b * stb // channels + first + i, mask=i < count, other=0.0)
            j, left = lane // 16 * 21 + lane % 16, start + lane // 16 < blocks
            _leave(
                out,
                total,
                Scale + base,
                Seen + base,
                Offsets,
                most,
                rho,
                start * 21,
                j,
                inside,
                left,
                scale,
                0,
                LEARNED,
            )
            lane = tl.arange(0, N * 4)
            j, left = lane // 4 * 21 + 16 + lane % 4, start + lane // 4 < blocks
            _leave(
                out, two, Scale + base, Seen + base, Offsets, most, rho, start * 21, j, inside, left, scale, 1, LEARNED
            )
            lane = tl.arange(0, N)
            j, left = lane * 21 + 20, start + lane < blocks
            _leave(
                out, four, Scale + base, Seen + base, Offsets, most, rho, start * 21, j, inside, left, scale, 2, LEARNED
            )


@triton.jit
def _leave(  # type: ignore[no-untyped-def]
    out, z, Scale, Seen, Offsets, most, rho, start, j, inside, left, scale, LEVEL: tl.constexpr, LEARNED: tl.constexpr
) -> None:
    """Write the matches with the regions of one scale, minus infinity where there is none."""
    deviation = tl.load(Scale + j, mask=left, other=0.0)
    z = z * deviation[None, :] * scale
    if LEARNED:
        offset, slope, seen = tl.load(Offsets + LEVEL), tl.load(Offsets + 3 + LEVEL), tl.load(Offsets + 6)
        z += (offset + seen * tl.load(Seen + j, mask=left, other=0.0) / most)[None, :] + slope * rho[:, None]
    z = tl.where((deviation > 0.0)[None, :], z, -float("inf"))
    tl.store(out + (start + j)[None, :], z, mask=inside & left[None, :])


@triton.jit(do_not_specialize=["first", "slots", "length", "stride", "srb"])
def _align(  # type: ignore[no-untyped-def]
    Table, Flat, Count, Z, Rho, Best, Top, first, slots, length, stride, srb, LEARNED: tl.constexpr, N: tl.constexpr
) -> None:
    """One text token: which regions belong to it, and how much; what is left is their maximum over text tokens."""
    i, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = Table + image * FIELDS
    b = tl.load(Flat + tl.load(at + START)) // length
    if first + i < tl.load(Count + b):
        rows, columns = tl.load(at + ROWS).to(tl.int32), tl.load(at + COLUMNS).to(tl.int32)
        count = tl.load(at + BLOCKS).to(tl.int32) * 21
        z = Z + (image * slots + i) * stride
        lane = tl.arange(0, N)
        low, high = tl.full((N,), float("inf"), tl.float32), tl.full((N,), -float("inf"), tl.float32)
        for j in range(0, count, N):
            x = tl.load(z + j + lane, mask=j + lane < count, other=-float("inf"))
            low = tl.minimum(low, tl.where(x == -float("inf"), float("inf"), x))
            high = tl.maximum(high, x)
        least, most = tl.min(low, 0), tl.max(high, 0)
        if LEARNED:
            rho = tl.load(Rho + b * srb + first + i)
        else:
            total, energy = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
            for j in range(0, count, N):
                x = tl.load(z + j + lane, mask=j + lane < count, other=-float("inf")) - most
                e = tl.exp(x)
                total += e
                energy += tl.where(e > 0.0, x * e, 0.0)
            weight = tl.sum(total, 0)
            entropy = tl.log(weight) - tl.sum(energy, 0) / weight
            regions = rows * columns + (rows + 1) // 2 * ((columns + 1) // 2) + (rows + 3) // 4 * ((columns + 3) // 4)
            rho = 1.0 - entropy / tl.log(tl.maximum(regions, 2).to(tl.float32))
            rho = tl.minimum(tl.maximum(rho, 0.0), 1.0)
        width = tl.maximum(most - least, 1e-12)
        limit = 0.9 - 0.3 * rho
        wanted = tl.maximum(rows * columns // 8, 1)
        found = tl.zeros((N,), tl.int32)
        for j in range(0, count, N):
            x = (tl.load(z + j + lane, mask=j + lane < count, other=-float("inf")) - least) / width
            found += (x >= limit).to(tl.int32)
        if tl.sum(found, 0) > wanted:
            # the wanted-th largest by halving: numbers from 0 to 1 are ordered as their bits
            bits, step = tl.full((), 0, tl.int32), tl.full((), 2**30, tl.int32)
            for _ in range(31):
                found = tl.zeros((N,), tl.int32)
                for j in range(0, count, N):
                    x = (tl.load(z + j + lane, mask=j + lane < count, other=-float("inf")) - least) / width
                    found += ((x >= 0.0) & (x.to(tl.int32, bitcast=True) >= bits + step)).to(tl.int32)
                bits = tl.where(tl.sum(found, 0) >= wanted, bits + step, bits)
                step = step // 2
            limit = bits.to(tl.float32, bitcast=True)
        kept = tl.zeros((N,), tl.float32)
        for j in range(0, count, N):
            x = (tl.load(z + j + lane, mask=j + lane < count, other=-float("inf")) - least) / width
            kept += tl.where(x >= limit, x, 0.0)
        share = rho / tl.maximum(tl.sum(kept, 0), 1e-12)
        best = Best + tl.load(at + FIRST) * 21
        top = tl.zeros((N,), tl.float32)
        for j in range(0, count, N):
            x = (tl.load(z + j + lane, mask=j + lane < count, other=-float("inf")) - least) / width
            x = tl.where(x >= limit, x * share, 0.0)
            tl.atomic_max(best + j + lane, x, mask=x > 0.0)
            top = tl.maximum(top, x)
        tl.atomic_max(Top + image, tl.max(top, 0))


@triton.jit(do_not_specialize=["total"])
def _gains(Table, Best, Top, Error, total):  # type: ignore[no-untyped-def]
    """One 4 x 4 block: its squared errors, times 0.1 and the score."""
    image, number = tl.program_id(1), tl.program_id(0)
    if number < tl.load(Table + image * FIELDS + BLOCKS):
        there, place, small, large = block(Table, image, number)
        best = Best + (tl.load(Table + image * FIELDS + FIRST) + number) * 21
        most = tl.maximum(tl.load(Top + image), 1e-12)
        q, s = tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :]
        one = tl.load(best + q * 4 + s) / most
        two = tl.maximum(tl.load(best + 16 + tl.arange(0, 4)) / most, tl.max(one, 1))
        four = tl.maximum(tl.load(best + 20) / most, tl.max(two, 0))
        _scale(Error + place, one, there)
        _scale(Error + total + place, one * 0.0 + two[:, None], there & (place == small))
        _scale(Error + 2 * total + place, one * 0.0 + four, there & (place == large))


@triton.jit
def _scale(at, score, mask):  # type: ignore[no-untyped-def]
    tl.store(at, tl.load(at, mask=mask, other=0.0) * (0.1 + score), mask=mask)


def gains(
    images: Tensor, blocks: int, features: Tensor, stream: Tensor, prompt: Tensor, flat: Tensor, least: int,
    weights: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """:func:`vlmrewrite.passes.dape.matching.gains` of all images, fp32 [3, F].

    Args:
        images, blocks: of :func:`vlmrewrite.passes.dape.kernels.regions.table`.
        features, stream, prompt, flat, weights: of ``dape_cover``.
        least: tokens of the smallest image.
    """
    error, deviation, seen, mean, top = moments(images, blocks, features)
    best, peak = torch.zeros_like(deviation), torch.zeros_like(top)
    (batch, length), channels, many = prompt.shape, features.shape[1], len(images)
    slots = length - least  # no row that has an image has more text
    if slots > 0:
        order, count = prompt.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots], prompt.sum(1)
        text = torch.zeros(batch, slots, channels, dtype=torch.float32, device=features.device)
        _normed[(slots, batch)](
            stream, order, count, text, slots, channels, *stream.stride(), order.stride(0),
            C=triton.next_power_of_2(channels), num_warps=8,
        )  # fmt: skip
        x, rho, offsets = features, deviation, deviation
        if weights:
            query, key, dense, bias, *others = (w.float() for w in weights)
            x = _projected(images, blocks, features, mean, key)
            rho, offsets = torch.sigmoid(text @ dense + bias), torch.cat(others)
            text = text @ query.T
        step = max(32, min(slots, SPACE // (84 * blocks * many)))
        z = torch.empty(many, step, 21 * blocks, dtype=torch.float32, device=features.device)
        found = (images, flat, text, count, x, mean, deviation, seen, top, rho, offsets, z)
        width = min(2048, triton.next_power_of_2(21 * blocks))
        for first in range(0, slots, step):
            _match[(triton.cdiv(step, 32), triton.cdiv(blocks, 2), many)](
                *found, first, step, length, 21 * blocks, text.shape[2], text.shape[2] ** -0.5, text.stride(0),
                *x.stride(), RAW=False, LEARNED=bool(weights), M=32, N=2, K=32, PRECISION=PRECISION,
                num_warps=4, num_stages=2,
            )  # fmt: skip
            _align[(step, many)](
                images, flat, count, z, rho, best, peak, first, step, length, 21 * blocks, slots,
                LEARNED=bool(weights), N=width, num_warps=8,
            )  # fmt: skip
    _gains[(blocks, many)](images, best, peak, error, len(features), num_warps=1)
    return error


def _projected(images: Tensor, blocks: int, features: Tensor, mean: Tensor, key: Tensor) -> Tensor:
    """Features less their means over channels, times ``key`` [d, C]: fp32 [F, d]."""
    out, key = features.new_empty(len(features), len(key), dtype=torch.float32), key.contiguous()
    unused = (out,) * 5
    _match[(triton.cdiv(len(key), 32), triton.cdiv(blocks, 2), len(images))](
        images, images, key, images, features, mean, *unused, out, 0, len(key), 1, 0, features.shape[1], 1.0, 0,
        *features.stride(), RAW=True, LEARNED=False, M=32, N=2, K=32, PRECISION=PRECISION,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def dape_cover(
    features: Tensor, stream: Tensor, prompt: Tensor, flat: Tensor, grid: Tensor, member: Tensor, lengths: Tensor,
    keep: Tensor, *weights: Tensor | None,
) -> Tensor:  # fmt: skip
    """Launcher of ``dape_cover``: the features are read once, and once more for each :data:`SPACE` of matches."""
    wanted = keep.tolist()
    more = [k - least for k, least in zip(wanted, affordable(grid, wanted), strict=True)]
    images, blocks = table(lengths, grid, member.device, more)
    if not blocks:
        return torch.zeros_like(member)
    given = [w for w in weights if w is not None]
    kind = features.device.type
    exact = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
    with exact:
        priority = gains(images, blocks, features, stream, prompt, flat, min(lengths.tolist()), given)
    return refined(images, blocks, priority, None)
