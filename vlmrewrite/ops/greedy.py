"""Greedy choice of tokens by potentials: products say which tokens may be next, the definition says which one is.

By its definition, a pick changes the potential of every token that is left, which takes a pass over all features. Here
it takes one row of a matrix product, so that the potentials are known within bounds. Where the bounds of several tokens
overlap, these are rivals: their potentials are computed as the definition says, from fp32 features, pick by pick in
their order, and decide. So the picks are those of the definition, ties and near duplicates included, as long as what
many steps round adds up like random numbers: bounds are of so many deviations that chance does not matter, but features
can be made up (of one size in all channels, say, and alike in most of them) whose roundings are alike. And as long as a
row is added up alike whatever rows it is computed with, which CPUs do, and GPUs do not for fewer than some 16 rows.

Lazy greedy search, which renews a potential only when its token comes first in a queue, was tried: on random features
the potentials of nearly all tokens are so near to one another that nearly all are renewed at each pick, and it loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vlmrewrite.ops.renewals import SIDE, Array, Places
from vlmrewrite.ops.scoring import is_counted, left_of

ROOM = 2**24
"""Numbers in a batch's features, and in its matrix of products: 64 MiB of fp32."""

WORTH = 10
"""The matrix of all products is made if one in so many of its rows is used, or more."""

AHEAD, AMONG = (16, 64), 3
"""Rows of it that are computed at a time where it is not made, the fewest and the most; and among how many times as
many rows these are looked for."""

PART = 256
"""Channels whose products are added up at a time: a matrix product of so many is still as fast as one of all."""

Then = Callable[[int, Array, Places, int, Array], Array]


class Rule(Protocol):
    """What greedy search takes the least of: bounds from products, and the definition."""

    def first(self) -> Tensor:
        """The score that the first pick has least, by its definition, fp32 [I, m]."""

    def next(self, picks: Places) -> tuple[Places, dict[int, Places]]:
        """After one more pick of each image, [I].

        Returns:
            of each image the token that is likely to have the least potential now, [I]; of the images where others may
            have no more, by their bounds, those and it, ascending, so that ties go to the first. Of images without any,
            the token is the next pick.
        """

    def exactly(self, image: int, rows: Places, picks: Places) -> Array:
        """Potentials of some tokens of an image, [r], after its picks, [p], by the definition: fp64 [r].

        From now on, the bounds are these and what further picks change of them.
        """


def search(rule: Rule, k: int) -> Places:
    """The first ``k`` picks of each image, in order, [I, k].

    Args:
        rule: of I images of m tokens, all finite.
        k: 1 <= k < m.
    """
    score = rule.first()
    picks = np.empty((len(score), k), np.intp)
    picks[:, 0] = last = score.argmin(1).cpu().numpy()
    for t in range(1, k):
        last, rivals = rule.next(last)
        for image, own in rivals.items():
            last[image] = own[rule.exactly(image, own, picks[image, :t]).argmin()]
        picks[:, t] = last
    return picks


