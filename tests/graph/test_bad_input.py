"""Bad input gets a clear error, and the model is exactly as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import vlmrewrite as vr
from vlmrewrite.passes import STS, Random, Stride
from vlmrewrite.testing.models import FAMILIES, Row


def snapshot(model: nn.Module) -> dict[str, Any]:
    hooks = [
        (name, kind, len(getattr(m, kind)))
        for name, m in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    ]
    configs = [(n, m.config._attn_implementation_internal) for n, m in model.named_modules() if hasattr(m, "config")]
    return {
        "class": type(model),
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "modules": [n for n, _ in model.named_modules()],
        "forward": model.forward.__func__,
        "generate": getattr(model, "generate", None) and model.generate.__func__,
        "config": model.config.to_dict(),
        "attention": configs,
        "hooks": hooks,
        "generation": model.generation_config.to_dict() if getattr(model, "generation_config", None) else None,
        "training": [m.training for m in model.modules()],
        "parameters": [(n, p.data_ptr(), p.requires_grad, p.dtype, p.device) for n, p in model.named_parameters()],
    }


@pytest.fixture
def unchanged(llava):
    llava.model(**llava.inputs([Row(1)]))  # transformers installs hooks of its own at the first call
    before = snapshot(llava.model)
    yield llava
    assert snapshot(llava.model) == before


RECIPES = {
    "unknown recipe": ("sts-999", ValueError, r"unknown recipe 'sts-999'.*sts-128"),
    "missing file": ("nowhere/mine.yaml", FileNotFoundError, r"nowhere/mine\.yaml"),
    "not a recipe": (7, ValueError, r"expected a recipe.*got 7"),
    "not a pass": (["sts"], ValueError, r"expected a pass.*'sts'"),
    "a class": ([STS], ValueError, r"got the class STS; write STS\(\.\.\.\)"),
    "layer out of range": ([Stride(keep=0.5, at=99)], ValueError, r"expected a layer in 0 \.\. 3 .*got 99"),
}


@pytest.mark.parametrize(("recipe", "kind", "message"), RECIPES.values(), ids=RECIPES)
def test_recipes(unchanged, recipe, kind, message):
    with pytest.raises(kind, match=message):
        vr.apply(unchanged.model, recipe)


FILES = {
    "malformed YAML": ("name: [", r"(?s)bad\.yaml"),
    "unknown pass": ("name: x\npasses:\n  - stz: {keep: 3}\n", r"(?s)bad\.yaml.*unknown pass 'stz'.*sts"),
    "unknown key": ("name: x\npasses:\n  - sts: {keeps: 3}\n", r"(?s)bad\.yaml.*keeps"),
    "wrong type": ("name: x\npasses:\n  - sts: {keep: many}\n", r"(?s)bad\.yaml.*keep.*'many'"),
    "out of range": ("name: x\npasses:\n  - sts: {keep: 1.5}\n", r"(?s)bad\.yaml.*keep.*1\.5"),
    "layer out of range": ("name: x\npasses:\n  - fastv: {at: 99}\n", r"bad\.yaml: passes\[0\]\.fastv\.at: .*got 99"),
    "unknown backend": ("name: x\nbackend: fast\npasses: []\n", r"(?s)bad\.yaml.*backend.*'fast'"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_recipe_files(unchanged, tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        vr.apply(unchanged.model, path)


@pytest.mark.parametrize("keep", [0, -3, 0.0, -0.5, 1.5, math.nan, math.inf, True, "half", None])
@pytest.mark.parametrize("kind", [STS, Random, Stride])
def test_budgets(kind, keep):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.keep: expected an int >= 1"):
        kind(keep=keep)


@pytest.mark.parametrize("at", [-1, 1.0, -0.1, math.nan, True, "middle"])
def test_depths(at):
    with pytest.raises(ValueError, match=r"Stride\.at: expected an int >= 0"):
        Stride(keep=3, at=at)


def test_options(unchanged, monkeypatch):
    with pytest.raises(ValueError, match="backend='fast'; expected 'auto', 'eager', 'inductor' or 'inductor-whole'"):
        vr.apply(unchanged.model, "sts-half", backend="fast")
    with pytest.raises(ValueError, match="kernels='cuda'; expected 'auto', 'reference' or 'triton'"):
        vr.apply(unchanged.model, "sts-half", kernels="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="kernels='triton' was asked for, and"):
        vr.apply(unchanged.model, "sts-half", kernels="triton")


def test_applying_twice(unchanged):
    with vr.applied(unchanged.model, "sts-half"):
        before = snapshot(unchanged.model)
        with pytest.raises(ValueError, match=r"'sts-half' is applied to this Llava.*restore\(model\) first"):
            vr.apply(unchanged.model, "stride-half")
        assert snapshot(unchanged.model) == before


def test_restoring_what_is_not_applied(unchanged):
    with pytest.raises(ValueError, match="this LlavaForConditionalGeneration is not rewritten"):
        vr.restore(unchanged.model)
    with pytest.raises(ValueError, match="is not rewritten"):
        vr.report(unchanged.model)


@pytest.mark.slow
def test_restore_gives_back_the_model(unchanged):
    inputs = unchanged.inputs([Row(1)])
    before = snapshot(unchanged.model)
    vr.apply(unchanged.model, [STS(keep=3, refine=2, features="encoder")])
    unchanged.model.generate(**inputs, max_new_tokens=2)
    assert vr.restore(unchanged.model) is unchanged.model
    assert snapshot(unchanged.model) == before


def test_a_block_that_fails_restores(unchanged):
    with pytest.raises(KeyError), vr.applied(unchanged.model, "sts-half"):
        raise KeyError("mine")


def test_an_apply_that_fails_half_way_undoes_itself(unchanged, monkeypatch):
    def fail(*_):
        raise MemoryError("half-way")

    monkeypatch.setattr("vlmrewrite.runtime.install.in_place", fail)
    with pytest.raises(MemoryError, match="half-way"):
        vr.apply(unchanged.model, [STS(features="encoder")])


@pytest.mark.slow
def test_a_call_that_fails_leaves_the_recipe_applied(unchanged, monkeypatch):
    inputs = unchanged.inputs([Row(1)])
    with vr.applied(unchanged.model, [Stride(keep=2)]):
        expected = unchanged.model(**inputs).logits
        with pytest.raises(IndexError):
            unchanged.model(**{**inputs, "input_ids": inputs["input_ids"] + 1000 * (inputs["input_ids"] > 7)})
        assert torch.equal(unchanged.model(**inputs).logits, expected)


def test_a_text_only_model():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))  # fmt: skip
    before = snapshot(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no get_image_features: it is a text-only model"):
        vr.apply(model, "sts-half")
    assert snapshot(model) == before


def test_a_model_without_image_tokens():
    model = FAMILIES["llava"]().model
    model.config.image_token_id = None
    before = snapshot(model)
    with pytest.raises(ValueError, match="no image_token_id"):
        vr.apply(model, "sts-half")
    assert snapshot(model) == before


def test_a_vision_tower_alone():
    model = CLIPVisionModel(CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                             num_attention_heads=1, image_size=4, patch_size=2))  # fmt: skip
    with pytest.raises(ValueError, match="CLIPVisionModel has no get_image_features"):
        vr.apply(model, "sts-half")


def test_weights_that_are_not_there():
    model = FAMILIES["llava"]().model
    decoder = model.get_decoder()
    decoder.layers[1].mlp.to("meta")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj\.weight is offloaded.*or all weights on one dev"):
        vr.apply(model, "sts-half")
    assert snapshot(model) == before


def test_weights_that_are_sharded():
    model = FAMILIES["llava"]().model
    model.get_decoder().layers[0].mlp.gate_proj.weight.device_mesh = object()
    with pytest.raises(ValueError, match=r"gate_proj\.weight is sharded over processes.*as DistributedDataParallel"):
        vr.apply(model, "sts-half")


@pytest.mark.slow
@torch.no_grad()
def test_a_forward_that_was_exchanged_after_apply():
    tiny = FAMILIES["llava"]()
    layer, inputs = tiny.model.get_decoder().layers[1], tiny.inputs([Row(1, 2, 3)])

    @torch.compiler.disable
    def forward(*args, **kwargs):
        return type(layer).forward(layer, *args, **kwargs)

    with vr.applied(tiny.model, [Stride(0.5)]):
        layer.forward = forward
        with pytest.raises(RuntimeError, match=r"the forward of model\.language_model\.layers\.1 was exchanged"):
            tiny.model(**inputs)
        tiny.model.get_decoder().forward = torch.compiler.disable(tiny.model.get_decoder().forward)
        with pytest.raises(RuntimeError, match=r"the forward of model\.language_model was exchanged"):
            tiny.model(**inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.export's own
def test_compiled_exported_and_foreign_models():
    with pytest.raises(ValueError, match="compiled with torch.compile already"):
        vr.apply(torch.compile(FAMILIES["llava"]().model), "sts-half")
    inner = FAMILIES["llava"]().model
    inner.compile()
    with pytest.raises(ValueError, match="compiled with torch.compile already"):
        vr.apply(inner, "sts-half")
    exported = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    for thing in (exported, exported.module()):
        with pytest.raises(ValueError, match="is an exported model"):
            vr.apply(thing, "sts-half")
    for thing in (nn.Linear(2, 2), None, "model"):
        with pytest.raises(TypeError, match=rf"expected a transformers PreTrainedModel, got {type(thing).__name__}"):
            vr.apply(thing, "sts-half")


def test_a_forward_that_was_exchanged():
    model = FAMILIES["llava"]().model
    model.forward = lambda **_: None
    with pytest.raises(ValueError, match="forward was exchanged on this instance"):
        vr.apply(model, "sts-half")


def test_tokens_and_features_that_do_not_match(unchanged):
    inputs = unchanged.inputs([Row(2)])
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    with vr.applied(unchanged.model, "sts-half"), pytest.raises(ValueError, match="do not match"):
        unchanged.model(**inputs)


def test_tracing_without_an_image(unchanged):
    with pytest.raises(ValueError, match="the inputs hold no image"):
        vr.trace(unchanged.model, unchanged.inputs([Row(0)]))


def test_a_video_for_a_model_that_takes_none(unchanged):
    message = "has no get_video_features: it encodes no videos apart from its decoder"
    with vr.applied(unchanged.model, "sts-half"), pytest.raises(ValueError, match=message):
        unchanged.model(input_ids=torch.tensor([[9]]), pixel_values_videos=torch.zeros(1))


@pytest.mark.slow
def test_refused_passes_are_reported_and_strict_raises():
    tiny = FAMILIES["llava_next"]()
    inputs = tiny.inputs([Row(1)])
    wish = [STS(keep=3, refine=None, features="encoder"), Stride(keep=2)]
    with vr.applied(tiny.model, wish):
        with pytest.warns(UserWarning, match=r"recipe 'custom': STS\(.*\) does nothing: .* vision tokens"):
            tiny.model(**inputs)
        first, second = vr.report(tiny.model).to_dict()["passes"]
        assert not first["matched"]
        assert "vision tokens" in first["reason"]
        assert second["matched"]
    before = snapshot(tiny.model)
    vr.apply(tiny.model, wish, strict=True)
    with pytest.raises(ValueError, match="was refused"):
        tiny.model(**inputs)
    vr.restore(tiny.model)
    assert snapshot(tiny.model) == before


@pytest.mark.slow
@torch.no_grad()
def test_a_prompt_without_a_token(llava):
    inputs = llava.inputs([Row(1, 2, 3), Row(0, 3, 4), Row(0, 2, 2)])
    inputs["attention_mask"][1:] = 0
    empty = torch.zeros(1, 0, dtype=torch.int64)
    with vr.applied(llava.model, [Stride(keep=4)]):
        with pytest.raises(ValueError, match=r"no token in row 1, 2 of 3; expected a prompt in each row"):
            llava.model.generate(**inputs, max_new_tokens=2)
        for ask in (lambda: llava.model(input_ids=empty), lambda: llava.model.generate(empty, max_new_tokens=2)):
            with pytest.raises(
                ValueError, match=r"input_ids has the shape \(1, 0\); expected a row, and a token in each"
            ):
                ask()
        with pytest.raises(ValueError, match=r"inputs_embeds has the shape \(0, 3, 32\)"):
            llava.model(inputs_embeds=torch.zeros(0, 3, 32))
        llava.model.generate(
            **llava.inputs([Row(1, 2, 3), Row(2, 4, 1), Row(0, 3, 3)]), max_new_tokens=2, prefill_chunk_size=4
        )
    with pytest.raises(ValueError, match="input_ids has the shape"):
        vr.trace(llava.model, {"input_ids": empty})
