"""Mixtures of experts, bidirectional prefixes and merges by boolean index: as the oracle, or why not."""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    Glm4MoeConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)
from transformers.models.llava.modeling_llava import LlavaModel, LlavaModelOutputWithPast

import vlmrewrite as vr
from tests.small import ONE_EACH, crossed, family
from vlmrewrite.errors import CaptureError
from vlmrewrite.ops import EXPERT_LINEAR, expert_linear
from vlmrewrite.passes import Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import IMAGE, ZOO, Row, TinyVLM
from vlmrewrite.testing.models.families import llava_of
from vlmrewrite.testing.models.tiny import decoder_sizes, square, tiny_model, tower_sizes

ROWS = [Row(2), Row(1, 3, 1), Row(0, 5, 2)]
RECIPES = [*ONE_EACH.values()]
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}

TEXTS: dict[str, Any] = {
    "by expert": lambda: Qwen3MoeConfig(**decoder_sizes(3, num_experts=4, head_dim=8, **ROUTED)),
    "groups of experts": lambda: Glm4MoeConfig(**decoder_sizes(3, head_dim=8, **ROUTED, **GROUPS)),
    "all experts at once": lambda: Llama4TextConfig(
        **decoder_sizes(3, head_dim=8, num_local_experts=4, intermediate_size_mlp=64, attention_chunk_size=16)
    ),
    "gated": lambda: GraniteMoeConfig(**decoder_sizes(3, num_local_experts=4, num_experts_per_tok=2)),
}


@functools.cache
def of(kind: str) -> TinyVLM:
    return llava_of(kind, TEXTS[kind](), 0)


def experts_in(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if "gate_up_proj" in dict(m.named_parameters(recurse=False))]


@pytest.mark.slow
def test_experts_of_the_interface_s_form_that_do_not_go_through_it() -> None:
    """A loop over the experts that are hit cannot be captured; the same is computed by the operator."""
    tiny = ZOO["step3p7"](layers=3)
    found = experts_in(tiny.model)
    before = [dict(vars(m)) for m in found]
    assert len(found) == 2
    for recipe in RECIPES[2:5:2]:
        generation_agreement(tiny.model, tiny.inputs(ROWS, seed=1), recipe, 3).check()
    assert [dict(vars(m)) for m in found] == before
    program = vr.trace(tiny.model, tiny.inputs(ROWS))
    assert sum(n.target is EXPERT_LINEAR for n in program.captured.graph.nodes) == 2 * len(found)
    assert [dict(vars(m)) for m in found] == before


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("change", ["bias", "forward", "gate"])
def test_experts_of_another_form_are_left_alone(change: str) -> None:
    tiny = ZOO["step3p7"](layers=2)
    for experts in experts_in(tiny.model):
        if change == "bias":
            experts.bias = torch.nn.Parameter(torch.zeros(1))
        elif change == "forward":
            experts.forward = functools.partial(type(experts).forward, experts)
        else:
            experts.__class__ = type("Plain", (torch.nn.Module,), {"forward": type(experts).forward})
    with pytest.raises((CaptureError, RuntimeError)):
        vr.trace(tiny.model, tiny.inputs(ROWS))


@pytest.mark.wide
@pytest.mark.parametrize(("kind", "recipe"), [*zip(TEXTS, RECIPES, strict=False), ("by expert", RECIPES[4])])
def test_experts(kind: str, recipe: Any) -> None:
    tiny = of(kind)
    generation_agreement(tiny.model, tiny.inputs(ROWS, seed=1), recipe, 3).check()


@pytest.fixture
def moe() -> TinyVLM:
    return of("by expert")


@pytest.mark.parametrize("own", ["eager", "batched_mm"])
def test_each_way_to_run_experts_and_back(moe: TinyVLM, own: str) -> None:
    model, inputs = copy.deepcopy(moe.model), moe.inputs(ROWS, seed=1)
    model.set_experts_implementation(own)
    before = [m.config for m in model.modules() if hasattr(m, "has_gate")]
    forward_agreement(model, inputs, [Stride(0.5)]).check()
    with vr.applied(model, [Stride(0.5)]), pytest.raises(ValueError, match="no other can be set"):
        model.set_experts_implementation("eager")
    assert [m.config for m in model.modules() if hasattr(m, "has_gate")] == before
    assert {c._experts_implementation for c in before} == {own}


