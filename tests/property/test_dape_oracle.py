"""DAPE judged by the oracle: alone and with other passes, in both modes, with blocks that have learned something."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor

import vlmrewrite as vr
from tests.small import batches, crossed, long
from tests.small import with_grid as family
from vlmrewrite.oracle import hooks, layer_masks
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, FastV
from vlmrewrite.passes.dape import blocks, ops, technique
from vlmrewrite.passes.dape.regions import density
from vlmrewrite.plan.pipeline import frozen_pass
from vlmrewrite.plan.tokens import Vision
from vlmrewrite.plan.vocabulary import Edit, Policy
from vlmrewrite.testing import models, strategies
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import Row

HALF = settings(max_examples=max(4, settings.default.max_examples // 2))
BATCH = [Row(2, 1, 3), Row(0, 4, 2), Row(1, 3, 4), Row(3, 2, 1)]
GRIDS = ["llava", "qwen2_5_vl", "gemma3", "internvl", "smolvlm"]
NEAR = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.03}


@contextlib.contextmanager
def learned(gate=0.0, seed=0, near=1e-3):
    """Blocks that have learned something; the oracle takes the regions in focus from the run, and sees that they fit.

    Which regions get detail is a discrete choice, like a selection: what is computed in another order may order two
    regions otherwise that are alike but for rounding. ``near``: how much alike, as a share of the value chosen by.
    """
    wrapped, found, played = torch.ops.vlm.dape_focus, [], []

    class Learned(blocks.Detail):
        def __init__(self, hidden):
            super().__init__(hidden)
            self.gate.data.fill_(gate)

    class Matched(blocks.Matching):
        def __init__(self, hidden):
            super().__init__(hidden)
            for p in (self.text, self.bias, self.scale, self.slope, self.visual):
                p.data.normal_(0, 0.5)

    def focus(attention, features, owner, member, lengths, share):
        if isinstance(attention, FakeTensor):
            return wrapped(attention, features, owner, member, lengths, share)
        # By its name: to a function mode, as the oracle's, the operator is what stands in its place, this function.
        chosen = ops.dape_focus(attention, features, owner, member, lengths, share)
        if hooks._STATE.get(None) and not found:  # a kernel does not ask here
            return chosen
        if not hooks._STATE.get(None):
            found.append(chosen)
            return chosen
        of_the_run = found[len(played) % len(found)]
        played.append(of_the_run)
        value = torch.where(member, attention * density(features, owner), 0.0)
        for v, mine, theirs in zip(*(x.split(lengths.tolist()) for x in (value, chosen, of_the_run)), strict=True):
            assert int(mine.sum()) == int(theirs.sum())
            if mine.any():
                assert v[theirs].min() >= v[mine].min() * (1 - near)
        return of_the_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.vlm, "dape_focus", focus)
        patch.setattr(technique, "Detail", Learned)
        patch.setattr(technique, "Matching", Matched)
        torch.manual_seed(seed)
        yield


def dapes(least=4, most=36):
    shares = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), max_size=3).map(tuple)
    budget = st.integers(least, most) | st.integers(50, 100).map(lambda n: n / 100)
    return st.builds(
        DAPE,
        budget=budget,
        detail=shares,
        mode=st.sampled_from(["split", "inject"]),
        matching=st.sampled_from(["free", "learned"]),
    )


gates = st.sampled_from([0.0, 0.4, -1.0, 3.0])


@st.composite
def compositions(draw):
    others = draw(strategies.techniques(4))[: draw(st.integers(1, 2))]
    return draw(st.permutations([draw(dapes()), *others]))


@pytest.mark.slow
@given(dapes(), gates, batches(), strategies.sides(), st.integers(0, 99), st.booleans())
@example(DAPE(budget=4, detail=(0.25, 0.5), mode="inject"), 0.4, BATCH, "left", 0, True)
@example(DAPE(budget=4, detail=(0.1, 0.25), mode="inject"), 0.4, BATCH, "left", 0, False)
def test_forward(p, gate, rows, side, seed, double):
    dtype = torch.float64 if double else torch.float32
    tiny = family("llava", dtype)
    inputs = tiny.inputs(rows, side=side, seed=seed)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with learned(gate, seed, NEAR[dtype]):
        forward_agreement(tiny.model, inputs, [p], strict=True).check()


@HALF
@given(dapes(), gates, batches(), strategies.sides(), st.integers(1, 4), st.integers(0, 99))
def test_generation(p, gate, rows, side, new_tokens, seed):
    tiny = family("llava")
    with learned(gate, seed):
        generation_agreement(tiny.model, tiny.inputs(rows, side=side, seed=seed), [p], new_tokens).check()


@example([DAPE(budget=4, detail=(1.0, 0.25)), STS(keep=1, refine=None)], 0.4, BATCH, "left", 0)
@given(compositions(), gates, batches(), strategies.sides(), st.integers(0, 99))
def test_compositions(passes, gate, rows, side, seed):
    tiny = family("llava")
    with learned(gate, seed):
        generation_agreement(tiny.model, tiny.inputs(rows, side=side, seed=seed), passes, 2, strict=False).check()


@pytest.mark.parametrize("name", GRIDS[1:] if long() else ["qwen2_5_vl", "smolvlm"])
def test_other_families(name):
    tiny = family(name)

    @settings(max_examples=max(3, settings.default.max_examples // 7))
    @given(dapes(least=1, most=12), gates, strategies.sides(), st.integers(0, 99))
    def agrees(p, gate, side, seed):
        inputs = tiny.inputs(BATCH, side=side, seed=seed)
        with learned(gate, seed):
            if long() or name == "qwen2_5_vl":
                generation_agreement(tiny.model, inputs, [p], 2).check()
            else:
                forward_agreement(tiny.model, inputs, [p]).check()

    agrees()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if long() else [torch.bfloat16], ids=str)
def test_sixteen_bits(dtype):
    tiny = family("llava", dtype)

    @settings(max_examples=max(3, settings.default.max_examples // 4))
    @given(dapes(), gates, strategies.sides(), st.integers(0, 99))
    def agrees(p, gate, side, seed):
        inputs = tiny.inputs(BATCH, side=side, seed=seed)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with learned(gate, seed, NEAR[dtype]):
            forward_agreement(tiny.model, inputs, [p]).check()

    agrees()


FIXED = {
    "recipe": "dape-half",
    "inject": [DAPE(budget=9, mode="inject")],
    "learned": [DAPE(budget=9, mode="inject", matching="learned")],
    "visor": [VISOR([0, 2], [1]), DAPE(budget=9, mode="inject", matching="learned")],
    "dpvr": [DAPE(budget=9, mode="inject"), DPVR(at=2)],
    "fastv": [DAPE(budget=9), FastV(keep=3, at=2)],
}


@pytest.mark.parametrize("recipe", FIXED.values(), ids=FIXED)
def test_verify(recipe):
    tiny = family("llava")
    with learned(0.5):
        assert vr.verify(tiny.model, tiny.inputs(BATCH), recipe, strict=True) < 1e-4


@torch.no_grad()
def test_verify_judges_the_blocks_that_are_there():
    tiny = family("llava")
    inputs = tiny.inputs(BATCH)
    with vr.applied(tiny.model, [DAPE(budget=9, mode="inject", matching="learned")]) as model:
        before = model(**inputs).logits
        for name, p in model.named_parameters():
            if name.endswith(".gate"):
                p.data.fill_(0.7)
        after = model(**inputs).logits
        assert vr.verify(model, inputs) < 1e-4
        assert torch.equal(model(**inputs).logits, after)
        assert (after - before).abs().max() > 1e-3
        with pytest.raises(ValueError, match="no call with an image"):
            vr.verify(model, {"input_ids": inputs["input_ids"][1:2, -6:]})
    with pytest.raises(ValueError, match="is not rewritten"):
        vr.verify(model, inputs)


# ---- the oracle would see a mistake


def wrong_by_one_percent(hidden, index, valid, *rest):
    return torch.ops.vlm.dape_pool(hidden, index, valid, *rest) * 1.01


def of_the_neighbours(hidden, index, valid, *rest):
    return torch.ops.vlm.dape_pool(hidden, index, valid, *rest).roll(1, 1)


def on_the_stream_as_it_is(hidden, index, valid, *rest):
    return hidden


@pytest.mark.parametrize(
    ("wrong", "at"),
    [(wrong_by_one_percent, 0), (wrong_by_one_percent, 1), (of_the_neighbours, 0), (on_the_stream_as_it_is, 0)],
)
def test_a_wrong_edit_is_seen(wrong, at):
    tiny, inputs = family("llava"), family("llava").inputs(BATCH)
    with torch.no_grad(), vr.applied(tiny.model, [DAPE(budget=9)]) as model:
        got, masks = model(**inputs).logits, layer_masks(model)
    (edit,) = masks[at].edits
    other = [*masks]
    other[at] = replace(masks[at], edits=(replace(edit, edit=replace(edit.edit, op=wrong)),))
    real = inputs["attention_mask"].bool()
    right, false = (hooks.oracle_logits(tiny.model, inputs, m)[real] for m in (masks, other))
    error = (got[real] - right).abs().max()
    assert (got[real] - false).abs().max() > 100 * error


def telling(seen):
    def tell(hidden, index, valid, *inputs):
        seen.append((index, valid, *inputs))
        return hidden.clone()

    return tell


NEEDS = ("attention", "attention_outside", "features", "stream", "text", "prompt", "flat", "lengths", "grid", "ordinal")


@frozen_pass
class Telling:
    """Ask for facts at layer 2, about a quarter of the tokens."""

    name: ClassVar[str] = "telling"

    op: Any
    needs: tuple[str, ...] = NEEDS

    def refuse(self, plan):
        return None

    def change(self, plan):
        some = Vision.select(Policy("stride", torch.ops.vlm.stride_sample.default), 9)
        plan.edit(Edit("telling", some, self.op, 2, self.needs))


@pytest.mark.wide
@pytest.mark.parametrize(("name", "side"), crossed(GRIDS, ["left", "right"]))
def test_what_an_edit_is_told_is_what_the_oracle_finds(name, side):
    tiny, seen = family(name), []
    inputs = tiny.inputs(BATCH, side=side)
    assert vr.verify(tiny.model, inputs, [Telling(telling(seen))]) < 1e-4
    (index, valid, *theirs), (at, real, *mine) = seen
    assert torch.equal(valid.sum(1), real.sum(1))
    for a, v, b, r in zip(index, valid, at, real, strict=True):
        assert torch.equal(a[v], b[r])
    for need, a, b in zip(NEEDS, theirs, mine, strict=True):
        padded = inputs["attention_mask"][..., None] if need == "stream" else 1
        torch.testing.assert_close(a * padded, b * padded, msg=f"{need}: {a} and {b}", atol=1e-4, rtol=1e-4)
    assert theirs[0].max() > 0.01
    assert not (theirs[0] * theirs[1]).any()
    assert len(theirs[0]) == len(theirs[2]) == len(theirs[6])


def test_what_the_oracle_cannot_find():
    tiny = family("llava")
    inputs, seen = tiny.inputs(BATCH), []
    with torch.no_grad(), vr.applied(tiny.model, [Telling(telling(seen), ("encoder_features",))]) as model:
        model(**inputs)
        masks = layer_masks(model)
    assert seen[0][2].shape == (6 * 36, models.HIDDEN)
    hooks.oracle_logits(tiny.model, inputs, masks)
    assert torch.equal(seen[0][2], seen[1][2])
    masks[2].edits[0].call.encoder_features = None
    with pytest.raises(NotImplementedError, match="cannot find 'encoder_features' on this model"):
        hooks.oracle_logits(tiny.model, inputs, masks)
