"""DPVR: vision tokens that leave, go through a block of their own, and come back; and blocks that are trained."""

from __future__ import annotations

import pytest
import torch

import vlmrewrite as vr
from tests.small import family, planned
from vlmrewrite.passes import DPVR, STS, FastV, Stride, ViCA
from vlmrewrite.plan.blocks import ATTRIBUTE, LayerCopy
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.tokens import Text, Vision
from vlmrewrite.testing.agreement import generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row

MODELS = {name: family(name) for name in FAMILIES}
TINY = MODELS["llava"]
NO_IMAGE = torch.tensor([[3, 4, 5]])
ROWS = [Row(1, 2, 3), Row(0, 3, 3), Row(3, 1, 3)]


def test_plan():
    assert planned(DPVR(at=0.5, fuse=2)) == (
        "branch Vision from layer 4 to 6 through dpvr, a layer like 4 (copy)\n"
        "layers 0-3     run_on All\n"
        "layers 4-5     run_on Text\n"
        "layers 6-7     run_on All"
    )


def test_plan_with_pruning_before_and_inside():
    assert planned(STS(keep=9, refine=3, at=5), DPVR(at=4, branch="identity")) == (
        "repulsion = Vision.select(repulsion, keep=9) at layer 0\n"
        "relevance = repulsion.select(relevance, keep=3) at layer 5\n"
        "branch repulsion from layer 4 to 7 through nothing\n"
        "layers 0-3     run_on Text | repulsion\n"
        "layers 4-6     run_on Text\n"
        "layer 7        run_on Text | relevance"
    )


def test_what_a_later_layer_selects_leaves_unselected():
    assert planned(ViCA(cross=[1]), FastV(keep=1, at=1), DPVR(at=0, fuse=0), depth=2) == (
        "branch Vision from layer 0 to 2 through dpvr, a layer like 0 (copy)\nlayers 0-1     run_on Text"
    )


def test_refused():
    plan = Plan(8)
    for entry in plan.layers[3:]:
        entry.run_on(Text)
    assert DPVR(at=4).refuse(plan) == "an earlier pass leaves no vision tokens from layer 4 on"
    plan = Plan(8)
    DPVR(at=2, fuse=2, branch="identity").change(plan)
    assert DPVR(at=4).refuse(plan) == "a branch from layer 4 to 7 would cross the one from 2 to 6"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPVR(fuse=-1), "DPVR.fuse: .*greater than or equal to 0, got -1"),
        (lambda: DPVR(branch="copies"), "DPVR.branch: expected 'copy', 'random' or 'identity', got 'copies'"),
        (lambda: DPVR(at=1.5), r"DPVR\.at: expected an int .* depth\) or 'auto', got 1\.5"),
        (
            lambda: vr.apply(TINY.model, [DPVR(at=3, fuse=2)]),
            "fuse=2 would bring .* back before layer 3.*fuse in 0 .. 1",
        ),
        (lambda: vr.apply(TINY.model, [DPVR(fuse=9)]), "fuse=9 would bring"),
        (lambda: vr.apply(TINY.model, [DPVR(at=4)]), r"expected a layer in 0 \.\. 3"),
        (lambda: vr.apply(TINY.model, [DPVR(at="auto")]), "measures the layers; expected calibration=inputs"),
        (
            lambda: vr.apply(TINY.model, [DPVR(at="auto", calibration={"input_ids": torch.tensor([[3, 4]])})]),
            "no image",
        ),
    ],
)
def test_bad_input(make, message):
    before = {name: id(p) for name, p in TINY.model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        make()
    assert {name: id(p) for name, p in TINY.model.named_parameters()} == before
    assert "forward" not in TINY.model.__dict__


def test_branches_say_what_is_wrong():
    with pytest.raises(ValueError, match="branch expects a set of vision tokens, got Text"):
        Plan(4).branch(Text, 1, 3)
    with pytest.raises(ValueError, match="a branch that leaves at layer 2 rejoins at 2 .. 4, got 5"):
        Plan(4).branch(Vision, 2, 5)
    plan = Plan(4)
    plan.block(LayerCopy(0))
    with pytest.raises(ValueError, match="there is a block 'block' already"):
        plan.block(LayerCopy(0))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True)) and torch.equal(
        a.sequences, b.sequences
    )


