"""What policies and edits ask for: it is there when the plan is made, and goes where the operator takes it."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vlmrewrite.ops import define, like_member, per_image
from vlmrewrite.passes import DAPE, STS, Stride
from vlmrewrite.plan import NEEDS, Edit, Plan, Policy, Vision, frozen_pass, run_passes

OPTIONAL = sorted(name for name, need in NEEDS.items() if need.optional)


def louder(features: Tensor, attention: Tensor, member: Tensor, lengths: Tensor, keep: Tensor, power: float) -> Tensor:
    score = features.float().norm(dim=1) * attention**power
    return per_image(member, lengths, keep, lambda left, k, _: score[left].argsort(descending=True, stable=True)[:k])


define(
    "louder(Tensor features, Tensor attention, Tensor member, Tensor lengths, Tensor keep, float power) -> Tensor",
    louder,
    like_member,
)

LOUDER: Any = torch.ops.vlm.louder


@frozen_pass
class Asking:
    """Says one thing, and looks at nothing before."""

    name: ClassVar[str] = "asking"
    need: str
    edits: bool = False

    def refuse(self, plan: Plan) -> str | None:
        return None

    def change(self, plan: Plan) -> None:
        if self.edits:
            plan.edit(Edit("mine", Vision, lambda hidden, *_: hidden, 1, (self.need,)))
        else:
            plan.narrow(Policy("mine", lambda *args: args[1], (self.need,)), 3, at=1)


# ---- what is not there


@pytest.mark.parametrize("edits", [False, True], ids=["policy", "edit"])
@pytest.mark.parametrize("need", NEEDS)
def test_a_pass_is_refused_if_what_it_asks_for_is_not_there(need: str, edits: bool) -> None:
    bare = Plan(4, refusals={"grid": "the grid is a secret"})
    who = f"{'edit' if edits else 'policy'} 'mine' at layer 1 needs {need!r}, which is not there: "
    why = {"grid": "the grid is a secret", "encoder_features": "the plan was made with features=[]"}
    plan, (outcome,) = run_passes(bare, [Asking(need, edits)])
    assert outcome.reason == (who + why[need] if need in OPTIONAL else None)
    assert outcome.changed is (need not in OPTIONAL) is (str(plan) != str(bare))
    if need in OPTIONAL:
        with pytest.raises(ValueError, match=r"^Asking\(.*\) was refused: .* needs"):
            run_passes(bare, [Asking(need, edits)], strict=True)
    plan, (outcome,) = run_passes(Plan(4, frozenset(OPTIONAL)), [Asking(need, edits)], strict=True)
    assert outcome.reason is None and plan.needs() == {need}


def test_the_other_passes_go_on() -> None:
    plan, outcomes = run_passes(Plan(4), [Asking("grid"), Stride(keep=4), Asking("ordinal")])
    assert [o.reason is None for o in outcomes] == [False, True, True]
    assert plan.needs() == {"ordinal"}


def test_a_plan_made_by_hand_is_checked() -> None:
    plan = Plan(4)
    plan.narrow(Policy("mine", lambda *args: args[1], ("encoder_features",)), 3)
    with pytest.raises(ValueError, match="policy 'mine' at layer 0 needs 'encoder_features', which is not there"):
        plan.check()


def test_what_a_pass_says_itself_comes_first() -> None:
    for p, need in ((STS(features="encoder"), "encoder_features"), (DAPE(), "grid")):
        _, (outcome,) = run_passes(Plan(8, refusals={need: "none"}), [p])
        assert outcome.reason == "none"


# ---- what an operator takes


def test_the_name_of_an_operator_is_enough() -> None:
    short = Policy("louder", LOUDER, ("features", "attention"), (1.0,))
    assert short == Policy("louder", LOUDER.default, ("features", "attention"), (1.0,))
    assert short.op is LOUDER.default
    assert Policy("mine", len).op is len


@pytest.mark.parametrize(
    ("needs", "options", "message"),
    [
        (("attention", "features"), (1.0,), "'attention' as the argument 'features'; expected `needs` in the order of"),
        (("features", "attention"), (), r"5 arguments; expected 6, as vlm::louder\(Tensor features, "),
        (("features",), (1.0,), r"\(features, member, lengths, keep, 1.0\), 5 arguments; expected 6"),
        (("features", "attention"), (1.0, 2.0), "7 arguments; expected 6"),
    ],
    ids=["swapped", "option forgotten", "need forgotten", "option too many"],
)
def test_what_an_operator_does_not_take(needs: tuple[str, ...], options: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^policy 'mine' gives its operator .*{message}"):
        Policy("mine", LOUDER, needs, options)
    with pytest.raises(ValueError, match=r"^edit 'mine' gives its operator \(hidden, index, valid\), 3 arguments"):
        Edit("mine", Vision, LOUDER, 0)


def test_arguments_that_have_a_value_may_be_left_out() -> None:
    define("asked_by_default(Tensor member, Tensor lengths, Tensor keep, int seed=0) -> Tensor", louder, like_member)
    op: Any = torch.ops.vlm.asked_by_default
    assert Policy("mine", op).options == () and Policy("mine", op, options=(3,)).options == (3,)
    with pytest.raises(ValueError, match="5 arguments; expected 3 to 4, as vlm::asked_by_default"):
        Policy("mine", op, options=(3, 4))


def test_an_error_of_a_pass_names_it_and_its_policy() -> None:
    @frozen_pass
    class Forgetful:
        name: ClassVar[str] = "forgetful"

        def refuse(self, plan: Plan) -> str | None:
            return None

        def change(self, plan: Plan) -> None:
            plan.narrow(Policy("mine", LOUDER, ("features", "attention")), 3)

    with pytest.raises(ValueError, match="^policy 'mine' gives its operator") as caught:
        run_passes(Plan(4), [Forgetful()])
    [note] = caught.value.__notes__
    assert note.startswith("in pass ") and "Forgetful(), on the plan:\n" in note


# ---- the shape of what it returns

MEMBER = torch.tensor([True, True, False, True, True])
LENGTHS, KEEP = torch.tensor([3, 2]), torch.tensor([1, 1])


def test_one_fake_serves_any_inputs_and_options() -> None:
    arguments = torch.rand(5, 4), torch.rand(5), MEMBER, LENGTHS, KEEP, 2.0
    torch.library.opcheck(LOUDER.default, arguments)
    assert like_member(MEMBER, LENGTHS, KEEP).dtype == torch.bool
    text = torch.ones(2, 9, dtype=torch.bool)
    assert like_member(torch.rand(5), text, MEMBER, LENGTHS, KEEP, "word").shape == (5,)


@pytest.mark.parametrize("arguments", [(torch.rand(5), LENGTHS), (MEMBER, MEMBER, LENGTHS)], ids=["none", "two"])
def test_the_fake_says_if_it_cannot_know(arguments: tuple[Tensor, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"expects .*`member`, is bool \[F\], got \(.* \[5\].*\); give `define` a fake"
    ):
        like_member(*arguments)


# ---- errors inside an operator


@pytest.mark.parametrize(
    ("choose", "kind", "message"),
    [
        (lambda left, k, i: left[:k] + 1, IndexError, "out of bounds"),
        (lambda left, k, i: torch.rand(k), IndexError, "used as indices"),
        (lambda left, k: left[:k], TypeError, "positional argument"),
    ],
    ids=["tokens for positions", "numbers for positions", "too few arguments"],
)
def test_an_error_in_per_image_says_what_was_expected(choose: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        per_image(MEMBER, LENGTHS, KEEP, choose)
    [note] = caught.value.__notes__
    assert re.fullmatch(r"in per_image, for image [01]: choose\(left, 1, [01]\) with int64 \[2\] .* in 0 .. 1", note)


def test_an_error_in_an_operator_says_which_and_what_it_was_given() -> None:
    with pytest.raises(IndexError) as caught:
        LOUDER(torch.rand(5), torch.rand(5), MEMBER, LENGTHS, KEEP, 1.0)
    assert caught.value.__notes__ == [
        "in vlm.louder.default, given (float32 [5], float32 [5], bool [5], int64 [2], int64 [2], 1.0)"
    ]
