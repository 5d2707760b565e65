"""What somebody does who writes a first pass: look, judge, change it, look again. Nothing is passed over in silence."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import vlmrewrite as vr
from vlmrewrite import ops
from vlmrewrite.ops import define, like_member, per_image
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, VTW, FastV, Random, Stride
from vlmrewrite.plan import Plan, Policy, Selection, Text, Vision, frozen_pass
from vlmrewrite.runtime import last_call
from vlmrewrite.testing import FAMILIES, Row, Sets, forward_agreement, generation_agreement

ONE = [Row(1, 2, 3)]
BATCH = [Row(1, 2, 3), Row(2, 4, 1), Row(0, 3, 3)]
SCHEMA = "(Tensor features, Tensor member, Tensor lengths, Tensor keep) -> Tensor"


@frozen_pass
class Moody:
    """Refuses, or does nothing and forgets to say so."""

    name: ClassVar[str] = "moody"
    reason: str | None = None

    def refuse(self, plan: Plan) -> str | None:
        return self.reason

    def change(self, plan: Plan) -> None:
        pass


NEVER = Moody("the moon is full")


@pytest.fixture(scope="module")
def program(llava):
    return vr.trace(llava.model, llava.inputs(ONE))


# ---- a pass that is refused


def listed(program, passes):
    return str(vr.rewrite(program, passes)).splitlines()


def test_the_listing_says_who_was_refused_and_why(program):
    head, *plain = str(program).splitlines()
    told = "REFUSED Moody(reason='the moon is full'): the moon is full"
    assert listed(program, [NEVER]) == [head, told, *plain]
    lines = listed(program, [Stride(keep=4), NEVER, Stride(keep=2, at=2)])
    assert lines[1:4] == [
        told,
        "stride = Vision.select(stride, keep=4) at layer 0",
        "stride2 = stride.select(stride, keep=2) at layer 2",
    ]
    assert listed(vr.rewrite(program, [NEVER]), [Stride(keep=4)])[1] == told
    told = "REFUSED FastV(keep=0.5, at=2, per='image'): an earlier pass leav"
    assert listed(program, [VTW(at=1), FastV(at=2)])[1].startswith(told)


KEEPING = [
    Stride(keep=1.0),
    Random(keep=1.0, at=2),
    STS(keep=1.0, refine=1.0),
    DAPE(budget=1.0),
    VISOR(self_layers=1.0),
    VISOR(self_layers=(0, 1, 2, 3)),
]
"""Passes that say to keep everything."""


@pytest.mark.parametrize("p", KEEPING, ids=str)
def test_a_pass_that_keeps_everything_is_told_and_judged(llava, program, p):
    head, *plain = str(program).splitlines()
    assert listed(program, [p]) == [head, f"CHANGES NOTHING: {p}", *plain]
    assert listed(program, [p, Stride(keep=4)])[1] == f"CHANGES NOTHING: {p}"
    assert "CHANGES NOTHING" not in str(vr.rewrite(program, [Stride(keep=4)]))
    assert vr.rewrite(program, [p], strict=True).outcomes[0].changed is False


def test_the_report_says_that_a_pass_keeps_everything(llava):
    inputs = llava.inputs(ONE)
    assert vr.verify(llava.model, inputs, Stride(keep=1.0)) < 1e-4
    with vr.applied(llava.model, [Stride(keep=1.0), Stride(keep=4)], strict=True), torch.no_grad():
        llava.model(**inputs)
        report = vr.report(llava.model)
    assert "  Stride(keep=1.0, at=0, per='image'): matched, CHANGES NOTHING\n" in str(report)
    assert "  Stride(keep=4, at=0, per='image'): matched\n" in str(report)
    assert [told["changed"] for told in report.to_dict()["passes"]] == [False, True]


SILENT = "its `change` says nothing to the plan"


def test_a_pass_whose_change_says_nothing_is_refused(llava, program):
    inputs = llava.inputs(ONE)
    assert listed(program, [Moody()])[1] == f"REFUSED Moody(reason=None): {SILENT}"
    assert listed(program, [Stride(keep=4), Moody()])[1] == f"REFUSED Moody(reason=None): {SILENT}"
    for passes in ([Moody()], [Stride(keep=4), Moody()]):
        with pytest.raises(ValueError, match=rf"^Moody\(.*\) was refused: {SILENT} \(strict=False"):
            vr.verify(llava.model, inputs, passes)
        with pytest.raises(ValueError, match=SILENT):
            forward_agreement(llava.model, inputs, passes)
    with pytest.warns(UserWarning, match=f"does nothing: {SILENT}"):
        assert vr.verify(llava.model, inputs, [Stride(keep=4), Moody()], strict=False) < 1e-3


def test_without_a_call_and_of_a_dispatch(program):
    assert "REFUSED Moody" in str(vr.rewrite(replace(program, call=None), NEVER))
    chosen = VISOR(policy="confidence", chain=[{"cross_layers": [1]}, {"self_layers": [1]}])
    assert listed(program, [chosen, NEVER])[1].startswith("REFUSED Moody(")


def test_verify_raises_on_a_pass_that_is_refused(llava):
    inputs = llava.inputs(ONE)
    for passes in ([NEVER], [Stride(keep=4), NEVER], NEVER):
        with pytest.raises(ValueError, match=r"^Moody\(.*\) was refused: the moon is full \(strict=False"):
            vr.verify(llava.model, inputs, passes)
        for agreement in (forward_agreement, generation_agreement):
            with pytest.raises(ValueError, match="was refused: the moon is full"):
                agreement(llava.model, inputs, passes)
    with pytest.raises(ValueError, match="not rewritten"):
        vr.report(llava.model)
    with pytest.warns(UserWarning, match="the moon is full"):
        assert vr.verify(llava.model, inputs, [Stride(keep=4), NEVER], strict=False) < 1e-3
    with pytest.warns(UserWarning, match="the moon is full"):
        forward_agreement(llava.model, inputs, [NEVER], strict=False).check()


def test_verify_of_an_applied_recipe_raises_too(llava):
    inputs = llava.inputs(ONE)
    with vr.applied(llava.model, [NEVER, Stride(keep=4)]):
        with pytest.warns(UserWarning, match="the moon is full"):
            llava.model(**inputs)
        with pytest.raises(ValueError, match=r"^Moody\(.*\) was refused: the moon is full \(strict=False"):
            vr.verify(llava.model, inputs)
        assert vr.verify(llava.model, inputs, strict=False) < 1e-3
        with pytest.raises(ValueError, match="expected backend with a recipe to apply, got no recipe"):
            vr.verify(llava.model, inputs, backend="eager")


# ---- a cell that runs again


def cell(name, first, fake):
    """A notebook's cell that defines an operator, which keeps the tokens of the one image from ``first`` on."""
    code = (
        "def reference(features, member, lengths, keep):\n"
        "    rank = member.cumsum(0) - 1\n"
        f"    return member & (rank >= {first}) & (rank < {first} + keep[0])\n"
        f"define({name + SCHEMA!r}, reference, fake)"
    )
    exec(code, {"__name__": __name__, "define": define, "fake": fake})


