"""Whether a rewritten model agrees with the oracle, within what floating point allows."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmrewrite.api import applied
from vlmrewrite.compat import generation_inputs, generation_positions, set_experts_implementation
from vlmrewrite.hf import dequantise, on_base_model
from vlmrewrite.oracle import LayerMasks, layer_masks, oracle_logits
from vlmrewrite.runtime import kept_tokens, session_of

SLACK = 8
"""How many times the oracle's own error in the model's dtype a rewritten model may be away from the oracle in fp64.

The error budget: both add up the same terms in another order (the rewritten model leaves out terms that are exactly
zero), so that their rounding errors are two draws from one distribution. For normal errors with k independent parts,
the square of the ratio of the two is F(k, k)-distributed, and the ratio's logarithm has mean 0 and standard deviation
sqrt(trigamma(k / 2) / 2). Seen in 2,900 random plans and batches on the tiny models (CPU; fp16, bf16, fp32 and fp64;
forward and generation): mean -0.07 to 0; standard deviation 0.20 to 0.26 over a batch's tokens, 0.32 for the logits of
one token, which is k = 10; largest ratio 3.2. P(F(10, 10) > 8^2) = 1e-7 is the chance of a false alarm in one example;
with 4 in place of 8 it would be 7e-5, some in every long run."""

_DOUBLES: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


class InFloat64(TorchFunctionMode):
    """While it is active, what casts to float32 casts to float64.

    Norms, rope and softmax of Hugging Face models compute in float32 whatever the model's dtype is; under this mode, a
    model in float64 computes in float64 throughout. Constants that a model makes in the default dtype stay as they are,
    like its parameters: they are the same numbers in both.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        more = kwargs or {}
        filled = isinstance(args[1] if len(args) > 1 else more.get("fill_value"), float)
        if func is torch.full and "dtype" not in more and filled:
            kwargs = {**more, "dtype": torch.float64}  # of the lowest number of the model's dtype, say
        wider = [torch.float64 if x is torch.float32 else x for x in args]
        return func(*wider, **{k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()})


