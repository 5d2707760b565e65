"""Budgets and depths: what is accepted, what they mean, and what the messages say."""

import dataclasses
import math
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrewrite.passes import STS, Random, Stride
from vlmrewrite.plan.budget import Budget, Depth, layer_index, tokens_kept
from vlmrewrite.plan.pipeline import frozen_pass

BUDGET = r"expected an int >= 1 \(tokens per image\) or a float in \(0, 1\]"
DEPTH = r"expected an int >= 0 \(layer\) or a float in \[0, 1\)"


@pytest.mark.parametrize("keep", [1, 192, 10**9, 1.0, 0.5, 5e-324])
def test_budget_accepts(keep: Budget) -> None:
    kept = Stride(keep=keep).keep
    assert kept == keep
    assert type(kept) is type(keep)


@pytest.mark.parametrize(
    ("keep", "shown"),
    [
        (0, "got 0"),
        (-3, "got -3"),
        (0.0, r"got 0\.0"),
        (-0.5, r"got -0\.5"),
        (1.5, r"got 1\.5"),
        (math.nextafter(1.0, 2.0), r"got 1\.0000000000000002"),
        (math.nan, "got nan"),
        (math.inf, "got inf"),
        (-math.inf, "got -inf"),
        (True, r"got True \(bool\)"),
        (False, r"got False \(bool\)"),
        ("192", r"got '192' \(str\)"),
        (None, "got None"),
        ([1], r"got \[1\] \(list\)"),
        (1j, r"got 1j \(complex\)"),
    ],
)
def test_budget_refuses(keep: object, shown: str) -> None:
    with pytest.raises(ValueError, match=rf"^Stride\.keep: {BUDGET}.*{shown}$") as caught:
        Stride(keep=keep)  # type: ignore[arg-type]
    assert type(caught.value) is ValueError
    with pytest.raises(ValueError, match=rf"{BUDGET}.*{shown}$"):
        tokens_kept(keep, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [0, 31, 0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_depth_accepts(at: Depth) -> None:
    assert Stride(keep=1, at=at).at == at
    assert type(Stride(keep=1, at=at).at) is type(at)


@pytest.mark.parametrize("at", [-1, -0.1, 1.0, 1.5, math.nan, math.inf, True, "0", None])
def test_depth_refuses(at: object) -> None:
    with pytest.raises(ValueError, match=rf"^Stride\.at: {DEPTH}.*got {at!r}"):
        Stride(keep=1, at=at)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=DEPTH):
        layer_index(at, 32)  # type: ignore[arg-type]


def test_numpy_floats_become_floats() -> None:
    made = Stride(keep=np.float64(0.5), at=np.float64(0.25))
    assert repr(made) == "Stride(keep=0.5, at=0.25, per='image')"


@pytest.mark.parametrize(
    ("keep", "n", "kept"),
    [
        (192, 576, 192),
        (192, 100, 100),
        (1, 0, 0),
        (0.5, 0, 0),
        (1.0, 577, 577),
        (0.5, 577, 288),
        (0.75, 576, 432),
        (0.5, 1, 1),
        (1e-9, 576, 1),
        (0.125, 144, 18),
    ],
)
def test_tokens_kept(keep: Budget, n: int, kept: int) -> None:
    assert tokens_kept(keep, n) == kept


def test_tokens_kept_refuses_a_negative_count() -> None:
    with pytest.raises(ValueError, match=r"n >= 0, got -1"):
        tokens_kept(0.5, -1)


@given(keep=st.integers(1, 5000) | st.floats(0, 1, exclude_min=True), n=st.integers(0, 4000))
def test_tokens_kept_stays_in_range(keep: Budget, n: int) -> None:
    kept = tokens_kept(keep, n)
    assert min(n, 1) <= kept <= n
    assert kept <= tokens_kept(keep, n + 1)
    if isinstance(keep, float):
        assert n == 0 or kept == 1 or abs(kept - keep * n) <= 0.5
        assert tokens_kept(1.0, n) == n
    else:
        assert kept == min(keep, n)


@pytest.mark.parametrize(
    ("at", "depth", "layer"),
    [
        (0, 1, 0),
        (31, 32, 31),
        (0.5, 32, 16),
        (0.5, 28, 14),
        (0.5, 5, 2),
        (0.5625, 32, 18),
        (0.29, 100, 29),
        (0.0, 32, 0),
    ],
)
def test_layer_index(at: Depth, depth: int, layer: int) -> None:
    assert layer_index(at, depth) == layer


@given(depth=st.integers(1, 500), data=st.data())
def test_layer_index_of_a_layers_own_fraction(depth: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, depth - 1))
    assert layer_index(layer, depth) == layer
    assert layer_index(layer / depth, depth) == layer


@given(at=st.floats(0, 1, exclude_max=True), depth=st.integers(1, 500))
def test_layer_index_is_always_a_layer(at: float, depth: int) -> None:
    assert layer_index(at, depth) in range(depth)


@pytest.mark.parametrize("at", [32, 99])
def test_layer_index_out_of_range(at: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a layer in 0 \.\. 31 \(the decoder has 32\), got {at}"):
        layer_index(at, 32)


def test_layer_index_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="at least one layer, got 0"):
        layer_index(0.5, 0)


def test_a_pass_prints_as_itself_and_is_frozen() -> None:
    made = STS(keep=0.75, refine=0.25)
    assert repr(made) == "STS(keep=0.75, refine=0.25, at=0.5, features='projected', per='image')"
    assert made == STS(keep=0.75, refine=0.25)
    assert hash(made) == hash(STS(keep=0.75, refine=0.25))
    assert dataclasses.replace(made, refine=None) == STS(keep=0.75, refine=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.keep = 3  # type: ignore[misc]


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"^STS\.keep: expected .* got 0\nSTS\.features: expected 'projected' or 'encoder', got 'x'"
    ):
        STS(keep=0, features="x")  # type: ignore[arg-type]


def test_wrong_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"^STS\.kep: unknown key, expected one of keep, refine, at, features, per .*'keep'"
    ):
        STS(kep=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^Random\.keep: required, but missing$"):
        Random()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^Random\.keep: expected .* got 0$"):
        Random(0)
    with pytest.raises(ValueError, match=r"^Stride: expected at most 3 arguments \(keep, at, per\), got one more: 7$"):
        Stride(1, 0, "image", 7)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^Random\.seed: expected a valid integer, got 1\.5$"):
        Random(1, seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^STS\.keep: .* got 0$"):
        dataclasses.replace(STS(), keep=0)


def test_a_check_of_the_pass_itself() -> None:
    @frozen_pass
    class Narrow:
        name: ClassVar[str] = "narrow"
        keep: Budget
        refine: Budget

        def __post_init__(self) -> None:
            if self.refine > self.keep:
                raise ValueError(f"expected refine <= keep, got {self.refine} and {self.keep}")

    assert Narrow(keep=4, refine=2).refine == 2
    with pytest.raises(ValueError, match=r"^Narrow: expected refine <= keep, got 4 and 2$"):
        Narrow(keep=2, refine=4)


def test_a_pass_needs_a_name() -> None:
    with pytest.raises(TypeError, match=r"Nameless: expected a class attribute `name: ClassVar\[str\]`, got None"):

        @frozen_pass
        class Nameless:
            keep: Budget

    with pytest.raises(TypeError, match="Field: expected .* got a field called 'name'"):

        @frozen_pass
        class Field:
            name: str = "field"

    with pytest.raises(TypeError, match="Inherits: expected a class attribute"):

        @frozen_pass
        class Inherits(Stride):
            pass