@pytest.mark.parametrize("nothing", [DPVR(at=3, branch="identity"), DPVR(at=0, fuse=4, branch="identity")])
def test_a_branch_over_no_layers_is_the_original(nothing):
    inputs, how = TINY.inputs(ROWS), {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    with vr.applied(TINY.model, [Stride(keep=1.0)]):
        expected = TINY.model.generate(**inputs, **how)
    with vr.applied(TINY.model, [nothing]):
        assert same(TINY.model.generate(**inputs, **how), expected)


def test_a_prompt_without_an_image_is_untouched():
    inputs = {"input_ids": NO_IMAGE}
    expected = TINY.model(**inputs).logits
    with vr.applied(TINY.model, [DPVR(at=1)]):
        torch.testing.assert_close(TINY.model(**inputs).logits, expected)


def test_kv_lengths():
    found = generation_agreement(TINY.model, TINY.inputs([Row(1, 2, 3)]), [DPVR(at=1, fuse=1)], new_tokens=3)
    vision = int((TINY.inputs([Row(1, 2, 3)])["input_ids"] == TINY.model.config.image_token_id).sum())
    length = TINY.inputs([Row(1, 2, 3)])["input_ids"].shape[1] + 2
    assert found.kv_lengths == [length, length - vision, length - vision, length]


def test_the_block_is_part_of_the_model_until_it_is_restored():
    model = FAMILIES["llava"]().model
    names = set(model.state_dict())
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    vr.apply(model, [DPVR(at=1)])
    added = set(model.state_dict()) - names
    assert all(n.startswith(f"{ATTRIBUTE}.dpvr.") for n in added)
    own = model.get_submodule(f"{ATTRIBUTE}.dpvr").state_dict()
    assert all(torch.equal(p, model.get_decoder().layers[1].state_dict()[n]) for n, p in own.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == added
    assert "dpvr, a layer like 1 (copy)" in planned(DPVR(at=1, fuse=1), depth=4)
    model.to(torch.bfloat16)
    assert getattr(model, ATTRIBUTE).dpvr.self_attn.q_proj.weight.dtype == torch.bfloat16
    model.float()
    vr.restore(model)
    assert set(model.state_dict()) == names
    assert {n for n, p in model.named_parameters() if p.requires_grad} == learning


def answers(inputs):
    """Labels for the last two tokens of each row; the text token behind an image is predicted by a vision token."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    return labels


@pytest.mark.slow
@pytest.mark.parametrize(("fuse", "learns"), [(1, True), (0, False)])
def test_only_the_branch_learns_and_only_if_it_is_read(fuse, learns):
    model, inputs = FAMILIES["llava"]().model, TINY.inputs(ROWS)
    labels = answers(inputs)
    vr.apply(model, [DPVR(at=1, fuse=fuse)])
    model(**inputs, labels=labels).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(n.startswith(ATTRIBUTE) for n in grads)
    assert any(g.abs().sum() > 0 for g in grads.values()) == learns
    if learns:
        assert len(grads) == len(list(getattr(model, ATTRIBUTE).parameters()))


def test_three_steps_reduce_the_loss():
    model, inputs = FAMILIES["llava"]().model, TINY.inputs(ROWS)
    labels = answers(inputs)
    vr.apply(model, [DPVR(at=1, branch="random")])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any("dpvr" in str(p) for p in vr.report(model).to_dict()["passes"])


def test_blocks_are_saved_and_loaded(tmp_path):
    model, inputs = FAMILIES["llava"]().model, TINY.inputs(ROWS)
    recipe = [Stride(keep=0.5), DPVR(at=1, branch="random")]
    vr.apply(model, recipe)
    with torch.no_grad():
        for p in getattr(model, ATTRIBUTE).parameters():
            p.add_(torch.randn_like(p) / 10)
    expected = model(**inputs).logits
    vr.save_blocks(model, tmp_path / "blocks")
    assert sorted(p.name for p in (tmp_path / "blocks").iterdir()) == [
        "vlmrewrite.json",
        "vlmrewrite_blocks.safetensors",
    ]
    saved = {n: p.clone() for n, p in getattr(model, ATTRIBUTE).state_dict().items()}
    vr.restore(model)

    for apply_first in (True, False):
        other = FAMILIES["llava"]().model
        if apply_first:
            vr.apply(other, recipe)
        assert vr.load_blocks(other, tmp_path / "blocks") is other
        loaded = getattr(other, ATTRIBUTE).state_dict()
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[n], saved[n]) for n in saved)
        assert torch.equal(other(**inputs).logits, expected)


def test_blocks_that_do_not_fit_are_refused(tmp_path):
    model = FAMILIES["llava"]().model
    with pytest.raises(ValueError, match="is not rewritten"):
        vr.save_blocks(model, tmp_path)
    with vr.applied(model, [Stride(keep=3)]), pytest.raises(ValueError, match="has no trained blocks"):
        vr.save_blocks(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected vlmrewrite\.json in .*, found none"):
        vr.load_blocks(model, tmp_path)
    with vr.applied(model, [DPVR(at=1)]):
        vr.save_blocks(model, tmp_path)
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in tmp_path.glob("*.*"):
        (cut / file.name).write_bytes(file.read_bytes()[: None if file.suffix == ".json" else 60])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        vr.load_blocks(model, cut)
    deeper = FAMILIES["llava"](layers=5).model
    with pytest.raises(ValueError, match="belong to a model with num_hidden_layers 4, this Llava.* has 5"):
        vr.load_blocks(deeper, tmp_path)
    with pytest.raises(ValueError, match="belong to a model with model_type 'llava', this .* has 'smolvlm'"):
        vr.load_blocks(FAMILIES["smolvlm"]().model, tmp_path)
    assert not hasattr(deeper, ATTRIBUTE)
    with vr.applied(model, [DPVR(at=2)]) as other:
        before = {n: p.clone() for n, p in other.state_dict().items()}
        with pytest.raises(
            ValueError, match=r"belong to the passes \[DPVR\(at=1, .*recipe 'custom', .* \[DPVR\(at=2, "
        ):
            vr.load_blocks(other, tmp_path)
        assert all(torch.equal(p, before[n]) for n, p in other.state_dict().items())


def test_auto_is_measured_and_kept():
    inputs = TINY.inputs(ROWS)
    recipe = vr.calibrate(TINY.model, [DPVR(at="auto", branch="identity", calibration=inputs)])
    (found,) = recipe.passes
    assert isinstance(found.at, int)
    assert vr.calibrate(TINY.model, [DPVR(at="auto", branch="identity")], inputs).passes == (found,)
    with vr.applied(TINY.model, [DPVR(at="auto", branch="identity", calibration=inputs)]):
        TINY.model(**inputs)
        assert f"from layer {found.at} to 3" in vr.report(TINY.model).plan


def test_a_fuse_beyond_the_depth_with_auto():
    with pytest.raises(ValueError, match="fuse=5; expected fuse in 0 .. 4"):
        vr.apply(TINY.model, [DPVR(at="auto", fuse=5, calibration=TINY.inputs([Row(1)]))])
