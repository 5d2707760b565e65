"""What an edit means to the oracle: its operator's reference, on the full stream of the unrewritten model.

The reference is the definition of the edit; what it is called with is looked for here, by plain loops over bool masks
and in the eager model, and shares no code with the graph. A discrete choice inside an operator (of the regions that
get detail, say) is made anew: where what it goes by is equal but for rounding, the two may choose differently. In
16 bits that is not rare; selections, which the plan names, are taken from the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmrewrite.ops import REFERENCES
from vlmrewrite.oracle.masks import EditMask
from vlmrewrite.plan import NEEDS


def edited(mask: EditMask, stream: Tensor, merged: Tensor | None, paid: Callable[[Tensor], Tensor]) -> Tensor:
    """The stream behind an edit.

    Args:
        mask: the edit, and its tokens.
        stream: [B, T, H], T at least the edit's n.
        merged: what entered the decoder, the vision features in it, [B, T, H], if that is known.
        paid: the layer's attention weights [B, heads, T, T] when only some keys, bool [B, T], can be seen.

    Returns:
        [B, T, H]; the edited tokens are new, all others as they were.

    Raises:
        NotImplementedError: it needs something that the oracle cannot find on this model.
    """
    edit = mask.edit
    if (rows := mask.rows) is not None:

        def paid_of(keys: Tensor) -> Tensor:
            return paid(keys.new_zeros(len(stream), keys.shape[1]).index_copy(0, rows, keys))[rows]

        some = None if merged is None else merged[rows]
        return stream.index_copy(0, rows, edited(replace(mask, rows=None), stream[rows], some, paid_of))
    index, valid = _indexed(mask.tokens)
    if not index.shape[1]:
        return stream
    x = stream[:, : mask.tokens.shape[1]]
    given = _Inputs(mask, x, stream.shape[1], merged, paid)
    inputs = [NEEDS[need].make(given) for need in edit.needs]
    weights = [w.to(x.dtype) for w in mask.weights]
    hidden = torch.stack([row[at] for row, at in zip(x, index, strict=True)])
    new = REFERENCES.get(edit.op, edit.op)(hidden, index, valid, *inputs, *weights, *edit.options)
    out = stream.clone()
    for row, at, real, values in zip(out, index, valid, new, strict=True):
        row[at[real]] = values[real].to(out.dtype)
    return out


def _indexed(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's columns, ascending, and which of them are meant; shorter rows are filled up with their last column."""
    index = pad_sequence([row.nonzero()[:, 0] for row in tokens], batch_first=True, padding_value=tokens.shape[1] - 1)
    return index, torch.arange(index.shape[1], device=tokens.device) < tokens.sum(1, keepdim=True)


@dataclass(frozen=True)
class _Inputs:
    """What the edit asks for; see :class:`vlmrewrite.plan.needs.Inputs`."""

    mask: EditMask
    x: Tensor
    length: int
    merged: Tensor | None
    paid: Callable[[Tensor], Tensor]

    def fact(self, name: str) -> Tensor:
        if name == "flat":
            return self.mask.call.vision.flatten().nonzero()[:, 0]
        found: Tensor | None = self.mask.call.fact(name, "frame")
        if found is None:
            raise self._unknown(name)
        return found.to(self.x.dtype) if found.is_floating_point() else found

    def features(self) -> Tensor:
        if self.merged is None:
            raise self._unknown("features")
        return self.merged[:, : self.x.shape[1]][self.mask.call.vision]

    def stream(self) -> Tensor:
        return self.x

    def prompt(self) -> Tensor:
        return self.mask.call.text & (torch.arange(self.x.shape[1], device=self.x.device) <= self.mask.call.last)

    def attention(self, outside: bool) -> Tensor:
        call, tokens, columns = self.mask.call, self.mask.tokens, self.x.shape[1]
        seen = call.vision & ~tokens if outside else tokens
        keys = torch.zeros(len(self.x), self.length, dtype=torch.bool, device=self.x.device)
        keys[:, :columns] = call.text | seen
        weights = torch.stack([row[:, at] for row, at in zip(self.paid(keys), call.last[:, 0].tolist(), strict=True)])
        return weights.mean(1)[:, :columns][call.vision] * seen[call.vision]

    def _unknown(self, name: str) -> NotImplementedError:
        return NotImplementedError(f"the oracle cannot find {name!r} on this model, which {self.mask.edit.op} needs")
