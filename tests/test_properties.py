"""Rewritten models agree with the oracle over random batches and passes. 2,000 examples in the long profile."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmrewrite as vr
from vlmrewrite.testing import strategies
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row, TinyVLM

_MODELS = {name: FAMILIES[name]() for name in ("llava", "llava_qwen2")}
_MANY = st.sampled_from(["llava"] * 3 + ["llava_qwen2"] * 3 + [f for f in FAMILIES if f not in _MODELS])


def model_of(name: str) -> TinyVLM:
    if name not in _MODELS:
        _MODELS[name] = FAMILIES[name]()
    return _MODELS[name]


def depth_of(tiny: TinyVLM) -> int:
    return len(tiny.model.get_decoder().layers)


@given(_MANY, strategies.rows(), strategies.sides(), strategies.pass_lists(4), st.integers(1, 4), st.integers(0, 99))
def test_generation_agrees_with_the_oracle(family, rows, side, passes, new_tokens, seed):
    tiny = model_of(family)
    inputs = tiny.inputs(rows, side=side, seed=seed)
    agreement = generation_agreement(tiny.model, inputs, passes, new_tokens)
    agreement.check()
    sequence = torch.cat([inputs["input_ids"], agreement.tokens], 1)
    assert sequence.shape[1] == inputs["input_ids"].shape[1] + new_tokens


@given(_MANY, strategies.rows(), strategies.sides(), strategies.pass_lists(4), st.integers(0, 99))
def test_forward_agrees_with_the_oracle(family, rows, side, passes, seed):
    tiny = model_of(family)
    forward_agreement(tiny.model, tiny.inputs(rows, side=side, seed=seed), passes).check()


@given(
    st.sampled_from(["llava", "llava_qwen2"]),
    strategies.rows(),
    strategies.sides(),
    strategies.pass_lists(4),
    st.integers(0, 99),
)
def test_rows_do_not_depend_on_one_another(family, rows, side, passes, seed):
    tiny = model_of(family)
    inputs = tiny.inputs(rows, side=side, seed=seed)
    encoded = _encoded(tiny, inputs, rows)
    with torch.no_grad(), vr.applied(tiny.model, passes):
        together = tiny.model(**encoded(slice(None))).logits
        kept = [s.vision for s in vr.kept_tokens(tiny.model)]
        for i in (i for i, row in enumerate(rows) if row.images):
            real = inputs["attention_mask"][i].bool()
            alone = tiny.model(**encoded(slice(i, i + 1))).logits[0]
            for whole, own in zip(kept, vr.kept_tokens(tiny.model), strict=True):
                assert torch.equal(whole[i, real], own.vision[0])
            scale = float(together[i, real].abs().max())
            torch.testing.assert_close(alone, together[i, real], atol=1e-5 * max(scale, 1), rtol=0)


def _encoded(tiny: TinyVLM, inputs: dict[str, Any], rows: list[Row]) -> Any:
    """Inputs of some of the rows, without padding if it is one, with the very same features."""
    with torch.no_grad():
        features = tiny.model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    counts = [row.images for row in rows]

    def of(which: slice) -> dict[str, Any]:
        first, last = range(len(rows))[which][0], range(len(rows))[which][-1] + 1
        ids, mask = inputs["input_ids"][which], inputs["attention_mask"][which]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if len(ids) == 1:
            real = mask[0].bool()
            ids, mask, positions = ids[:, real], mask[:, real], positions[:, real]
        pooled = features.pooler_output[sum(counts[:first]) : sum(counts[:last])]
        output = type(features)(pooler_output=list(pooled))
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "mm_encoder_outputs": {"image": output},
        }

    return of
