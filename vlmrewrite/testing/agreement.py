"""Whether a rewritten model agrees with the oracle, within what floating point allows."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmrewrite.install import applied, kept_tokens, layer_masks, planned_lengths
from vlmrewrite.testing.oracle import LayerMasks, oracle_logits

SLACK = 8
"""How many times the oracle's own fp32 error a rewritten model may be away from the fp64 oracle: it adds up in another
order, over compacted tokens, but no more terms."""

_DOUBLES: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Agreement:
    """How a run compares with the oracle.

    Attributes:
        error: largest absolute difference of a logit from the oracle in fp64.
        tolerance: what the oracle itself is off in the model's dtype, times :data:`SLACK`.
        tokens: generated tokens, int64 [B, n]; None for a plain forward.
        kv_lengths: keys each layer holds after generating; None for a plain forward.
        planned: what the plan says they should be.
    """

    error: float
    tolerance: float
    tokens: Tensor | None = None
    kv_lengths: list[int] | None = None
    planned: list[int] | None = None

    def check(self) -> None:
        """Raise AssertionError if it does not agree."""
        assert self.error <= self.tolerance, f"logits are {self.error:.3g} off; {self.tolerance:.3g} is allowed"
        assert self.kv_lengths == self.planned, f"K/V lengths {self.kv_lengths}; {self.planned} were planned"


def forward_agreement(model: nn.Module, inputs: dict[str, Any], recipe: Any, **options: Any) -> Agreement:
    """Compare one plain forward, at every token that is not padding.

    Args:
        model: an unmodified model in eval mode.
        inputs: what its forward takes, with an image.
        recipe, options: as for :func:`vlmrewrite.apply`.
    """
    with torch.no_grad(), applied(model, recipe, **options):
        got = model(**inputs).logits
        masks = layer_masks(model)
    real = inputs["attention_mask"].bool() if inputs.get("attention_mask") is not None else None
    return Agreement(*_compare(model, inputs, masks, got, real))


def generation_agreement(
    model: nn.Module, inputs: dict[str, Any], recipe: Any, new_tokens: int = 4, **options: Any
) -> Agreement:
    """Compare greedy generation, token by token: the oracle runs on the sequence that came out, without a cache.

    Args:
        model, inputs, recipe, options: as for :func:`forward_agreement`.
        new_tokens: how many to generate.
    """
    model_any: Any = model
    with torch.no_grad(), applied(model, recipe, **options):
        out = model_any.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        prompt = inputs["input_ids"].shape[1]
        masks = layer_masks(model, prompt + new_tokens - 1)
        planned = [n + new_tokens - 1 for n in planned_lengths(model)]
        kept_tokens(model)
    longer = extended(model, inputs, out.sequences[:, prompt:-1])
    got = torch.stack(out.logits, 1)
    error, tolerance = _compare(model, longer, masks, got, None)
    return Agreement(error, tolerance, out.sequences[:, prompt:], out.past_key_values.kv_lengths(), planned)


def extended(model: nn.Module, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """A forward's inputs for prompt and generated tokens [B, n], with the positions that ``generate()`` gives them."""
    n = tokens.shape[1]
    out = dict(inputs)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    prepare: Any = model._prepare_position_ids_for_generation
    known = {k: v for k, v in inputs.items() if k != "input_ids"} | {"attention_mask": mask}
    positions = prepare(inputs["input_ids"], {**known, "input_ids": inputs["input_ids"]})
    more = positions[..., -1:] + torch.arange(1, n + 1)
    out["position_ids"] = torch.cat([positions, more], -1)
    out["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    out["attention_mask"] = F.pad(mask, (0, n), value=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if inputs.get(name) is not None:
            out[name] = F.pad(inputs[name], (0, n))
    return out


def _compare(
    model: nn.Module, inputs: dict[str, Any], masks: list[LayerMasks], got: Tensor, real: Tensor | None
) -> tuple[float, float]:
    single = oracle_logits(model, inputs, masks)[:, -got.shape[1] :]
    exact = oracle_logits(_double(model), _doubled(inputs), masks)[:, -got.shape[1] :]
    if real is None:
        real = torch.ones(got.shape[:2], dtype=torch.bool, device=got.device)
    scale = torch.finfo(got.dtype).eps * float(exact.abs().max())
    budget = max(float((single - exact).abs().amax(-1)[real].max()), scale)
    return float((got - exact).abs().amax(-1)[real].max()), SLACK * budget


def _double(model: nn.Module) -> nn.Module:
    if model not in _DOUBLES:
        _DOUBLES[model] = copy.deepcopy(model).double()
    return _DOUBLES[model]


def _doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
