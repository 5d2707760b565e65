"""Costs: the FLOPs that are reported are those that torch counts while the rewritten graph runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Phi3Config

import vlmrewrite as vr
from vlmrewrite.passes import DAPE, STS, Random, Stride
from vlmrewrite.plan.pipeline import frozen_pass
from vlmrewrite.plan.tokens import All, Image, Text
from vlmrewrite.plan.vocabulary import LayerPlan
from vlmrewrite.testing.models import Row
from vlmrewrite.testing.models.families import llava_of
from vlmrewrite.testing.models.tiny import decoder_sizes

ROWS = [Row(2, 2, 3), Row(2, 2, 3)]


@frozen_pass
class Written:
    """Layers 1 and 2, changed as a test wants."""

    name = "written"
    first: str
    second: str = ""

    def refuse(self, plan):
        return None

    def change(self, plan):
        for i, text in enumerate((self.first, self.second), 1):
            for verb, tokens in (x.split() for x in text.split(",") if x):
                sets = {"all": All, "text": Text, "image": Text | Image(0)}
                getattr(LayerPlan, verb)(plan.layer(i), sets[tokens])


@pytest.fixture(scope="module")
def phi():
    """A decoder whose q, k and v are one linear map, and whose MLP's two first halves are another."""
    return llava_of("llava_phi3", Phi3Config(**decoder_sizes(4)), 0)


def counted(program, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program.run(*args, **kwargs)
    ops = counter.get_flop_counts()["Global"]
    inside = "vlm.sts_sample", "vlm.dape"  # what the operator of a policy or an edit does inside is not counted
    return sum(n for op, n in ops.items() if not str(op).startswith(inside))


def head(tiny, call) -> int:
    text = tiny.model.config.text_config
    return 2 * call.vision.numel() * text.hidden_size * text.vocab_size


PASSES = {
    "none": [],
    "selection": [Stride(keep=3, at=2)],
    "scored": [STS(keep=6, refine=3, at=2)],
    "scored at once": [STS(keep=6, refine=3, at=0)],
    "scored twice": [STS(keep=6, refine=3, at=1), STS(keep=5, refine=2, at=1)],
    "scored outside": [DAPE(budget=0.5)],
    "scored outside, after a selection": [DAPE(budget=0.5, detail=(0.0, 0.5, 0.5)), STS(keep=6, refine=3, at=2)],
    "other keys": [Written("run_on image", "run_on text,attend_to image"), Random(keep=0.5)],
    "all keys": [Written("run_on text,attend_to all", "run_on image,attend_to text")],
    "other MLP": [Written("mlp_on text", "run_on image,mlp_on text"), Stride(keep=4, at=1)],
}


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "phi"])
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_flops_are_those_that_run(llava, phi, name, passes):
    tiny = {"llava": llava, "phi": phi}[name]
    program = vr.rewrite(vr.trace(tiny.model, tiny.inputs(ROWS)), passes)
    total = sum(c.flops for c in program.costs(program.call.counts))
    assert counted(program) == total + head(tiny, program.call)


@pytest.mark.slow
def test_a_fused_projection_is_counted_once(phi):
    program = vr.trace(phi.model, phi.inputs([Row(1)]))
    layer, text = program.anatomy.layers[0], phi.model.config.text_config
    assert layer.queries == layer.keys == layer.values
    assert sum(layer.queries.values()) == 2 * text.hidden_size * (4 + 2 + 2) * (text.hidden_size // 4)


@pytest.mark.slow
def test_a_kept_cache_counts_as_long_as_it_is(llava):
    """The second turn attends to what each layer kept of the first; unmodified, it would attend to all of it."""
    passes, first, second = [STS(keep=6, refine=3, at=2)], llava.inputs([Row(1, 2, 3)]), llava.inputs([Row(1, 1, 3)])
    del second["attention_mask"]
    with vr.applied(llava.model, passes), torch.no_grad():
        cache = llava.model(**first).past_key_values
        held = cache.kv_lengths()
        llava.model(**second)
        alone = vr.report(llava.model).layers
        llava.model(**second, past_key_values=cache)
        again = vr.report(llava.model).layers
    heads, size, n = 4, llava.model.config.text_config.hidden_size // 4, second["input_ids"].shape[1]
    assert held == [11, 11, 8, 8]
    score = [0, 0, 2 * heads * held[2] * size, 0]
    for a, b, there, scored in zip(alone, again, held, score, strict=True):
        assert b["flops"] - a["flops"] == 4 * heads * a["tokens"] * there * size + scored
        assert b["flops_before"] - a["flops_before"] == 4 * heads * n * first["input_ids"].shape[1] * size
