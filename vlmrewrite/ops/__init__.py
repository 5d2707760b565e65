"""The semantic operators ``torch.ops.vlm.*``: each with its PyTorch reference, and for some a Triton kernel.

In: tensors. Out: tensors. Which implementation a node gets is chosen in :mod:`vlmrewrite.lower`, by the rules here.
"""

from vlmrewrite.ops.attention import ATTENTION, FREE, KV_APPEND, attend, attention, free_slots, kv_append, visible
from vlmrewrite.ops.choice import Backend, Choice, Kernels, Running, choose, resolve, unfit
from vlmrewrite.ops.device import interpreted, kernels_missing
from vlmrewrite.ops.experts import EXPERT_LINEAR, expert_linear
from vlmrewrite.ops.greedy import (
    Products,
    channel_order,
    greedy_choice,
    greedy_scratch,
    order_of,
    product_rounding,
    reordered,
    small_first,
    upper_products,
)
from vlmrewrite.ops.indexed import INDEX_KEYS, INDEXED, flops_of_indexed
from vlmrewrite.ops.library import KERNELS, OPAQUE, REFERENCES, SCRATCH, define, replaced
from vlmrewrite.ops.linear import Differentiable
from vlmrewrite.ops.mixers import FEEDFORWARD, fill
from vlmrewrite.ops.positional import (
    attention_blocks,
    kernel_attention,
    kernel_mask,
    kernel_mask_everywhere,
    kernel_mask_softcapped,
    seen_by_position,
    unhidden,
)
from vlmrewrite.ops.recurrent import RECURRENT, mixers_swapped, recurrent, swap_mixers
from vlmrewrite.ops.renewals import SIDE, Array, Places, Renewals, added_in_order, pairwise
from vlmrewrite.ops.rows import ROWS, TOKENS, Along, Join, Run, cut, joined
from vlmrewrite.ops.scoring import counted, greedy_flops, least_of, like_member, per_image, shared_out
from vlmrewrite.ops.selection import select, token_index
from vlmrewrite.ops.whole import keep_whole, know, whole_until

__all__ = [
    "ATTENTION",
    "EXPERT_LINEAR",
    "FEEDFORWARD",
    "FREE",
    "INDEXED",
    "INDEX_KEYS",
    "KERNELS",
    "KV_APPEND",
    "OPAQUE",
    "RECURRENT",
    "REFERENCES",
    "ROWS",
    "SCRATCH",
    "SIDE",
    "TOKENS",
    "Along",
    "Array",
    "Backend",
    "Choice",
    "Differentiable",
    "Join",
    "Kernels",
    "Places",
    "Products",
    "Renewals",
    "Run",
    "Running",
    "added_in_order",
    "attend",
    "attention",
    "attention_blocks",
    "channel_order",
    "choose",
    "counted",
    "cut",
    "define",
    "expert_linear",
    "fill",
    "flops_of_indexed",
    "free_slots",
    "greedy_choice",
    "greedy_flops",
    "greedy_scratch",
    "interpreted",
    "joined",
    "keep_whole",
    "kernel_attention",
    "kernel_mask",
    "kernel_mask_everywhere",
    "kernel_mask_softcapped",
    "kernels_missing",
    "know",
    "kv_append",
    "least_of",
    "like_member",
    "mixers_swapped",
    "order_of",
    "pairwise",
    "per_image",
    "product_rounding",
    "recurrent",
    "reordered",
    "replaced",
    "resolve",
    "seen_by_position",
    "select",
    "shared_out",
    "small_first",
    "swap_mixers",
    "token_index",
    "unfit",
    "unhidden",
    "upper_products",
    "visible",
    "whole_until",
]
