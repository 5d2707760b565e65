"""Hypothesis strategies: batches, budgets and passes, for property tests of models and of passes.

    @given(strategies.rows(), strategies.sides(), strategies.pass_lists(depth=4))
    def test_agrees_with_the_oracle(rows, side, passes):
        assert vr.verify(tiny.model, tiny.inputs(rows, side=side), passes) < tolerance

Everything shrinks to one row with one image, the smallest budget and layer 0. Needs hypothesis.
"""

from __future__ import annotations

from typing import cast

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from vlmrewrite.budget import Budget, Depth
from vlmrewrite.plan import Pass
from vlmrewrite.testing.models import Row, Side


def rows(*, images: int = 1) -> SearchStrategy[list[Row]]:
    """Batches of 1 to 3 prompts with 0 to 3 images and up to 6 text tokens on each side; a text token comes last.

    Args:
        images: least number of images in the batch, 0 or 1.
    """
    row = st.builds(Row, images=st.integers(0, 3), before=st.integers(0, 6), after=st.integers(1, 6))

    def enough(batch: list[Row]) -> list[Row]:
        first = batch[0]
        if any(r.images for r in batch) or not images:
            return batch
        return [Row(images, first.before, first.after), *batch[1:]]

    return st.lists(row, min_size=1, max_size=3).map(enough)


def sides() -> SearchStrategy[Side]:
    """Where shorter rows are padded."""
    return cast("SearchStrategy[Side]", st.sampled_from(["left", "right"]))


def budgets() -> SearchStrategy[Budget]:
    """Tokens per image from 1 to 20, or a whole number of hundredths of each image's, 1.0 included."""
    return st.integers(1, 20) | st.integers(1, 100).map(lambda n: n / 100)


def depths(depth: int) -> SearchStrategy[Depth]:
    """A layer of a decoder with ``depth`` layers, by index or as a fraction of the depth in quarters of a layer."""
    return st.integers(0, depth - 1) | st.integers(0, 4 * depth - 1).map(lambda n: n / (4 * depth))


def pass_lists(depth: int) -> SearchStrategy[list[Pass]]:
    """1 to 3 of the pruning passes, in any order, with any budgets and layers of a decoder with ``depth`` layers."""
    from vlmrewrite.passes import STS, Random, Stride

    keep, at = budgets(), depths(depth)
    one: SearchStrategy[Pass] = st.one_of(
        st.builds(Stride, keep=keep, at=at),
        st.builds(Random, keep=keep, at=at, seed=st.integers(0, 9)),
        st.builds(STS, keep=keep, refine=st.none() | keep, at=at),
    )
    return st.lists(one, min_size=1, max_size=3)