def test_generate_may_ask_for_others_while_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU transformers does; here a model says for that moment that it is on one."""
    tiny, asked = ZOO["qwen3_vl_moe"](), []
    model, decoding = tiny.model, type(tiny.model)._optimize_model_for_decode

    @contextlib.contextmanager
    def optimized(self: Any) -> Any:
        with monkeypatch.context() as m:
            m.setattr(type(self), "device", torch.device("cuda"))
            switch = decoding(self)
            switch.__enter__()
        asked.append(self.get_experts_implementation())
        yield
        switch.__exit__(None, None, None)

    monkeypatch.setattr(type(model), "_optimize_model_for_decode", optimized)
    before = model.get_experts_implementation()
    generation_agreement(model, tiny.inputs(ROWS, seed=1), [Stride(0.5)], 3).check()
    assert asked == [before] and model.get_experts_implementation() == before
    model.generate(**tiny.inputs(ROWS, seed=1), max_new_tokens=2, do_sample=False)
    assert "batched_mm" in asked[1].values(), "transformers asks for no others any more"


def test_experts_of_another_kind_are_refused(moe: TinyVLM) -> None:
    model = copy.deepcopy(moe.model)
    model.set_experts_implementation("sonicmoe")
    with pytest.raises(ValueError, match="'sonicmoe' is not supported; expected one of eager, grouped_mm, batched_mm"):
        vr.apply(model, [Stride(0.5)])


@torch.no_grad()
def test_active_experts_count(moe: TinyVLM) -> None:
    layer = vr.trace(moe.model, moe.inputs(ROWS)).anatomy.layers[1]
    mapped = {n: flops for n, flops in layer.behind.items() if n.target is EXPERT_LINEAR}
    assert sorted(mapped.values()) == [2 * 2 * 16 * 32, 2 * 2 * 32 * 32]


def test_gradients_are_those_of_the_model(moe: TinyVLM) -> None:
    inputs = moe.inputs([Row(1), Row(1)], seed=2)
    weight = next(p for n, p in moe.model.named_parameters() if n.endswith("gate_up_proj"))
    grads = []
    for recipe in ([], [Stride(1.0)]):
        with vr.applied(moe.model, recipe) if recipe else torch.enable_grad():
            loss = moe.model(**inputs, labels=inputs["input_ids"]).loss
            grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 16), (5, 3, 16)])
@pytest.mark.parametrize("width", [8, 7])
def test_the_operator_is_the_map_of_each_expert(dtype: torch.dtype, shape: tuple[int, ...], width: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=g).to(dtype), torch.randn(4, width, 16, generator=g).to(dtype)
    bias, experts = torch.randn(4, width, generator=g).to(dtype), torch.randint(0, 3, (5, 3), generator=g)
    got = torch.ops.vlm.expert_linear(x, experts, weight, bias)
    each = x[:, None].expand(5, 3, 16) if x.dim() == 2 else x
    expected = (weight[experts].double() @ each.double()[..., None])[..., 0] + bias[experts].double()
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=32 * eps)
    turned = expert_linear(x, experts, weight.transpose(1, 2).contiguous(), bias, True)
    torch.testing.assert_close(turned, got, rtol=4 * eps, atol=32 * eps)


def paligemma(text: Any) -> TinyVLM:
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**tower_sizes(image_size=16, vision_use_head=False)),
        text_config=text,
        image_token_index=IMAGE,
        hidden_size=32,
        projection_dim=32,
    )
    tiny = tiny_model("prefix", PaliGemmaForConditionalGeneration, config, square(16, 16), 0)
    return replace(tiny, finish=lambda x: x | {"token_type_ids": torch.zeros_like(x["input_ids"])})


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "windows"), crossed(RECIPES[1::2], [False, True]), ids=str)
def test_a_prefix_that_sees_itself(recipe: Any, windows: bool) -> None:
    more = {"sliding_window": 8, "query_pre_attn_scalar": 8} if windows else {}
    tiny = paligemma((Gemma2Config if windows else GemmaConfig)(**decoder_sizes(4, head_dim=8, **more)))
    generation_agreement(tiny.model, tiny.inputs(ROWS, seed=1), recipe, 3).check()


def test_a_prefix_without_a_mask_that_says_so() -> None:
    tiny = paligemma(GemmaConfig(**decoder_sizes(2, head_dim=8)))
    inputs = tiny.inputs([Row(1), Row(1, 3)])
    del inputs["token_type_ids"]
    with (
        vr.applied(tiny.model, [Stride(0.5)]),
        pytest.raises(CaptureError, match="asks for bidirectional attention"),
    ):
        tiny.model(**inputs)


class Added(LlavaModel):
    """Adds the images' features to the embeddings of their tokens."""

    def forward(self, input_ids: Any, mm_encoder_outputs: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        x = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values)}
        if mm_encoder_outputs:
            features = mm_encoder_outputs["image"].pooler_output
            features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
            mask = (input_ids == IMAGE)[..., None].expand_as(x)
            x = x.masked_scatter(mask, x[mask] + features.reshape(-1))
        out = self.language_model(**kwargs | {"inputs_embeds": x})
        return LlavaModelOutputWithPast(last_hidden_state=out.last_hidden_state, past_key_values=out.past_key_values)


@pytest.fixture(scope="module")
def added() -> Any:
    model = copy.deepcopy(family("llava").model)
    model.model.__class__ = Added
    return model


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES[:2], ids=str)
def test_a_merge_by_boolean_index(added: Any, recipe: Any) -> None:
    model, inputs = added, family("llava").inputs(ROWS, seed=1)
    assert "GFLOP" in str(vr.rewrite(vr.trace(model, inputs), recipe))
    forward_agreement(model, inputs, recipe).check()
