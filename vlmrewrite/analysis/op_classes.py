"""The operators of captured graphs in classes, by what they do to the token axis."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat, torch.Size)


def _named(names: str) -> set[Any]:
    """The tensor methods and functions with these names."""
    modules = (operator, torch, F, torch._C._nn, torch.linalg)
    functions: set[Any] = {getattr(m, n) for m in modules for n in names.split() if hasattr(m, n)}
    return functions | {n for n in names.split() if hasattr(Tensor, n)}


# An element of the result depends on the elements at its place in the inputs, with broadcasting.
_MAPS = (
    "add sub rsub mul div truediv true_divide floordiv floor_divide mod remainder fmod neg abs sign pow sqrt rsqrt"
    " square reciprocal exp exp2 expm1 log log1p log2 sin cos tan tanh atan atan2 erf sigmoid relu relu6 silu gelu mish"
    " elu selu celu leaky_relu softplus logsigmoid hardtanh hardswish hardsigmoid lt le gt ge eq ne and_ or_ xor invert"
    " logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not minimum maximum clamp clip clamp_min where"
    " clamp_max masked_fill lerp addcmul addcdiv nan_to_num isnan isinf isfinite round floor ceil trunc frac clone item"
    " zeros_like ones_like full_like"
)

POINTWISE = _named(_MAPS)

# The same of the first input; the result may be that input itself.
CASTS = _named("to float double half bfloat16 int long bool type type_as contiguous detach dropout")

EXPANSIONS = _named("expand expand_as broadcast_to repeat tile")

RESHAPES = _named("view reshape view_as reshape_as flatten unflatten unsqueeze")

LAYOUTS = _named("transpose permute swapaxes swapdims movedim moveaxis t view_as_real view_as_complex")

CONSTANTS, SIZES = _named("new_zeros new_ones"), _named("size dim numel")

STACK, LINEAR = _named("stack"), _named("linear")

NORMS, MATMULS = _named("layer_norm rms_norm"), _named("matmul bmm mm")

# Operations along a dimension: its place among the arguments, its default (None: all dimensions), their names.
_DIMENSIONS: list[tuple[int, int | None, str]] = [
    (1, None, "sum nansum mean nanmean prod amax amin max min argmax argmin all any std var std_mean var_mean"),
    (1, None, "softmax log_softmax softmin logsumexp median nanmedian cumsum cumprod cummax cummin logcumsumexp"),
    (1, None, "select narrow index_select gather scatter scatter_add squeeze"),
    (1, -1, "sort argsort mode glu"),
    (1, 0, "cat unbind"),
    (2, None, "norm vector_norm quantile nanquantile repeat_interleave roll take_along_dim"),
    (2, -1, "topk kthvalue diff"),
    (2, 0, "chunk split tensor_split"),
    (2, 1, "normalize"),
]

ALONG = {target: (place, default) for place, default, names in _DIMENSIONS for target in _named(names)}

MEETING = _named("cat gather scatter scatter_add take_along_dim")  # all inputs must have the same axes

# Whose results share no memory with their inputs; the last ones mix tokens.
_PIECES = _named("select narrow squeeze unbind chunk split tensor_split")

FRESH = POINTWISE | CONSTANTS | STACK | LINEAR | NORMS | MATMULS | (ALONG.keys() - _PIECES)

FRESH |= _named("repeat tile masked_scatter embedding scaled_dot_product_attention pad")

# Operations in place, and those that return a new tensor instead; then where others take ``inplace``.
IN_PLACE: dict[Any, Any] = {f"{n}_": n for n in [*_MAPS.split(), "scatter", "scatter_add"] if hasattr(Tensor, n)}

IN_PLACE |= {getattr(m, f"{n}_"): getattr(m, n) for m in (torch, F) for n in _MAPS.split() if hasattr(m, f"{n}_")}

_AUGMENTED = "add sub mul truediv floordiv mod pow and_ or_ xor".split()

IN_PLACE |= {getattr(operator, f"i{n.strip('_')}"): getattr(operator, n) for n in _AUGMENTED}

IN_PLACE |= {"copy_": "clone", "zero_": "clone", "fill_": "clone", operator.setitem: operator.setitem}

FLAG = {"elu": 2, "celu": 2, "leaky_relu": 2, "dropout": 3, "hardtanh": 3, "threshold": 3}

FLAG |= dict.fromkeys("relu relu6 silu mish selu hardswish hardsigmoid".split(), 1)

SIZED = EXPANSIONS | RESHAPES | CONSTANTS | {operator.getitem}  # which may take the number of tokens