@frozen_pass
class Mine:
    """Keeps what an operator of this module chooses."""

    name: ClassVar[str] = "mine"
    operator: str
    keep: vr.Budget

    def refuse(self, plan: Plan) -> str | None:
        return None

    def change(self, plan: Plan) -> None:
        op = getattr(torch.ops.vlm, self.operator).default
        plan.narrow(Policy("mine", op, ("features",)), self.keep)


def chosen(model):
    [kept] = last_call(model)[2].values()
    return kept.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("fake", [like_member, None], ids=["opaque", "seen through"])
@torch.no_grad()
def test_what_was_made_before_takes_the_new_definition(llava, program, fake):
    """A recipe that is applied and a rewritten program: both run again with the operator as it is now."""
    name, inputs = f"cell_{fake is None}", llava.inputs(ONE)
    cell(name, 0, fake)
    rewritten = vr.rewrite(program, [Mine(name, 3)])
    first = rewritten.run()
    with vr.applied(llava.model, [Mine(name, 3)]):
        assert torch.equal(llava.model(**inputs).logits, first[0][program.anatomy.logits])
        assert chosen(llava.model) == [0, 1, 2]
        cell(name, 5, fake)
        out = llava.model(**inputs).logits
        assert chosen(llava.model) == [5, 6, 7]
        assert vr.verify(llava.model, inputs) < 1e-3
    again = rewritten.run()
    assert again[1][0].nonzero()[:, 0].tolist() == [5, 6, 7]
    assert torch.equal(again[0][program.anatomy.logits], out)
    assert not torch.equal(again[0][program.anatomy.logits], first[0][program.anatomy.logits])
    with pytest.raises(ValueError, match="is defined already, as"):
        define(f"{name}(Tensor features, Tensor member) -> Tensor", torch.add, fake)
    assert vr.verify(llava.model, inputs, [Mine(name, 2)]) < 1e-3


