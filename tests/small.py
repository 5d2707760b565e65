"""What several tests begin with."""

from __future__ import annotations

import functools
import itertools
import os

import torch
from hypothesis import settings
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmrewrite as vr
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, Stride
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.plan.pipeline import run_passes
from vlmrewrite.plan.plan import Plan
from vlmrewrite.testing import models, strategies
from vlmrewrite.testing.models import Row, families, tiny

CHAIN = [{"cross_layers": [0, 2]}, {"self_layers": [0], "cross_layers": [2]}, {"self_layers": [0, 1, 2, 3]}]
"""Configurations of VISOR to choose among, from the cheapest to the most demanding."""


ONE_EACH = {
    "stride": [Stride(0.5)],
    "sts": [STS(keep=5, refine=3, at=1)],
    "fastv": [FastV(keep=0.5, at=1)],
    "dpvr": [DPVR()],
    "visor": [VISOR([0], [2])],
}
"""A recipe of each kind of technique."""

WITH_BLOCKS = [STS(keep=5, refine=3, at=1), DPVR(at=2, branch="random")]
"""A recipe that adds parameters to the model."""


@functools.cache
def with_heads_of_their_own():
    """A LLaVA each of whose heads has its own keys: attention sums as transformers' own does."""
    text = LlamaConfig(**tiny.decoder_sizes(4, num_key_value_heads=4))
    return families.llava_of("llava", text, 0)


def planned(*passes, depth=8, features=frozenset()):
    """The text of the plan that passes make, none of which refuses."""
    return str(run_passes(Plan(depth, features), passes, strict=True)[0])


def long():
    """Whether the tests run for long. Without, they save captures, which are most of their time."""
    return settings.get_current_profile_name() == "long"


def crossed(*axes):
    """All combinations if the tests run for long; without, each value of each axis, as each may be captured anew.

    Which of them meet does not matter, as long as all are tried.
    """
    axes = [[*axis] for axis in axes]
    each = [[axis[i % len(axis)] for axis in axes] for i in range(max(map(len, axes)))]
    return [*itertools.product(*axes)] if long() else each


def batches():
    """Batches of any form if the tests run for long; without, of several rows with padding, whose graph is there."""
    some = strategies.rows()
    return some if long() else some.map(lambda rows: [*rows[:2], Row(0, 0, 1)])


DEVICE = os.environ.get("VLMREWRITE_TEST_DEVICE", "cpu")
"""Where the shared models are: tests/gpu.sh runs some tests with them on a GPU."""


def family(name, layers=4, dtype=torch.float32):
    """One model for all tests of a process: what was captured of it stays. Who changes a model makes one of its own.

    Its parameters ask for no gradient, as those of a model whose recipe learns: under either, the graph is the same.
    """
    return _family(name, layers, dtype)


@functools.cache
def _family(name, layers, dtype):
    made = models.FAMILIES[name](layers=layers)
    made.model.to(DEVICE, dtype).requires_grad_(False)
    return made


@functools.cache
def with_grid(name, dtype=torch.float32):
    """A model on whose grids there are regions: LLaVA with 36 tokens an image, the others as they are."""
    if name != "llava":
        return family(name, dtype=dtype)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tiny.tower_sizes(image_size=24, projection_dim=models.HIDDEN)),
        text_config=LlamaConfig(**tiny.decoder_sizes(4)),
        image_token_index=models.IMAGE,
        image_seq_length=36,
        vision_feature_layer=-1,
    )
    made = tiny.tiny_model("llava", LlavaForConditionalGeneration, config, tiny.square(24, 36), 0)
    made.model.to(DEVICE, dtype).requires_grad_(False)
    return made


def exchange_linear(decoder, make):
    """Put what ``make`` makes of each linear map of a decoder in its place."""
    for module in [*decoder.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, make(child))


def losses(model, inputs, learning, rate, steps):
    """The loss of the inputs before each of some steps of gradient descent."""
    optimizer, seen = torch.optim.SGD(learning, lr=rate), []
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        seen.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen


def with_trained_blocks(recipe, **how):
    """A rewritten LLaVA whose blocks are not as they were made."""
    made = models.FAMILIES["llava"](**how)
    vr.apply(made.model, recipe)
    with torch.no_grad():
        for p in getattr(made.model, ATTRIBUTE).parameters():
            p.add_(torch.randn_like(p) / 10)
    return made


def kept_in(folder, keep):
    """A rewritten model with trained blocks, its inputs and logits, and the folder that ``keep`` put it into."""
    tiny = with_trained_blocks(WITH_BLOCKS)
    inputs = tiny.inputs([Row(1, 2, 3), Row(1, 1, 2)])
    with torch.no_grad():
        expected = tiny.model(**inputs).logits
    keep(tiny.model, folder)
    return tiny.model, inputs, expected, folder


def token_of(i, tokens, rows, columns):
    """The token that stands for location ``i``."""
    if i in tokens:
        return i
    for size in (2, 4):
        place = []
        for x, n in ((i // columns, rows), (i % columns, columns)):
            first = x - x % size
            place.append(first + (0, 1, 1, 1)[min(size, n - first) - 1])
        if place[0] * columns + place[1] in tokens:
            return place[0] * columns + place[1]
    raise AssertionError(f"nothing stands for {i}")


def always(which):
    """A policy for VISOR that chooses one configuration for every row."""

    def policy(hidden):
        return torch.full((hidden.shape[0],), which)

    return policy


def real(inputs):
    """The tokens that are not padding, bool [B, T]."""
    return inputs["attention_mask"].bool()


def places(cache):
    """Where each layer's keys and values lie in memory."""
    return [x.data_ptr() for layer in cache.layers for x in (layer.keys, layer.values)]
