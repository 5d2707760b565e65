"""A forward under DAPE, against masks that are worked out by loops over the regions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import batches, long, real, token_of
from tests.small import with_grid as family
from vlmrewrite.oracle import LayerMasks, layer_masks
from vlmrewrite.oracle.hooks import oracle_logits
from vlmrewrite.passes import DAPE
from vlmrewrite.runtime import session_of
from vlmrewrite.testing import strategies
from vlmrewrite.testing.agreement import logits_agreement
from vlmrewrite.testing.models import Row

FEW = settings(max_examples=max(4, settings.default.max_examples // 3))
HALF = settings(max_examples=max(4, settings.default.max_examples // 2))
BATCH = [Row(2, 1, 3), Row(0, 4, 2), Row(1, 3, 4), Row(3, 2, 1)]


def images_of(vision, grids):
    """(row, columns of the sequence, grid) of each image."""
    found, grids = [], iter(grids)
    for row, is_vision in enumerate(vision.tolist()):
        left = [c for c, v in enumerate(is_vision) if v]
        while left:
            rows, columns = next(grids)
            found.append((row, left[: rows * columns], (rows, columns)))
            left = left[rows * columns :]
    return found


def entry_of(now, before, vision, grids):
    """What happens to the stream at a layer's entry: new tokens become the averages of their regions."""

    def entry(x):
        old, x = x, x.clone()
        for row, image, (rows, columns) in images_of(vision, grids):
            tokens = {i for i, c in enumerate(image) if now[row, c]}
            owner = [token_of(i, tokens, rows, columns) for i in range(len(image))]
            for token in tokens:
                if not before[row, image[token]]:
                    inside = [image[i] for i, o in enumerate(owner) if o == token]
                    x[row, image[token]] = old[row, inside].mean(0)
        return x

    return entry


def masks_of(model):
    """What each layer did, with the averages made by loops."""
    last = session_of(model).last()
    call, chosen = last.call, last.result.chosen
    out, before = [], torch.zeros_like(call.vision)
    for layer in last.program.plan.layers:
        run, keys = call.members(layer.run_set, chosen), call.members(layer.keys, chosen)
        entry = entry_of(run & call.vision, before & call.vision, call.vision, call.grid().tolist())
        out.append(LayerMasks(run, keys, entry=entry))
        before = run
    return out


def dapes(most=36):
    shares = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), max_size=3).map(tuple)
    budget = st.integers(4, most) | st.integers(50, 99).map(lambda n: n / 100)
    return st.builds(
        DAPE, budget=budget, detail=shares, mode=st.just("split"), matching=st.sampled_from(["free", "learned"])
    )


@pytest.mark.slow
@HALF
@given(
    st.sampled_from(["llava", "llava", "qwen2_5_vl"] if long() else ["llava"]),
    dapes(),
    batches(),
    strategies.sides(),
    st.integers(0, 99),
)
def test_forward_agrees_with_the_oracle(name, dape, rows, side, seed):
    tiny = family(name)
    inputs = tiny.inputs(rows, side=side, seed=seed)
    with torch.no_grad(), vr.applied(tiny.model, [dape], strict=True):
        got = tiny.model(**inputs).logits
        masks, known = masks_of(tiny.model), layer_masks(tiny.model)
    logits_agreement(tiny.model, inputs, masks, got, real(inputs)).check()
    by_reference, by_loops = (oracle_logits(tiny.model, inputs, m)[real(inputs)] for m in (known, masks))
    torch.testing.assert_close(by_reference, by_loops, atol=1e-5 * max(float(got.abs().max()), 1), rtol=0)


@pytest.mark.slow
@FEW
@given(batches(), strategies.sides(), st.sampled_from(["free", "learned"]), st.sampled_from(["split", "inject"]))
def test_rows_do_not_depend_on_one_another_nor_on_padding(rows, side, matching, mode):
    tiny = family("llava")
    inputs = tiny.inputs(rows, side=side, seed=5)
    pictures = inputs["pixel_values"].split([row.images for row in rows])
    torch.manual_seed(0)
    with torch.no_grad(), vr.applied(tiny.model, [DAPE(budget=9, mode=mode, matching=matching)]):
        for p in tiny.model.parameters():
            if p.numel() == 1:
                p.data.fill_(0.7)
        together = tiny.model(**inputs).logits
        kept = [s.vision for s in vr.kept_tokens(tiny.model)]
        for i in (i for i, row in enumerate(rows) if row.images):
            mask = real(inputs)[i]
            alone = {"input_ids": inputs["input_ids"][i : i + 1, mask], "pixel_values": pictures[i]}
            got = tiny.model(**alone, attention_mask=torch.ones_like(alone["input_ids"])).logits[0]
            for whole, own in zip(kept, vr.kept_tokens(tiny.model), strict=True):
                assert torch.equal(whole[i, mask], own.vision[0])
            scale = float(together[i, mask].abs().max())
            torch.testing.assert_close(got, together[i, mask], atol=1e-5 * max(scale, 1), rtol=0)
