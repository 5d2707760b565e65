"""The dialect: semantic operations on token sets, each defined by its PyTorch reference.

Every function here without a leading underscore is the *meaning* of the ``torch.ops.vlm`` operator of the same name.
Rewritten graphs contain the operators; lowering replaces each by its reference or by a kernel. Shapes use B rows, T
tokens of the full sequence, n tokens of a set, H heads (Hk of keys), D head size, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmrewrite.ops.library import define


def token_index(member: Tensor, padding: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """The members of a token set as a sorted index of fixed length.

    Args:
        member: bool [B, T].
        padding: bool [B, T], True for real tokens, or None.
        n: length; at least the largest number of members in a row. Rows with fewer members are filled up with
            padding tokens first, then with others, all marked invalid.

    Returns:
        index int64 [B, n], ascending in each row; valid bool [B, n].
    """
    rank = member.to(torch.int8) * 2
    if padding is not None:
        rank = rank + (~padding).to(torch.int8)
    index = rank.argsort(dim=1, descending=True, stable=True)[:, :n].sort(dim=1).values
    return index, member.gather(1, index)


def select(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Gather the tokens of a set: x [B or 1, ..., T, ...] with T at ``dim``, index [B, n] -> [B, ..., n, ...]."""
    if index.shape[0] == 1 and x.shape[0] == 1:
        return x.index_select(dim, index[0])
    x = x.expand(index.shape[0], *x.shape[1:]).movedim(dim, 1)
    rows = torch.arange(index.shape[0], device=x.device)[:, None]
    return x[rows, index].movedim(1, dim)


def relative_index(outer: Tensor, index: Tensor) -> Tensor:
    """Where the tokens of ``index`` [B, n] stand in the larger set ``outer`` [B, m]; both ascending in each row.

    Empty slots of ``index`` point at some token of ``outer``.
    """
    return torch.searchsorted(outer, index).clamp(max=outer.shape[1] - 1)


def restore(full: Tensor, part: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Write the valid rows of ``part`` [B, n, C] over ``full`` [B, T, C] at ``index`` [B, n]; the rest is kept."""
    rows = torch.arange(len(index), device=full.device)[:, None]
    new = torch.where(valid[..., None], part, full[rows, index])
    return full.contiguous().index_put((rows, index), new)  # copies whole tokens, where a scatter goes number by number


def positions(index: Tensor, valid: Tensor, past: int) -> Tensor:
    """Logical positions of a set's tokens, int64 [B, n]: ``past`` tokens came before; -1 where not valid."""
    return torch.where(valid, index + past, -1)


def member(text: Tensor | None, vision: Tensor | None, chosen: Tensor | None) -> Tensor:
    """Members of a token set as bool [B, T].

    Args:
        text: text tokens to include, bool [B, T], or None.
        vision: the vision tokens, bool [B, T], with ``chosen`` bool [F] saying which of them belong; or None.
    """
    if vision is None or chosen is None:
        assert text is not None
        return text.clone()
    kept = torch.zeros_like(vision).masked_scatter(vision, chosen)
    return kept if text is None else kept | text


define("token_index(Tensor member, Tensor? padding, SymInt n) -> (Tensor, Tensor)", token_index)

define("select(Tensor x, Tensor index, int dim=1) -> Tensor", select)

define("relative_index(Tensor outer, Tensor index) -> Tensor", relative_index)

define(
    "restore(Tensor full, Tensor part, Tensor index, Tensor valid) -> Tensor",
    restore,
    kernel="vlmrewrite.kernels.gather:restore",
    backward=True,
)

define("positions(Tensor index, Tensor valid, SymInt past) -> Tensor", positions)

define("member(Tensor? text, Tensor? vision, Tensor? chosen) -> Tensor", member)


def gather(xs: list[Tensor], dims: list[int], index: Tensor) -> list[Tensor]:
    """:func:`vlmrewrite.ops.selection.select` of each of several tensors, for the same tokens.

    Args:
        xs: each [B or 1, ..., T, ...], of any dtype and strides.
        dims: where T is in each of them, at least 1.
        index: int64 [B or 1, n], all in [0, T).

    Returns:
        for each, [B, ..., n, ...], contiguous.
    """
    return [select(x, index, dim).contiguous() for x, dim in zip(xs, dims, strict=True)]


def _gather_fake(xs: list[Tensor], dims: list[int], index: Tensor) -> list[Tensor]:
    shapes = ((index.shape[0], *x.shape[1:]) for x in xs)
    at = (dim % x.dim() for x, dim in zip(xs, dims, strict=True))
    return [x.new_empty(*s[:d], index.shape[1], *s[d + 1 :]) for x, s, d in zip(xs, shapes, at, strict=True)]


define(
    "gather(Tensor[] xs, int[] dims, Tensor index) -> Tensor[]",
    gather,
    kernel="vlmrewrite.kernels.gather:gather",
    kernel_fake=_gather_fake,
    backward=True,
)
