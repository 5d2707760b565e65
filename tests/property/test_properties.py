"""Rewritten models agree with the oracle over random batches and passes; 2,800 examples in the long profile."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import batches, long
from tests.small import family as model_of
from vlmrewrite.testing import strategies
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row, TinyVLM

_LLAVA = [(name, depth) for name in ("llava", "llava_qwen2") for depth in (4, 4, 4, 2, 5)]
_OTHERS = [(name, 4) for name in FAMILIES if not name.startswith("llava") or name == "llava_next"]
_FEW = [("llava", 4), ("llava", 4), ("llava", 2)]
_ANY = st.sampled_from(_LLAVA + _OTHERS[: len(_LLAVA) // 2] if long() else _FEW)
_DTYPES = [torch.float32] * 3 + [torch.bfloat16, torch.float64] if long() else [torch.float32, torch.float64]


@given(st.data(), _ANY, batches(), strategies.sides(), st.integers(1, 4), st.integers(0, 99))
def test_generation_agrees_with_the_oracle(data, family, rows, side, new_tokens, seed):
    tiny = model_of(*family)
    passes = data.draw(strategies.pass_lists(family[1]))
    inputs = tiny.inputs(rows, side=side, seed=seed)
    agreement = generation_agreement(tiny.model, inputs, passes, new_tokens)
    agreement.check()
    assert agreement.tokens.shape == (len(rows), new_tokens)


@given(st.data(), _ANY, batches(), strategies.sides(), st.integers(0, 99))
def test_compositions_of_techniques_agree_with_the_oracle(data, family, rows, side, seed):
    tiny = model_of(*family)
    passes = data.draw(strategies.techniques(family[1]))
    inputs = tiny.inputs(rows, side=side, seed=seed)
    agreement = generation_agreement if side == "left" else forward_agreement
    agreement(tiny.model, inputs, passes, strict=False).check()  # some leave nothing for those that come later


@given(
    st.data(),
    _ANY,
    st.sampled_from(_DTYPES),
    batches(),
    strategies.sides(),
    st.integers(0, 99),
)
def test_forward_agrees_with_the_oracle(data, family, dtype, rows, side, seed):
    tiny = model_of(*family, dtype if family == ("llava", 4) else torch.float32)
    passes = data.draw(strategies.pass_lists(family[1]))
    inputs = tiny.inputs(rows, side=side, seed=seed)
    inputs["pixel_values"] = inputs["pixel_values"].to(tiny.model.dtype)
    forward_agreement(tiny.model, inputs, passes).check()


@given(
    st.sampled_from(["llava", "llava_qwen2"] if long() else ["llava_qwen2"]),
    batches(),
    strategies.sides(),
    strategies.pass_lists(4),
    st.integers(0, 99),
)
def test_rows_do_not_depend_on_one_another(family, rows, side, passes, seed):
    tiny = model_of(family, 4)
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
