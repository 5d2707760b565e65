"""Hypothesis strategies: batches, budgets and passes, for property tests of models and of passes.

    from vlmrewrite.testing import strategies

    @given(strategies.rows(), strategies.sides(), strategies.pass_lists(depth=4))
    def test_agrees_with_the_oracle(rows, side, passes):
        assert vr.verify(tiny.model, tiny.inputs(rows, side=side), passes) < tolerance

Everything shrinks to one row with one image, the smallest budget and layer 0. Needs hypothesis: ``pip install
'vlmrewrite[testing]'``.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import DrawFn, SearchStrategy
except ModuleNotFoundError as e:
    if e.name != "hypothesis":
        raise
    raise ImportError(
        "vlmrewrite.testing.strategies needs hypothesis, which is not installed: pip install 'vlmrewrite[testing]'"
    ) from e

from vlmrewrite.plan import All, Budget, Depth, Image, Nothing, Pass, Plan, Policy, Text, TokenSet, Vision, frozen_pass
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


def techniques(depth: int) -> SearchStrategy[list[Pass]]:
    """2 or 3 of all passes that the oracle knows, in any order, for a decoder with ``depth`` layers."""
    from vlmrewrite.passes import DPVR, STS, VISOR, VTW, DivPrune, FastV, Random, ShortV, Stride, ViCA

    keep, at = budgets(), depths(depth)
    layers = st.lists(st.integers(0, depth - 1), min_size=1, unique=True).map(sorted)

    @st.composite
    def visor(draw: DrawFn) -> Pass:
        own, seen = set(draw(layers)), set(draw(layers))
        return VISOR(sorted(own), sorted(seen - own), draw(st.booleans()))

    one: SearchStrategy[Pass] = st.one_of(
        st.builds(STS, keep=keep, refine=st.none() | keep, at=at),
        st.builds(DPVR, st.integers(0, depth - 1), st.integers(0, 1), st.sampled_from(["copy", "random", "identity"])),
        visor(),
        st.builds(FastV, keep=keep, at=at),
        st.builds(DivPrune, keep=keep),
        st.builds(VTW, at=at),
        st.builds(ShortV, layers=layers),
        st.builds(ViCA, cross=layers),
        st.builds(Random, keep=keep, at=at, seed=st.integers(0, 9)),
        st.builds(Stride, keep=keep, at=at),
    )
    return st.lists(one, min_size=2, max_size=3)


@frozen_pass
class Sets:
    """A pass that tells every layer its token sets, whatever an earlier pass said.

    Args:
        layers: for each layer, the set it runs on, the one it attends to (None: the same) and the one that goes through
            its MLP (None: all that it runs on).
    """

    name: ClassVar[str] = "sets"

    layers: tuple[Any, ...]

    def refuse(self, plan: Plan) -> str | None:
        """A decoder of another depth."""
        found, wanted = plan.depth, len(self.layers)
        return None if found == wanted else f"it has sets for {wanted} layers, the decoder has {found}"

    def change(self, plan: Plan) -> None:
        """One ``run_on`` a layer, and ``attend_to`` and ``mlp_on`` where there is a set for them."""
        for layer, (run, keys, mlp) in zip(plan.layers, self.layers, strict=True):
            layer.run_on(run)
            if keys is not None:
                layer.attend_to(keys)
            if mlp is not None:
                layer.mlp_on(mlp)

    def sources(self, at: int) -> list[TokenSet]:
        """The sets of vision tokens that layers up to ``at`` name."""
        named = [s for sets in self.layers[: at + 1] for s in sets if s is not None]
        return list(dict.fromkeys(s & Vision for s in named if s & Vision != Nothing))


def plans(depth: int) -> SearchStrategy[Sets]:
    """Any plan for a decoder with ``depth`` layers: unions, intersections and differences of images and selections.

    Selections choose from such sets, other selections included. A layer's set has nothing to do with the one before:
    tokens leave and come back, keys may be more or fewer tokens than those that the layer runs on, and some of those
    may go through its attention half only.
    """

    @st.composite
    def layers(draw: DrawFn) -> Sets:
        known: list[TokenSet] = [Vision, Image(0), Image(1), Image(2)]
        sets = []
        for at in range(depth):
            for policy, keep in draw(st.lists(st.tuples(policies(), budgets()), max_size=2)):
                source = draw(_vision_sets(known))
                if source != Nothing:
                    known.append(source.select(policy, keep, at=at))
            some = _layer_sets(known)
            sets.append(draw(st.tuples(some, st.none() | some, st.none() | some)))
        return Sets(tuple(sets))

    return layers()


def policies() -> SearchStrategy[Policy]:
    """How the pruning passes choose tokens: each image's own, by features, or by attention."""
    from vlmrewrite import passes  # noqa: F401 (it defines the operators)

    ops = torch.ops.vlm
    return st.one_of(
        st.just(Policy("stride", ops.stride_sample.default)),
        st.builds(lambda seed: Policy("random", ops.random_sample.default, ("ordinal",), (seed,)), st.integers(0, 9)),
        st.just(Policy("repulsion", ops.sts_sample.default, ("features",))),
        st.just(Policy("relevance", ops.top_attention.default, ("attention",))),
    )


def _vision_sets(known: list[TokenSet]) -> SearchStrategy[TokenSet]:
    return st.recursive(
        st.sampled_from(known),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a, b: a - b, inner, inner),
            st.builds(lambda a, b: a & b, inner, inner),
        ),
        max_leaves=3,
    )


def _layer_sets(known: list[TokenSet]) -> SearchStrategy[TokenSet]:
    vision = _vision_sets(known)
    return st.one_of(
        st.sampled_from([All, Text]),
        st.builds(lambda a: Text | a, vision),
        st.builds(lambda a: All - a, vision),
        st.builds(lambda a, b: (Text | a) - b, vision, vision),
    )
