"""What policies ask for, in a call of a model, and what an error in one says."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vlmrewrite as vr
from tests.small import family
from vlmrewrite.ops import define, like_member, per_image
from vlmrewrite.passes import Stride
from vlmrewrite.plan import Plan, Policy, frozen_pass
from vlmrewrite.testing import Row, TinyVLM

SEEN: list[list[int]] = []


def first_ones(x: Tensor, member: Tensor, lengths: Tensor, keep: Tensor, shift: int = 0) -> Tensor:
    SEEN.append(list(x.shape))
    return per_image(member, lengths, keep, lambda left, k, _: torch.arange(k, device=left.device) + shift)


define(
    "first_ones(Tensor x, Tensor member, Tensor lengths, Tensor keep, int shift=0) -> Tensor", first_ones, like_member
)
FIRST: Any = torch.ops.vlm.first_ones


@frozen_pass
class First:
    """Keeps the first tokens; of ``needs``, it asks for the first one that is there."""

    name: ClassVar[str] = "first"
    needs: tuple[str, ...]
    shift: int = 0

    def refuse(self, plan: Plan) -> str | None:
        return None

    def change(self, plan: Plan) -> None:
        there = [need for need in self.needs if need in plan.features] or self.needs[-1:]
        plan.narrow(Policy("first", FIRST, (there[0],), (self.shift,)), 2, at=1)


@pytest.fixture(scope="module")
def gemma() -> TinyVLM:
    """Its projector pools, so that there are no features of the encoder for each token."""
    tiny: TinyVLM = family("gemma3")
    return tiny


WHY = "policy 'first' at layer 1 needs 'encoder_features', which is not there: .* vectors of shape"


@pytest.mark.slow
@torch.no_grad()
def test_a_need_that_a_model_cannot_give_refuses_the_pass(gemma: TinyVLM) -> None:
    inputs, passes = gemma.inputs([Row(1)]), [First(("encoder_features",)), Stride(keep=4)]
    with vr.applied(gemma.model, passes):
        SEEN.clear()
        with pytest.warns(UserWarning, match=rf"First\(.*\) does nothing: {WHY}"):
            gemma.model(**inputs)
        told, other = vr.report(gemma.model).passes
        assert other["matched"] and told["reason"].startswith("policy 'first' at layer 1 needs 'encoder_features'")
        assert SEEN == []
    with pytest.raises(ValueError, match=rf"^First\(.*\) was refused: {WHY}"):
        vr.verify(gemma.model, inputs, passes)
    assert "REFUSED First(" in str(vr.rewrite(vr.trace(gemma.model, inputs), passes))


@torch.no_grad()
def test_a_pass_that_makes_do_with_something_else_is_given_it(gemma: TinyVLM) -> None:
    inputs = gemma.inputs([Row(2)])
    SEEN.clear()
    with vr.applied(gemma.model, First(("encoder_features", "grid")), strict=True):
        gemma.model(**inputs)
    assert SEEN == [[2, 2]]


def test_an_error_in_a_policy_names_the_operator_the_policy_and_the_pass(llava: TinyVLM) -> None:
    inputs, passes = llava.inputs([Row(1)]), [Stride(keep=4), First(("features",), shift=7)]
    rewritten = vr.rewrite(vr.trace(llava.model, inputs), passes)
    for run in (rewritten.run, lambda: vr.verify(llava.model, inputs, passes)):
        with pytest.raises(IndexError, match="out of bounds") as caught:
            run()
        inner, operator, policy = caught.value.__notes__
        assert inner.startswith("in per_image, for image 0: choose(left, 2, 0)")
        assert operator.startswith("in vlm.first_ones.default, given (float32 [16, ")
        assert policy == f"in the policy 'first' at layer 1, under {passes[0]}, {passes[1]}"
    assert not hasattr(llava.model, "vlmrewrite_blocks")


def test_an_error_that_is_no_operator_s_gets_no_note(llava: TinyVLM) -> None:
    rewritten = vr.rewrite(vr.trace(llava.model, llava.inputs([Row(1)])), First(("features",)))
    assert rewritten.about("vlm.first_ones.default went wrong") == [
        f"in the policy 'first' at layer 1, under {First(('features',))}"
    ]
    assert rewritten.about("vlm.select.default went wrong") == []


def test_an_operator_that_cannot_be_run_on_shapes_is_named(llava: TinyVLM) -> None:
    def fake(*_: Any) -> Tensor:
        raise RuntimeError("no idea")

    define("shapeless(Tensor member, Tensor lengths, Tensor keep) -> Tensor", first_ones, fake)

    @frozen_pass
    class Shapeless:
        name: ClassVar[str] = "shapeless"

        def refuse(self, plan: Plan) -> str | None:
            return None

        def change(self, plan: Plan) -> None:
            plan.narrow(Policy("vague", torch.ops.vlm.shapeless), 2)

    program = vr.trace(llava.model, llava.inputs([Row(1)]))
    with pytest.raises(ValueError, match=r"^node shapeless.* \(policy 'vague' at layer 0\) does not take") as caught:
        vr.rewrite(program, Shapeless())
    assert any("Shapeless(), while rewriting to the plan:\n" in note for note in caught.value.__notes__)
