"""The training loss of DAPE: its formulas by loops, its gradients, and three steps on the bundled model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import family
from vlmrewrite.passes import DAPE, VISOR, Stride
from vlmrewrite.passes.dape.blocks import Matching
from vlmrewrite.passes.dape.losses import contrast, dape_loss, occupancy
from vlmrewrite.passes.dape.matching import aligned
from vlmrewrite.plan.blocks import ATTRIBUTE
from vlmrewrite.testing.models import Row

EXAMPLES = Path(__file__).parents[2] / "examples"
BATCH = [Row(2, 1, 5), Row(0, 4, 4), Row(1, 3, 6), Row(3, 2, 4)]
TRAINED = DAPE(budget=0.5, mode="inject", matching="learned")


def labelled(tiny, rows=BATCH, side="left", answer=2):
    """The last two tokens of each row that are not padding are the answer."""
    inputs = tiny.inputs(rows, side=side)
    ends = inputs["attention_mask"].cumsum(1)
    answered = (ends > ends[:, -1:] - answer) & inputs["attention_mask"].bool()
    return inputs | {"labels": torch.where(answered, inputs["input_ids"], -100)}


# ---- the formulas


@st.composite
def matches(draw, rows=3):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    texts = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=6))
    regions = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=8))
    rho = torch.rand(len(texts), generator=generator, dtype=torch.float64) * 0.9 + 0.05
    z = torch.randn(len(texts), len(regions), generator=generator, dtype=torch.float64)
    return rho, z, torch.tensor(texts)[:, None] == torch.tensor(regions)[None]


@given(matches())
def test_contrast_by_loops(case):
    rho, z, own = case
    lost = weight = 0.0
    for r, row, mine in zip(rho.tolist(), z.tolist(), own.tolist(), strict=True):
        if any(mine) and not all(mine):
            good = sum(math.exp(x) for x, m in zip(row, mine, strict=True) if m)
            lost, weight = lost - r * math.log(good / sum(map(math.exp, row))), weight + r
    assert float(contrast(rho, z, own)) == pytest.approx(lost / weight if weight else 0.0, abs=1e-9)


@given(matches())
def test_occupancy_by_loops(case):
    rho, z, own = case
    shares = []
    for r, row, mine in zip(rho.tolist(), z.tolist(), own.tolist(), strict=True):
        inside = [x for x, m in zip(row, mine, strict=True) if m]
        if inside:
            span = max(max(inside) - min(inside), 1e-6)
            scaled = [(x - min(inside)) / span for x in inside]
            shares.append(sum(1 / (1 + math.exp((0.9 - 0.3 * r - s) / 0.05)) for s in scaled) / 2.0)
    expected = (sum(shares) / len(shares) - 1) ** 2 if shares else 0.0
    target = torch.full_like(rho, 2.0)
    assert float(occupancy(rho, z, own, target)) == pytest.approx(expected, abs=1e-9)


def test_the_soft_count_is_about_the_count_of_the_rule():
    generator = torch.Generator().manual_seed(0)
    rho, z = torch.rand(400, generator=generator), torch.randn(400, 40, generator=generator)
    counted = (aligned(rho, z, 40) > 0).sum(1).float().mean()
    every = torch.ones_like(z, dtype=torch.bool)
    assert float(occupancy(rho, z, every, counted.expand(400))) < 0.02


# ---- a model


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_parameter_of_the_blocks_learns_and_no_other(name, side):
    tiny = family(name)
    inputs = labelled(tiny, side=side)
    torch.manual_seed(0)
    everywhere = DAPE(budget=0.5, detail=(1.0, 1.0, 1.0), mode="inject", matching="learned")
    with vr.applied(tiny.model, [everywhere], strict=True) as model:
        for n, p in model.named_parameters():
            if n.endswith(".gate"):
                p.data.fill_(0.5)
        loss = dape_loss(model, inputs)
        assert float(loss.total.detach()) == pytest.approx(
            float((loss.lm + 0.1 * loss.alignment + 0.01 * loss.counts).detach()), abs=1e-6
        )
        assert loss.alignment > 0.1
        (loss.alignment + loss.counts).backward()
        learnt = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert set(learnt) == {f"{ATTRIBUTE}.dape_matching.{n}" for n in Matching.NAMES}
        dape_loss(model, inputs).total.backward()
        blocks = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert blocks == {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(n.startswith(ATTRIBUTE) for n in blocks)


@pytest.mark.slow
def test_regions_are_chosen_without_a_look_at_the_answer():
    tiny = family("llava")
    inputs = labelled(tiny)
    other = inputs | {"input_ids": torch.where(inputs["labels"] != -100, 9, inputs["input_ids"])}
    with vr.applied(tiny.model, [DAPE(budget=9, matching="learned")]) as model:
        found = []
        for given_ in (inputs, other):
            parts = dape_loss(model, given_)
            found.append((parts, [s.vision for s in vr.kept_tokens(model)]))
        prompt = {n: x for n, x in inputs.items() if n != "labels"}
        prompt = {n: x[:, :-2] if n in ("input_ids", "attention_mask") else x for n, x in prompt.items()}
        with torch.no_grad():
            model.generate(**prompt, max_new_tokens=1)
        generated = [s.vision for s in vr.kept_tokens(model)]
    (a, kept), (b, same) = found
    assert a.lm != b.lm
    assert (a.alignment, a.counts) == (b.alignment, b.counts)
    for x, y, z in zip(kept, same, generated, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[:, :-2], z)


def test_with_other_passes_and_a_target():
    tiny = family("llava")
    inputs = labelled(tiny)
    for passes in ([VISOR([0, 2], [1]), TRAINED], [TRAINED, Stride(keep=3, at=2)], [TRAINED, Stride(keep=3)]):
        with vr.applied(tiny.model, passes, strict=True) as model:
            few, many = (dape_loss(model, inputs, target=n).counts for n in (0.5, 50.0))
            assert few != many
            assert many > 0.5


@pytest.mark.slow
def test_one_row_has_nothing_to_contrast():
    tiny = family("llava")
    with vr.applied(tiny.model, [TRAINED]) as model:
        loss = dape_loss(model, labelled(tiny, [Row(1, 2, 4)]))
    assert loss.alignment == 0
    assert loss.counts > 0


def test_bad_input():
    tiny = family("llava")
    inputs = labelled(tiny)
    plain = {n: x for n, x in inputs.items() if n != "labels"}
    text = {n: inputs[n][1:2] for n in ("input_ids", "attention_mask", "labels")}
    with pytest.raises(ValueError, match="is not rewritten"):
        dape_loss(tiny.model, inputs)
    with vr.applied(tiny.model, [TRAINED]) as model:
        for wrong, message in (
            (plain, "expected labels with a label among the inputs, got input_ids, attention_mask, pixel_values"),
            (inputs | {"labels": torch.full_like(inputs["labels"], -100)}, "expected labels with a label"),
            ({n: x for n, x in inputs.items() if n != "input_ids"}, "expected input_ids among the inputs"),
            (text, "the inputs hold no image"),
        ):
            with pytest.raises(ValueError, match=message):
                dape_loss(model, wrong)
        with pytest.raises(ValueError, match="target=0; expected a number of regions greater than 0"):
            dape_loss(model, inputs, target=0)
    with (
        vr.applied(tiny.model, [DAPE(budget=0.5, mode="inject")]) as model,
        pytest.raises(ValueError, match="no DAPE with matching='learned' is applied"),
    ):
        dape_loss(model, inputs)


@pytest.fixture(scope="module")
def digits():
    sys.path.insert(0, str(EXAMPLES))
    try:
        from digits import model, scenes
    finally:
        sys.path.remove(str(EXAMPLES))
    return model, scenes


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize(("seed", "rate"), [(0, 3e-2), (1, 3e-2), (0, 1e-3)])
def test_three_steps_on_the_bundled_model_reduce_the_loss(digits, seed, rate):
    bundled, scenes = digits
    model, processor = bundled.load()
    records = scenes.held_out_questions(16, scenes.EVALUATION_SEED + seed)
    inputs = dict(bundled.encode(processor, records))
    answers = processor.tokenizer([r.answer for r in records], add_special_tokens=False, return_tensors="pt").input_ids
    inputs["labels"] = torch.cat([torch.full_like(inputs["input_ids"], -100), answers[:, :1]], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answers[:, :1]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    torch.manual_seed(seed)
    vr.apply(model, [TRAINED], strict=True)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate)
    losses = []
    for _ in range(4):
        loss = dape_loss(model, inputs)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append([float(x.detach()) for x in loss])
    before, after = losses[0], losses[3]
    assert after[0] < before[0]
    assert after[3] < before[3]
    if seed == 0:
        assert after[1] < before[1]
        assert after[2] < before[2]
