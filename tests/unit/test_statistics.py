"""Intervals and tests of shares, against scipy, published cases, and what they promise."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from vlmrewrite.evaluate.statistics import bonett_price, bootstrap, interval, mcnemar, mean, paired, wilson

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("right", "n"), [(0, 12), (1, 10), (5, 10), (81, 263), (480, 500), (500, 500)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    theirs = scipy_stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (0, 5), (3, 3), (4, 17), (60, 30)])
def test_mcnemar_is_the_exact_binomial_test(better: int, worse: int) -> None:
    expected = scipy_stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(expected)


def test_the_interval_of_a_paired_difference_holds_what_it_promises() -> None:
    """The chance that the true difference lies in it, summed over all tables of 60 pairs."""
    n, up, down = 60, 0.10, 0.18
    covered = 0.0
    for better in range(n + 1):
        for worse in range(n + 1 - better):
            chance = comb(n, better) * comb(n - better, worse) * up**better * down**worse
            low, high = bonett_price(better, worse, n)
            covered += chance * (1 - up - down) ** (n - better - worse) * (low <= up - down <= high)
    assert 0.94 < covered < 0.975


def test_nothing_changed_is_not_certainty() -> None:
    low, high = bonett_price(0, 0, 20)
    assert low == -high and 0.05 < high < 0.2


def test_bootstrap_is_scipys() -> None:
    values = np.random.default_rng(3).beta(2, 1, 80)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert bootstrap(list(values)) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert bootstrap(list(values), 1) == bootstrap(list(values), 1) != bootstrap(list(values), 2)


def test_which_interval_is_taken() -> None:
    assert interval([1, 0, 1, 1]) == wilson(3, 4)
    assert interval([0.5, 1, 0.2]) == bootstrap([0.5, 1, 0.2])
    assert mean([0.5, 1, 0.0]) == 0.5
    found = paired([1, 1, 0, 0, 1], [1, 0, 1, 0, 0])
    assert found == (pytest.approx(-1 / 5), bonett_price(1, 2, 5), 1, 2, mcnemar(1, 2))
    found = paired([0.5, 1, 0.2], [0.5, 0.4, 0.3], seed=4)
    assert (found.better, found.worse) == (1, 1)
    assert found.interval == bootstrap([0, 0.4 - 1, 0.3 - 0.2], 4)
