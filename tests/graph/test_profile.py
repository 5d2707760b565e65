"""Profiles: what is measured layer by layer, against Hugging Face's own attentions, the oracle, and by hand."""

import copy
import dataclasses
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmrewrite as vr
from tests import small
from vlmrewrite.hf.decoder import attention_swapped, decoder_configs
from vlmrewrite.oracle.hooks import oracle_logits
from vlmrewrite.oracle.masks import LayerMasks
from vlmrewrite.passes import Stride
from vlmrewrite.report.layer_profile import LayerProfile, profile
from vlmrewrite.report.observe import attention_mass, observe
from vlmrewrite.testing.agreement import SLACK
from vlmrewrite.testing.models import FAMILIES, IMAGE, PAD, Row, TinyVLM

ROWS = [Row(images=2, before=3, after=4), Row(images=0, before=5, after=2), Row(images=1, before=1, after=2)]
PROFILE = LayerProfile(
    attention_mass=(0.5, 0.25, 0.125, 0.0),
    vision_cosine=(0.75, 0.875, 1.0, 1.0),
    text_cosine=(0.5, 0.625, 0.75, 1.0),
    freeze_kl=(0.5, 1.25, 0.0625, 0.0),
    hide_kl=(0.0, 2.0, 0.25, 0.25),
    rows=1,
)


@cache
def measured(family: str) -> tuple[TinyVLM, dict[str, Any], LayerProfile]:
    """A left-padded batch with a row without images, and its profile."""
    inputs = small.family(family).inputs(ROWS)
    return small.family(family), inputs, profile(small.family(family).model, inputs)


def tokens(inputs: dict[str, Any], image: int = IMAGE) -> tuple[Tensor, Tensor]:
    """Vision and real text tokens, bool [B, T]."""
    vision = inputs["input_ids"] == image
    return vision, (inputs["input_ids"] != PAD) & ~vision


# ---- against others


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_attention_mass_and_cosines_are_those_of_hugging_face(family: str) -> None:
    model, inputs, found = measured(family)
    with torch.no_grad(), attention_swapped(model.model, "eager"):
        out = model.model(**inputs, output_attentions=True, output_hidden_states=True)
    vision, text = tokens(inputs)
    queries = text & (vision.cumsum(1) > 0)
    expected = [(w * vision[:, None, None]).sum(-1).mean(1)[queries].mean().item() for w in out.attentions]
    assert found.attention_mass == pytest.approx(expected, abs=1e-5)
    # The last of Hugging Face's hidden states is behind the final norm.
    cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in zip(out.hidden_states, out.hidden_states[1:-1])]  # noqa: B905
    text &= vision.any(1, keepdim=True)
    assert found.vision_cosine[:-1] == pytest.approx([c[vision].mean().item() for c in cosines], abs=1e-5)
    assert found.text_cosine[:-1] == pytest.approx([c[text].mean().item() for c in cosines], abs=1e-5)


def oracle_next_tokens(model: Any, inputs: dict[str, Any], hide: bool) -> Tensor:
    """Log-probabilities of the original and of each layer's change, fp64 [1 + L, R, V]."""
    vision, text = tokens(inputs)
    everything, rows = torch.ones_like(text), vision.any(1)
    columns = torch.arange(text.shape[1]).expand_as(text).masked_fill(~text, 0).amax(1)[rows]
    full = [LayerMasks(everything, everything)] * 4
    changed = LayerMasks(text, text if hide else everything)
    plans = [full, *([*full[:i], changed, *full[i + 1 :]] for i in range(4))]
    logits = torch.stack([oracle_logits(model, inputs, plan)[rows, columns] for plan in plans])
    return logits.double().log_softmax(-1)


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_kls_are_those_of_the_oracle(family: str) -> None:
    model, inputs, found = measured(family)
    double = copy.deepcopy(model.model).double()
    doubled = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    for got, hide in ((found.freeze_kl, False), (found.hide_kl, True)):
        single, exact = oracle_next_tokens(model.model, inputs, hide), oracle_next_tokens(double, doubled, hide)
        p, log_ratio = exact[0].exp(), exact[0] - exact[1:]
        expected = (p * log_ratio).sum(-1).mean(1)
        assert expected.max() > 1e-2
        # dKL = sum p (1 + log p/q) dlog p - sum p dlog q, where both differ by no more than `off`
        off = SLACK * (single - exact).abs().max()
        budget = off * (2 + (p * log_ratio.abs()).sum(-1).mean(1))
        assert torch.all((torch.tensor(got, dtype=torch.float64) - expected).abs() <= budget)
        assert budget.max() < 1e-2 * expected.max()
    assert found.freeze_kl[-1] == pytest.approx(0.0, abs=1e-10)
    assert found.rows == 2