def product_rounding(n: int, device: torch.device) -> tuple[float, float]:
    """What :func:`row_products` of ``n`` channels are off, in units of the sum of the sizes that they add.

    Each addition rounds by at most 2^-24 of the sum. Errors add up like random ones: s of them to a standard deviation
    of at most sqrt(s) / 3 units of it; 12 times as much is allowed. Where the user lets matrix products be computed
    from shorter numbers, each of the two is rounded by as much as these are, which is the second number.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    short = {"bf16": 2.0**-7, "tf32": 2.0**-10}.get(backend.matmul.fp32_precision, 0.0)
    return 4 * math.sqrt(min(n, PART) + n / PART + 16) * 2.0**-24, short


def small_first(x: Tensor) -> Tensor:
    """The channels of each image, x [I, m, C], in the order of :func:`channel_order`."""
    return reordered(x, [channel_order(one) for one in x])


def reordered(x: Tensor, orders: Sequence[Tensor]) -> Tensor:
    """The channels of each image, x [I, m, C], in an order, int64 [C] each; x itself, where they stay as they are."""
    if all(bool((order[1:] > order[:-1]).all()) for order in orders):
        return x
    return torch.stack([one.index_select(1, order) for one, order in zip(x, orders, strict=True)])


def channel_order(x: Tensor) -> Tensor:
    """In which order products of the rows of x [m, C] add their channels: see :func:`order_of`."""
    return order_of(torch.stack([part.square().sum(0) for part in x.split(SIDE)]).sum(0))


def order_of(sizes: Tensor) -> Tensor:
    """In which order products add their channels, by the sums of their squares, [C]: as they are, unless few are most.

    These come last then. Against a sum that is large from the start, numbers of one size round alike, and not like
    random ones. Where there are few channels, no more than is allowed for comes of it.

    Returns:
        int64 [C].
    """
    channels = torch.arange(len(sizes), device=sizes.device)
    if len(channels) <= 16:
        return channels
    large = sizes.topk(8).values.sum() > 4 / math.sqrt(len(channels)) * sizes.sum()
    return torch.where(large, sizes.argsort(), channels)


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """The products of rows of x [n, C] and of y [r, C], fp32 [n, r]: sums of :data:`PART` channels, and their sum.

    So fewer numbers are added to a large sum: libraries add up such a product before they add it to what is there. As
    few are where PyTorch adds up a row, which it does in several sums.
    """
    (first, other), *more = zip(x.split(PART, 1), y.split(PART, 1), strict=True)
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = first @ other.T
        for these, those in more:
            found.addmm_(these, those.T)
    return found


def upper_products(x: Tensor, side: int) -> Iterator[tuple[int, Tensor]]:
    """The products of rows of x [m, C] with one another, ``side`` rows at a time, each pair once.

    Yields:
        number of the first row; products of some rows with all from that one on, [r, m - first].
    """
    for begin in range(0, len(x), side):
        yield begin, row_products(x[begin : begin + side], x[begin:])


class Products:
    """Products of the rows of each image, x [I, m, C].

    With the matrix of all of them, ``gram`` [I, m, m], where there is room for it and so many of its rows are used that
    it is worth it. Else rows are computed some at a time: that of a pick, and of those that are likely to be next. A
    search among :data:`AMONG` times as many rows, those of least potential, says which. There are more at a time as
    long as half of them become picks, fewer where they do not.

    Args:
        x: the rows.
        k: how many are picked of each image.
        side: rows of the matrix that are computed at a time.
    """

    def __init__(self, x: Tensor, k: int, side: int = SIDE) -> None:
        images, m, _ = x.shape
        self.x = x
        self.gram = self._gram(side) if images * m * m <= ROOM and k * WORTH >= m else None
        self.rows: Array | None = None if self.gram is None else self.gram.cpu().numpy()
        self._known: list[dict[int, Array]] = [{} for _ in range(images)]
        self._ahead, self._used, self._left = [AHEAD[0]] * images, [0] * images, [k] * images

    def _gram(self, side: int) -> Tensor:
        images, m, _ = self.x.shape
        gram = self.x.new_empty(images, m, m)
        for x, to in zip(self.x, gram, strict=True):
            for begin, pairs in upper_products(x, side):
                end = begin + len(pairs)
                own = pairs[:, : len(pairs)].triu_()
                own += own.triu(1).T  # each pair is computed once, so ties stay ties
                to[begin:end, begin:] = pairs
                to[end:, begin:end] = pairs[:, len(pairs) :].T
        return gram

    def of(self, picks: Places, likely: Array | None, then: Then) -> Array:
        """Of each image's row with the pick's number, with all of its rows: [I, m].

        Args:
            picks: one of each image.
            likely: the less, the sooner a row is picked, [I, m]; None: nothing is known of that.
            then: the potentials of some rows of an image, [s], after another pick among them; takes the image, the
                potentials, the numbers of the rows, the pick's place among them, and its products with them, [s].
        """
        if self.rows is not None:
            return self.rows[np.arange(len(picks)), picks] if len(picks) > 1 else self.rows[:, picks[0]]
        rows = [self._row(i, x, None if likely is None else likely[i], then) for i, x in enumerate(picks.tolist())]
        return np.stack(rows) if len(rows) > 1 else rows[0][None]

    def _row(self, image: int, pick: int, likely: Array | None, then: Then) -> Array:
        known, x = self._known[image], self.x[image]
        self._used[image] += 1
        self._left[image] -= 1
        if pick not in known:
            rows = [pick] if likely is None else [i for i in self._next(image, pick, likely, then) if i not in known]
            made = row_products(x, x[rows]).T.contiguous().cpu().numpy()  # few columns take less time than few rows
            if (len(known) + len(made)) * len(x) * len(self.x) > ROOM:
                known.clear()
            known.update(zip(rows, made, strict=True))
        return known[pick]

    def _next(self, image: int, pick: int, likely: Array, then: Then) -> list[int]:
        """A pick, and the rows that would be next if there were no others than those of the least potentials."""
        ahead = 2 * self._ahead[image] if 2 * self._used[image] >= self._ahead[image] else self._ahead[image] // 2
        self._ahead[image], self._used[image] = min(max(ahead, AHEAD[0]), AHEAD[1]), 0
        first = likely.copy()
        first[pick] = -np.inf
        rows = np.argpartition(first, min(AMONG * self._ahead[image], len(first)) - 1)[: AMONG * self._ahead[image]]
        potential, part = first[rows], self.x[image, torch.from_numpy(rows)]
        among = row_products(part, part).cpu().numpy()
        found = []
        for _ in range(min(self._ahead[image], len(rows), 1 + max(0, self._left[image]))):
            found.append(least := int(potential.argmin()))
            potential = then(image, potential, rows, least, among[least])
            potential[least] = np.inf
        order: list[int] = rows[found].tolist()
        return order


@torch.no_grad()
def greedy_choice(
    features: Tensor,
    member: Tensor,
    lengths: Tensor,
    keep: Tensor,
    rule: Callable[[Tensor, int], Rule],
    definition: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Greedy search in each image, those of equal size together.

    Args:
        features: [F, C], any float dtype.
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU; of an image that has fewer, all.
        rule: called with fp32 features of images of m tokens each, [J, m, C], and how many to choose, k < m.
        definition: the same for one image, [m, C], and how many to choose, k < m; returns the picks, int64 [k]. It is
            asked where features are not finite, or so large that squares, or what they are off, leave fp32's range.

    Returns:
        the chosen tokens, bool [F].
    """
    chosen, groups, start = torch.zeros_like(member), dict[tuple[int, int], list[Tensor]](), 0
    for i, (n, k) in enumerate(zip(lengths.tolist(), keep.tolist(), strict=True)):
        left = left_of(member, start, n, i)
        if k >= len(left):
            chosen[left] = True
        elif k:
            groups.setdefault((len(left), k), []).append(left)
        start += n
    for (m, k), images in groups.items():
        if is_counted():
            for index in images:
                chosen[index[definition(features[index].float(), k)]] = True
            continue
        room = ROOM if k * WORTH >= m else ROOM // 4  # without the matrix, few images stay nearer to the processor
        together = max(1, room // (m * max(m, features.shape[1])))
        for at in range(0, len(images), together):
            index = torch.stack(images[at : at + together])
            x = _taken(features, index).float()
            finite = (2.0**32 * torch.linalg.vector_norm(x, dim=(1, 2)).square()).isfinite()
            some = finite.nonzero()[:, 0]
            if len(some):
                picks = search(rule(x if len(some) == len(x) else x[some], k), k)
                chosen[index[some].gather(1, torch.from_numpy(picks).to(member.device))] = True
            for i in (~finite).nonzero()[:, 0].tolist():
                chosen[index[i, definition(x[i], k)]] = True
    return chosen


def _taken(features: Tensor, index: Tensor) -> Tensor:
    """``features[index]`` [J, m, C]; without a copy, where these tokens follow one another."""
    first, last = index[[0, -1], [0, -1]].tolist()  # they ascend
    together = features.is_contiguous() and last - first == index.numel() - 1  # else, sums go in another order
    return features[first : last + 1].reshape(*index.shape, -1) if together else features[index]


def greedy_scratch(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> int:
    """About how many bytes greedy search holds, for images of equal size of which all tokens may be chosen.

    For :func:`vlmrewrite.ops.define` as ``scratch``. Features in fp32, or twice, the matrix, and two blocks.
    """
    (n, channels), images = features.shape, max(1, len(lengths))
    m = max(1, n // images)
    together = min(images, max(1, ROOM // (m * max(m, channels))))
    copies, gram = 1 + (features.dtype != torch.float32), min(together * m * m, ROOM)
    return 4 * (together * m * (copies * channels + 16) + gram + 2 * min(SIDE, m) * max(m, channels))
