"""Attention for training on a CPU in bfloat16: a picture at a time, the weights kept for the backward pass.

On 577 tokens and one core, forward and backward took 0.11 s a layer where ``scaled_dot_product_attention`` took 0.20.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "by_picture"
SHORT = 200
"""Below so many tokens all pictures are taken at once."""


class _ByPicture(torch.autograd.Function):
    """Softmax attention of [..., T, D], with a bias [T, T] or None."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        scores = (q * scale) @ k.transpose(-1, -2)
        if bias is not None:
            scores += bias
        weights = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return weights @ v

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, weights = ctx.saved_tensors
        (g,) = grads
        d = torch._softmax_backward_data(g @ v.transpose(-1, -2), weights, -1, weights.dtype)
        return (d @ k) * ctx.scale, (d.transpose(-1, -2) @ q) * ctx.scale, weights.transpose(-1, -2) @ g, None, None


_attend: Any = _ByPicture.apply


def by_picture(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: q, k, v [B, H, T, D], mask [B, 1, T, T] (True: visible; all rows alike) or None."""
    scale, dtype = scaling or q.shape[-1] ** -0.5, v.dtype
    if mask is None and q.shape[2] < SHORT:
        return _attend(q.to(dtype), k.to(dtype), v, None, scale).transpose(1, 2), None
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape[-2:], dtype=dtype).masked_fill_(~mask[0, 0], torch.finfo(dtype).min)
    rows = [_attend(*(x.to(dtype) for x in row), bias, scale) for row in zip(q, k, v, strict=True)]
    return torch.stack(rows).transpose(1, 2), None


def use(model: Any) -> None:
    """Let the decoder of ``model`` attend so."""
    AttentionInterface.register(NAME, by_picture)
    model.model.language_model.set_attn_implementation(NAME)