def test_attention_mass_of_a_layer_with_groups_scale_softcap_and_masks() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 300, 8), torch.randn(2, 2, 300, 8)
    vision = torch.rand(2, 300) < 0.5
    queries = torch.tensor([[True], [False]]) & ~vision
    bits = torch.rand(2, 300) < 0.9
    full = (torch.ones(300, 300, dtype=torch.bool).tril() & bits[:, None, :])[:, None]
    full |= torch.eye(300, dtype=torch.bool)
    added = torch.zeros(2, 1, 300, 300).masked_fill(~full, -1e9)
    scores = torch.tanh(q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.7 / 2.0) * 2.0
    weights = scores.masked_fill(~full, -torch.inf).softmax(-1)
    expected = (weights * vision[:, None, None]).sum(-1).mean(1)[queries].sum().item()
    for mask in (full, added, full[:1]):
        assert attention_mass(q, k, mask, 0.7, 2.0, queries, vision) == pytest.approx(expected, rel=1e-5)
    own, plain = queries & bits, torch.ones(300, 300, dtype=torch.bool).tril()
    for mask, seen in ((bits, plain & bits[:, None, None]), (None, plain[None, None])):
        weights = (q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        expected = (weights * vision[:, None, None]).sum(-1).mean(1)[own].sum().item()
        assert attention_mass(q, k, mask, None, None, own, vision) == pytest.approx(expected, rel=1e-5)


# ---- identities


def test_a_layer_that_does_nothing() -> None:
    model = FAMILIES["llava"]().model
    for i in (1, 3):
        layer = model.get_decoder().layers[i]
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data.zero_()
    found = profile(model, small.family("llava").inputs(ROWS))
    for i in (1, 3):
        assert [found.freeze_kl[i], found.hide_kl[i]] == pytest.approx([0.0] * 2, abs=1e-10)
        assert [found.vision_cosine[i], found.text_cosine[i]] == pytest.approx([1.0] * 2, abs=1e-6)
        assert found.attention_mass[i] > 0.01
    assert found.freeze_kl[2] == pytest.approx(0.0, abs=1e-10)  # nothing reads what comes out of layer 2
    assert min(found.freeze_kl[0], found.hide_kl[0], found.hide_kl[2]) > 1e-3
    assert max(found.vision_cosine[0], found.vision_cosine[2]) < 0.99


def test_the_same_inputs_give_the_same_profile() -> None:
    model, inputs, found = measured("llava")
    before = {name: x.clone() for name, x in inputs.items()}
    assert profile(model.model, inputs) == found
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


@pytest.mark.slow
def test_padding_text_rows_and_the_cut_into_batches_do_not_matter() -> None:
    model, inputs, found = measured("llava")
    right = model.inputs(ROWS, side="right")
    singles, pixels = [], inputs["pixel_values"].split([2, 0, 1])
    for ids, picture in zip(inputs["input_ids"], pixels, strict=True):
        one: dict[str, Any] = {"input_ids": ids[ids != PAD][None]}
        singles.append(one | ({"pixel_values": picture} if len(picture) else {}))
    labelled = {**inputs, "labels": inputs["input_ids"], "logits_to_keep": 3}
    for given, rows in ((right, 2), (singles, 2), ([inputs, *singles], 4), (labelled, 2)):
        got = profile(model.model, given)
        for name, column in found.to_dict().items():
            if name.endswith(("mass", "cosine", "kl")):
                assert getattr(got, name) == pytest.approx(column, rel=1e-4, abs=1e-6), name
        assert got.rows == rows


# ---- the model is left as it was


def state(model: Any) -> tuple[Any, ...]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    configs = [c._attn_implementation_internal for c in decoder_configs(model)]
    weights = sum(p.double().sum().item() for p in model.parameters())
    return hooks, configs, weights, [m.training for m in model.modules()], set(model.__dict__), torch.is_grad_enabled()


@pytest.mark.slow
def test_the_model_is_left_as_it_was() -> None:
    model, inputs, found = measured("llava")
    ends_in_image = model.inputs([Row(images=1, before=2, after=0)])
    try:
        model.model.train()
        model.model.lm_head.eval()
        before = state(model.model)
        assert profile(model.model, inputs) == found
        assert state(model.model) == before
        with pytest.raises(ValueError, match="ends in an image"):
            profile(model.model, ends_in_image)
        assert state(model.model) == before
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            expected = torch.rand(1)
            torch.manual_seed(3)
            profile(model.model, inputs)
            assert torch.equal(torch.rand(1), expected)
    finally:
        model.model.eval()


def test_progress_is_told() -> None:
    model, inputs, _ = measured("llava")
    steps: list[tuple[str, int, int]] = []
    profile(model.model, [inputs, inputs], progress=lambda *step: steps.append(step))
    assert [text for text, _, _ in steps[:4]] == ["capture 1 of 2", "capture 2 of 2", "unmodified", "unmodified"]
    assert [done for _, done, _ in steps[2:]] == list(range(19))
    assert {total for _, _, total in steps[2:]} == {18}
    assert steps[4][0] == "KL frozen in layer 0"
    assert steps[-1][0] == "done"


# ---- bad input


def test_refusals() -> None:
    model, inputs, _ = measured("llava")
    text = model.inputs([Row(images=0)])
    for given, message in ((text, "no image in 1 batch of"), ([text, text], "no image in 2"), ([], "no image in 0")):
        with pytest.raises(ValueError, match=message):
            profile(model.model, given)
    with pytest.raises(ValueError, match=r"row 1 ends in an image; expected prompts that end in text"):
        profile(model.model, [inputs, model.inputs([Row(images=0), Row(images=1, after=0)])])
    for wrong in (3, "image", [inputs, 3], None):
        with pytest.raises(TypeError, match="expected a mapping of the forward's inputs or a sequence of them, got"):
            profile(model.model, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel, got Linear"):
        profile(torch.nn.Linear(1, 1), inputs)
    with pytest.raises(ValueError, match="image features and image tokens do not match"):
        profile(model.model, {**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with (
        vr.applied(model.model, [Stride(keep=2)]),
        pytest.raises(ValueError, match=r"a recipe is applied to .*; call vlmrewrite.restore"),
    ):
        profile(model.model, inputs)
    with pytest.raises(ValueError, match="is on the meta device; expected a model with weights"):
        profile(copy.deepcopy(model.model).to("meta"), inputs)
    bare = dataclasses.replace(vr.trace(model.model, inputs), inputs=())
    with pytest.raises(ValueError, match="expected a program with inputs of its own"):
        observe(bare)


def test_logits_that_are_not_finite() -> None:
    model, inputs, _ = measured("llava")
    head = model.model.lm_head.weight
    before = head.data.clone()
    try:
        head.data[9] = torch.nan
        with pytest.raises(ValueError, match="freeze_kl of layer 0 is nan; expected finite hidden states and logits"):
            profile(model.model, inputs)
    finally:
        head.data.copy_(before)


# ---- what a profile says


def test_saturation_and_ranks() -> None:
    assert PROFILE.depth == 4
    assert PROFILE.saturation() == 2
    assert [PROFILE.saturation(share) for share in (0, 0.03, 0.05, 0.73, 0.99)] == [3, 3, 2, 1, 1]
    assert PROFILE.rank_self() == [1, 0, 2, 3]
    assert PROFILE.rank_cross() == [1, 2, 3, 0]
    noise_at_the_end = LayerProfile(*[(0.0, 0.0, 1.0)] * 5, rows=1)
    assert noise_at_the_end.saturation() == 2
    assert LayerProfile(*[(0.0, 0.0)] * 5, rows=1).saturation() == 0
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"expected a share in \[0, 1\), got"):
            PROFILE.saturation(share)


def test_text_and_data() -> None:
    assert str(PROFILE).splitlines() == [
        "layer  attention to image  cosine vision  cosine text  KL frozen  KL hidden",
        "0      0.5                 0.75           0.5          0.5        0",
        "1      0.25                0.875          0.625        1.25       2",
        "2      0.125               1              0.75         0.0625     0.25",
        "3      0                   1              1            0          0.25",
        "mean over 1 prompt with images; KL in nats",
        "saturation layer: 2",
        "layers by effect of updating vision tokens (KL frozen): 1, 0, 2, 3",
        "layers by effect of having vision tokens (KL hidden): 1, 2, 3, 0",
    ]
    assert json.loads(json.dumps(PROFILE.to_dict())) == {
        "attention_mass": [0.5, 0.25, 0.125, 0.0],
        "vision_cosine": [0.75, 0.875, 1.0, 1.0],
        "text_cosine": [0.5, 0.625, 0.75, 1.0],
        "freeze_kl": [0.5, 1.25, 0.0625, 0.0],
        "hide_kl": [0.0, 2.0, 0.25, 0.25],
        "rows": 1,
        "key_share": [],
        "saturation": 2,
        "rank_self": [1, 0, 2, 3],
        "rank_cross": [1, 2, 3, 0],
    }


@pytest.mark.slow
def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PROFILE.plot(tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000
    LayerProfile(*[(0.0, 0.0)] * 5, rows=1).plot(str(tmp_path / "zero.svg"))
    assert (tmp_path / "zero.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match=r"plot: expected a file that ends in one of \..*\.png.*, got '.*out.txt'"):
        PROFILE.plot(tmp_path / "out.txt")
    with pytest.raises(ValueError, match="plot: expected a file in a folder that exists, got"):
        PROFILE.plot(tmp_path / "nowhere" / "out.png")
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ImportError, match="plots need matplotlib, which is not installed"):
        PROFILE.plot(tmp_path / "out.png")
