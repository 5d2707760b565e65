"""The linear maps of a mixture of experts: the rest of it is element by element, or a sum over a token's experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from vlmrewrite.compat import grouped_mm
from vlmrewrite.ops.library import define


def expert_linear(
    x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """The linear map of each expert that a token goes to.

    Args:
        x: one vector a token, [N, C], or one for each of its experts, [N, k, C].
        experts: which experts, int64 [N, k], from 0 to E - 1.
        weight: [E, D, C]; where ``transposed``, [E, C, D].
        bias: [E, D].

    Returns:
        [N, k, D], dtype of ``weight``.
    """
    if has_torch_function((weight,)):  # a weight that is brought for this call
        given = x, experts, weight, bias, transposed
        return handle_torch_function(expert_linear, (weight,), *given)
    n, k = experts.shape
    by_expert, order = experts.flatten().sort(stable=True)
    rows = x[order // k] if x.dim() == 2 else x.flatten(0, 1)[order]
    ends = torch.searchsorted(by_expert, torch.arange(len(weight), device=x.device), right=True, out_int32=True)
    out = grouped_mm(rows, weight if transposed else weight.transpose(1, 2), ends)
    if bias is not None:
        out = out + bias[by_expert]
    return out[order.argsort()].view(n, k, out.shape[-1])


define(
    "expert_linear(Tensor x, Tensor experts, Tensor weight, Tensor? bias=None, bool transposed=False) -> Tensor",
    expert_linear,
)

EXPERT_LINEAR = torch.ops.vlm.expert_linear.default
