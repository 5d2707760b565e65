"""How sure a mean is, and the difference of two means over the same samples: 95 % intervals.

Scores that are all 0 or 1 have intervals in closed form; others are drawn again and again (bootstrap), with a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
"""Of the normal distribution, 95 % lie within so many standard deviations."""

DRAWS = 4000
"""Samples with replacement of a bootstrap."""


class Paired(NamedTuple):
    """Two lists of scores of the same samples, compared.

    Attributes:
        difference: of the means, the second less the first.
        interval: 95 %, of the difference.
        better, worse: how many samples score higher and lower in the second.
        mcnemar: probability of so uneven a split of the changed samples, or a more uneven one, if both were alike.
    """

    difference: float
    interval: tuple[float, float]
    better: int
    worse: int
    mcnemar: float


def is_binary(*scores: Sequence[float]) -> bool:
    """Whether all of them are 0 or 1."""
    return all(x in (0.0, 1.0) for one in scores for x in one)


def mean(scores: Sequence[float]) -> float:
    """The mean, of at least one score."""
    return float(sum(scores) / len(scores))


def interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for scores of 0 and 1, else by bootstrap."""
    if is_binary(scores):
        return wilson(int(sum(scores)), len(scores))
    return bootstrap(scores, seed)


def paired(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Paired:
    """Compare scores of the same samples, in the same order.

    The interval is that of Bonett and Price for scores of 0 and 1, which holds where no sample changed too; else by
    bootstrap of the differences.
    """
    changes = [b - a for a, b in zip(before, after, strict=True)]
    better, worse, n = sum(x > 0 for x in changes), sum(x < 0 for x in changes), len(changes)
    known = bonett_price(better, worse, n) if is_binary(before, after) else bootstrap(changes, seed)
    return Paired(mean(changes), known, better, worse, mcnemar(better, worse))


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % (Wilson 1927, JASA 22:209)."""
    share, square = right / n, Z * Z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = Z / (1 + square / n) * sqrt(share * (1 - share) / n + square / (4 * n * n))
    return (0.0 if right == 0 else middle - half, 1.0 if right == n else middle + half)


def bonett_price(better: int, worse: int, n: int) -> tuple[float, float]:
    """95 % interval of a difference of paired shares (Bonett and Price 2012, J. Educ. Behav. Stat. 37:479).

    Args:
        better, worse: samples that changed from 0 to 1, and from 1 to 0.
        n: all samples.
    """
    up, down = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    half = Z * sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided test of McNemar (1947, Psychometrika 12:153), a probability."""
    n, few = better + worse, min(better, worse)
    tail = sum(comb(n, k) for k in range(few + 1))
    return min(1.0, float(2 * tail / 2**n))


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean: percentiles of the means of samples with replacement (Efron 1979, Ann. Stat. 7:1)."""
    given, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [float(given[generator.integers(len(given), size=len(given))].mean()) for _ in range(DRAWS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