@dataclass(frozen=True)
class Agreement:
    """How a run compares with the oracle.

    Attributes:
        error: largest absolute difference of a logit from the oracle in fp64 (see
            :class:`InFloat64`).
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


@on_base_model
def forward_agreement(
    model: nn.Module, inputs: dict[str, Any], recipe: Any, *, strict: bool = True, **options: Any
) -> Agreement:
    """Compare one plain forward, at every token that is not padding.

    Args:
        model: an unmodified model in eval mode.
        inputs: what its forward takes, with an image.
        recipe, options: as for :func:`vlmrewrite.apply`.
        strict: raise when a pass is refused, for it has done nothing that could be compared; False: pass it over.

    Raises:
        ValueError: a pass is refused and ``strict`` is set.
    """
    with torch.no_grad(), applied(model, recipe, strict=strict, **options):
        got = model(**inputs).logits
        masks = layer_masks(model)
    real = inputs["attention_mask"].bool() if inputs.get("attention_mask") is not None else None
    return logits_agreement(model, inputs, masks, got, real)


@on_base_model
def generation_agreement(
    model: nn.Module, inputs: dict[str, Any], recipe: Any, new_tokens: int = 4, *, strict: bool = True, **options: Any
) -> Agreement:
    """Compare greedy generation, token by token: the oracle runs on the sequence that came out, without a cache.

    Args:
        model, inputs, recipe, strict, options: as for :func:`forward_agreement`.
        new_tokens: how many to generate.

    Raises:
        ValueError: a pass is refused and ``strict`` is set.
    """
    model_any: Any = model
    with torch.no_grad(), applied(model, recipe, strict=strict, **options):
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
        last = session_of(model).last()
        keyless, own = last.result.plan.keyless, [e.index for e in last.result.plan.layers if e.owner is None]
        longest = [max(last.call.counts.size(plan.layers[i].keys) for plan in last.plans) for i in own]
        planned = [0 if i in keyless else n + new_tokens - 1 for i, n in zip(own, longest, strict=True)]
        kept_tokens(model)
    longer = extended(model, inputs, out.sequences[:, prompt:-1])
    got = torch.stack(out.logits, 1)
    found = logits_agreement(model, longer, masks, got)
    return replace(
        found, tokens=out.sequences[:, prompt:], kv_lengths=out.past_key_values.kv_lengths(), planned=planned
    )


def extended(model: nn.Module, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """A forward's inputs for prompt and generated tokens [B, n], with the positions that ``generate()`` gives them.

    See :func:`vlmrewrite.oracle.positioned` for a forward that does not take positions by name.
    """
    n = tokens.shape[1]
    out = dict(inputs)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    out["position_ids"] = _positions(model, inputs | {"attention_mask": mask}, tokens)
    out["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    out["attention_mask"] = F.pad(mask, (0, n), value=1)
    kinds = {k: inputs[k] for k in ("token_type_ids", "mm_token_type_ids") if inputs.get(k) is not None}
    for name in inputs.keys() - {"input_ids", "attention_mask", "position_ids", *kinds}:
        if isinstance(x := inputs[name], Tensor) and x.shape == mask.shape:  # it says something of each token
            out[name] = F.pad(x, (0, n))
    for _ in range(n):
        kinds = generation_inputs(model, kinds)
    return out | kinds


def _positions(model: nn.Module, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Positions of a prompt and of generated tokens [B, n], as the model counts them when it generates."""
    ids: Tensor = inputs["input_ids"]
    from_ids: Any = next((m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids")), None)
    if from_ids is None:
        positions = generation_positions(model, ids, inputs)
        return torch.cat([positions, positions[..., -1:] + torch.arange(1, tokens.shape[1] + 1, device=ids.device)], -1)
    steps = [(0, ids), *enumerate(tokens.split(1, 1), ids.shape[1])]
    each = [from_ids.create_position_ids_from_input_ids(x, from_ids.padding_idx, past) for past, x in steps]
    return torch.cat(each, 1)


def logits_agreement(
    model: nn.Module, inputs: dict[str, Any], masks: Sequence[LayerMasks], got: Tensor, real: Tensor | None = None
) -> Agreement:
    """Compare logits that came out of a rewritten model, however it was called.

    Args:
        model: the model, unmodified again, in eval mode.
        inputs: what one forward over the whole sequence takes.
        masks: what each layer did, over the whole sequence.
        got: logits of the last n tokens of it, [B, n, V].
        real: where they are compared, bool [B, n]; None: everywhere.
    """
    single = oracle_logits(model, inputs, masks)[:, -got.shape[1] :]
    wide = _double(model), _doubled(inputs), [_in_double(m) for m in masks]
    with InFloat64():
        exact = oracle_logits(*wide)[:, -got.shape[1] :]
    if real is None:
        real = torch.ones(got.shape[:2], dtype=torch.bool, device=got.device)
    scale = torch.finfo(got.dtype).eps * float(exact.abs().max())
    budget = max(float((single - exact).abs().amax(-1)[real].max()), scale)
    return Agreement(float((got - exact).abs().amax(-1)[real].max()), SLACK * budget)


def _double(model: nn.Module) -> nn.Module:
    if model not in _DOUBLES:
        _DOUBLES[model] = exact = copy.deepcopy(model)
        dequantise(exact)
        exact.double()
        for module in exact.modules():
            if "config" in vars(module):
                set_experts_implementation(module.config, "eager")  # the others have no fp64
    return _DOUBLES[model]


def _in_double(entry: LayerMasks) -> LayerMasks:
    blocks = [None if b.block is None else copy.deepcopy(b.block).double() for b in entry.branches]
    branches = tuple(replace(b, block=block) for b, block in zip(entry.branches, blocks, strict=True))
    return replace(entry, branches=branches)


def _doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