def test_the_words_for_policies_say_what_they_take():
    for word in (define, per_image, like_member, ops.greedy_flops, ops.select, ops.token_index):
        assert word.__name__ in ops.__all__
        text = inspect.getdoc(word)
        for parameter in inspect.signature(word).parameters.values():
            assert parameter.name in text, f"{word.__name__} says nothing of {parameter.name}"
    for word in (per_image, like_member, ops.greedy_flops):
        assert {"Args:", "Returns:"} <= set(inspect.getdoc(word).split())


# ---- the encoder's features


@pytest.mark.parametrize("family", ["llava", "llava_qwen2", "internvl", "gemma3"])
@torch.no_grad()
def test_the_encoder_s_features_can_be_tried_in_a_trace(family):
    tiny = FAMILIES[family]()
    inputs, seen = tiny.inputs(BATCH), []
    hook = tiny.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    program = vr.trace(tiny.model, inputs)
    hook.remove()
    recipe = [STS(keep=3, refine=None, features="encoder")]
    if family == "gemma3":  # its projector pools: one vector in, fewer out
        refused = listed(program, recipe)[1]
        assert refused.startswith("REFUSED STS(") and "vectors of shape" in refused
        return
    [encoded] = seen
    assert torch.equal(program.call.encoder_features, encoded.flatten(0, -2))
    rewritten = vr.rewrite(program, recipe)
    assert not [o for o in rewritten.outcomes if o.reason]
    [kept] = rewritten.run()[1]
    with vr.applied(tiny.model, recipe, strict=True):
        tiny.model(**inputs)
        assert chosen(tiny.model) == kept.nonzero()[:, 0].tolist()
    assert "get_image_features" not in vars(tiny.model.base_model)
    assert not [m for m in tiny.model.modules() if m._forward_pre_hooks]


def test_a_trace_without_pixels_says_that_they_are_missing(llava):
    inputs = llava.inputs(ONE)
    encoded = {"image": llava.model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    program = vr.trace(llava.model, inputs | {"mm_encoder_outputs": encoded})
    line = listed(program, [STS(keep=3, features="encoder")])[1]
    assert line.endswith(
        "the images were given encoded, and what went into the projector is not known: give their pixels"
    )


def test_a_trace_on_the_meta_device():
    tiny = FAMILIES["llava"]()
    inputs = {name: x.to("meta") for name, x in tiny.inputs(ONE).items()}
    program = vr.trace(tiny.model.to("meta"), inputs)
    text = str(vr.rewrite(program, [STS(keep=3, refine=None, features="encoder")]))
    assert "REFUSED" not in text
    assert "repulsion = Vision.select(repulsion, keep=3) at layer 0" in text


# ---- one token, and all of them


def test_one_token_and_all_tokens_are_two_selections(llava, program):
    policy = Policy("stride", torch.ops.vlm.stride_sample.default)
    one, everything = Vision.select(policy, 1), Vision.select(policy, 1.0)
    assert one != everything
    assert one == Vision.select(policy, 1)
    assert len({one, everything, Vision.select(policy, 1), Vision.select(policy, 1.0)}) == 2
    layers = ((Text | one, None, None), (Text | everything, None, None), (Text | one, None, None), (Text, None, None))
    assert isinstance(one, Selection)
    rewritten = vr.rewrite(program, [Sets(layers)])
    assert [row.run for row in rewritten.costs(program.call.counts)] == [6, 21, 6, 5]
    assert vr.verify(llava.model, llava.inputs(ONE), [Sets(layers)]) < 1e-3


def test_blocks_of_one_budget_are_not_those_of_another(tmp_path):
    tiny = FAMILIES["llava"]()
    with vr.applied(tiny.model, [DPVR(at=2, fuse=1), Stride(keep=1)]):
        vr.save_blocks(tiny.model, tmp_path)
    refused = pytest.raises(ValueError, match=r"belong to the passes \[DPVR.*Stride\(keep=1, at=0, per='image'\)\]")
    with vr.applied(tiny.model, [DPVR(at=2, fuse=1), Stride(keep=1.0)]), refused:
        vr.load_blocks(tiny.model, tmp_path)
    with vr.applied(tiny.model, [DPVR(at=2, fuse=1), Stride(keep=1)]):
        vr.load_blocks(tiny.model, tmp_path)


def test_a_pass_that_needs_a_grid_is_judged_where_there_is_one():
    """What refuses for lack of a fact about the images is told by all: the listing, verify and the kit."""
    tiny = FAMILIES["llava_next"]()
    inputs = tiny.inputs(ONE)
    reason = "not a square grid"
    assert reason in listed(vr.trace(tiny.model, inputs), [DAPE()])[1]
    with pytest.raises(ValueError, match=reason):
        vr.verify(tiny.model, inputs, [DAPE()])
