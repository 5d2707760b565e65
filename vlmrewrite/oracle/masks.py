"""What each layer of a plan runs on and sees, as masks over the full sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from vlmrewrite.plan import Call, Edit


@dataclass(frozen=True)
class BranchMask:
    """Tokens that leave the stream before a layer and come back later.

    Attributes:
        tokens: which, bool [B, T].
        rejoin: the layer before which they are back, this one or later; the depth: behind the last.
        block: a module of the layer's class that they go through, seeing one another only, called as the layer is; it
            has the stream's dtype. None: they come back as they left.
    """

    tokens: Tensor
    rejoin: int
    block: nn.Module | None = None


@dataclass(frozen=True)
class LayerMasks:
    """What one layer does, in the logical sequence.

    Attributes:
        run: tokens that the layer's output is written back for, bool [B, T]; the others go on as they entered.
        keys: tokens whose keys and values its queries may see, bool [B, T].
        mlp: tokens whose MLP half is computed, bool [B, T]; the others keep what the stream holds after the attention
            half. None: all.
        entry: what happens to the stream [B, T, H] before the layer; it must work in the stream's dtype, float64
            included. What it returns is what bypassing tokens carry on. None: nothing.
        edits: operators on the stream before the layer, behind ``entry``, in order.
        branches: tokens that leave the stream before the layer, behind the edits.
    """

    run: Tensor
    keys: Tensor
    mlp: Tensor | None = None
    entry: Callable[[Tensor], Tensor] | None = None
    edits: tuple[EditMask, ...] = ()
    branches: tuple[BranchMask, ...] = ()


@dataclass(frozen=True)
class EditMask:
    """An operator on the hidden states of some tokens at a layer's entry, in the first n columns of the sequence.

    Attributes:
        edit: the plan's, with the operator; one of the dialect stands for its reference.
        tokens: whose hidden states it replaces, bool [B, n].
        call: what is known of the call.
        weights: parameters, cast to the stream's dtype.
        rows: of the stream that tokens and call are of, int64 [b]; None: all.
    """

    edit: Edit
    tokens: Tensor
    call: Call
    weights: tuple[Tensor, ...] = ()
    rows: Tensor | None = None
