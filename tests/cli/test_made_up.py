"""Made-up prompts on the meta device: what is captured from a configuration alone is what images give."""

from __future__ import annotations

import collections
import copy

import pytest

import vlmrewrite as vr
from tests.small import long
from vlmrewrite.cli.prompt import Shape, captured_prompt
from vlmrewrite.passes import STS, VISOR
from vlmrewrite.testing.models import ZOO, Row

AGAIN = ["qwen3_vl", "granite_docling", "granite4_vision"]
"""Features are added again behind some layers: as many as the tower has, the layers named by the configuration."""

OTHERWISE = ["blip_2", "hunyuan_vl", "llama4", "ovis2", "qwen3_5"]
"""The decoder is captured alone, positions have four axes, features are not pooled, layers are recurrent."""

REFUSED = {
    "glm5_next": "selects keys by an index, and takes",
    "mistral_large4": "selects keys by an index, and takes",
    "qwen4_exp": "to take the cache, found",
    "unlimited_ocr": "keeps more than keys and values",
    "inkling2": "keeps keys and a recurrent state side by side",
    "inkling_mm_model": "keeps keys and a recurrent state side by side",
    "kosmos_2": "names no image token",
    "kosmos_2_5": "names no image token",
    "phi4_multimodal": "names no image token",
    "chameleon": "could not be captured as one graph",
    "gemma3n": "could not be captured as one graph",
}
"""Families of which no prompt can be made up, with what is said."""

KEPT_AS_IT_IS = {"ernie4_5_vl_moe"}
"""Its layers cannot run on some tokens alone."""

RECIPE = [STS(keep=5, refine=3, at=1), VISOR([0], [2])]

WORKING = sorted(ZOO.keys() - REFUSED.keys() - {*AGAIN, *OTHERWISE})


def operations(program: vr.Program) -> collections.Counter[str]:
    return collections.Counter(str(n.target) for n in program.graph_module.graph.nodes if n.op != "placeholder")


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("name", AGAIN + (OTHERWISE if long() else OTHERWISE[1::3]))
def test_the_graph_is_that_of_a_call_with_images(name: str) -> None:
    tiny = ZOO[name](layers=4)
    inputs = tiny.inputs([Row(1, 3, 2)])
    vision = int(inputs["input_ids"].eq(tiny.image_token_id).sum())
    expected = vr.trace(tiny.model, inputs)
    shape = Shape(vision, text=inputs["input_ids"].shape[1] - vision)
    found, _ = captured_prompt(copy.deepcopy(tiny.model).to("meta"), shape)
    without = operations(expected) - operations(found)
    assert not {kind for kind in without if "ones" not in kind and "zeros" not in kind}, "a mask is given, not made"
    heads = [[(layer.heads, layer.kv_heads) for layer in p.anatomy.layers] for p in (found, expected)]
    assert heads[0] == heads[1]
    assert found.call is not None
    assert int(found.call.vision.sum()) == vision
    planned = vr.rewrite(found, RECIPE)
    assert all(outcome.reason is None for outcome in planned.outcomes) is (name != "qwen3_5")


@pytest.mark.wide
@pytest.mark.parametrize("name", WORKING if long() else WORKING[::16])
def test_a_prompt_is_made_up(name: str) -> None:
    program, _ = captured_prompt(ZOO[name](layers=3).model.to("meta"), Shape(8, text=20))
    assert program.plan.depth == 3
    if name in KEPT_AS_IT_IS:
        with pytest.raises(ValueError, match="cannot run on"):
            vr.rewrite(program, RECIPE)
    else:
        vr.rewrite(program, RECIPE)


@pytest.mark.parametrize("name", REFUSED if long() else [*REFUSED][::5])
def test_no_prompt_is_made_up(name: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=REFUSED[name]):
        captured_prompt(ZOO[name](layers=4).model.to("meta"), Shape(8, text=20))
