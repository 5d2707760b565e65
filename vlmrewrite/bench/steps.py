"""A plan in one call as indices: which of the tokens that are held each layer runs on, sees and edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlmrewrite.ops import REFERENCES
from vlmrewrite.plan import NEEDS, All, Call, Edit, Plan, Selection, TokenSet


class Set(NamedTuple):
    """Some tokens of each row.

    Attributes:
        columns: where they stand in the sequence, ascending, int64 [B, n]; shorter rows are filled up with its last.
        valid: which of them are meant, bool [B, n]; None: all.
        everything: whether these are all columns.
    """

    columns: Tensor
    valid: Tensor | None
    everything: bool

    def of(self, x: Tensor) -> Tensor:
        """The tokens of x [B, T, ...]."""
        return x if self.everything else x.take_along_dim(self.columns[..., None], 1)


class Places(NamedTuple):
    """Where a set's tokens stand in what is held: int64 [B * n] into the rows of it, one after the other; None: all."""

    tokens: Set
    at: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """These tokens of x [B, m, H]."""
        if self.at is None:
            return x
        return x.flatten(0, 1).index_select(0, self.at).view(len(x), -1, x.shape[2])

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """What x [B, m, H] is with ``new`` [B, n, H] there; x itself is changed where that is a part of it."""
        if self.at is None:
            return new
        x.flatten(0, 1).index_copy_(0, self.at, new.flatten(0, 1))
        return x


@dataclass
class Step:
    """What happens at a layer, or behind the last one.

    Attributes:
        held: the tokens that are held from here on, in those before.
        back: branches that rejoin, by number, and where their tokens stand.
        edits: called with the tokens' hidden states, all that are held, and what entered the decoder.
        leave: branches that leave, by number, with their block, and whether they rejoin at once.
        run, keys: the tokens it runs on, and sees.
        inner: those that it runs on among those that it sees, where all of them are.
        mlp: those that go through the MLP among those that it runs on; None: all.
    """

    held: Places
    back: list[tuple[int, Places]] = field(default_factory=list)
    edits: list[tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Places]] = field(default_factory=list)
    leave: list[tuple[int, Places, nn.Module | None, bool]] = field(default_factory=list)
    run: Any = None
    keys: Any = None
    inner: Places | None = None
    mlp: Places | None = None


class _Sets:
    """Sets of a call, each made once, so that ``is`` compares them."""

    def __init__(self) -> None:
        self.known: dict[bytes, tuple[Set, Tensor]] = {}

    def of(self, mask: Tensor) -> Set:
        """The set of a mask, bool [B, T]."""
        key = mask.cpu().numpy().tobytes()
        if key not in self.known:
            rows, last = [row.nonzero()[:, 0] for row in mask], mask.shape[1] - 1
            columns = pad_sequence(rows, batch_first=True, padding_value=last)
            valid = torch.arange(columns.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
            self.known[key] = Set(columns, None if bool(valid.all()) else valid, bool(mask.all())), mask
        return self.known[key][0]

    def places(self, some: Tensor, among: Tensor) -> Places:
        """Where tokens, bool [B, T], stand among others that hold them."""
        inner, outer = self.of(some), self.of(among)
        if inner is outer:
            return Places(inner, None)
        at = torch.searchsorted(outer.columns.contiguous(), inner.columns.contiguous())
        rows = torch.arange(len(at), device=at.device)[:, None]
        return Places(inner, (rows * outer.columns.shape[1] + at).flatten())


def steps_of(plan: Plan, call: Call, chosen: Mapping[Selection, Tensor], blocks: nn.ModuleDict) -> list[Step]:
    """One step a layer, and one behind the last, where the last token of each row is held.

    Args:
        plan: what was followed, without a dispatch.
        call: the call, of the rows that followed it.
        chosen: which vision tokens each selection chose, bool [F].
        blocks: those that branches and edits read.

    Raises:
        ValueError: an edit needs what the loop does not have; the prompt does not end with text.
    """

    def members(s: TokenSet) -> Tensor:
        return call.members(s, chosen)

    def needed(e: Edit) -> Tensor:
        return members(All if "stream" in e.needs else e.tokens)

    last = torch.zeros_like(call.vision)
    last[:, -1] = True
    if not bool((last & call.text).any(1).all()):
        raise ValueError("the native loop expects prompts that end with text")
    held = [last]
    for i in reversed(range(plan.depth)):
        uses = [members(s) for s in plan.layers[i].sets()]
        uses += [needed(e) for e in plan.edits if e.at == i] + [
            members(b.tokens) for b in plan.branches if b.leave == i
        ]
        held.insert(0, torch.stack([held[0], *uses]).any(0))
    for b in plan.branches:
        for i in range(b.leave, b.rejoin + 1):
            held[i] = held[i] | members(b.tokens)
    sets = _Sets()
    before, out = torch.ones_like(last), []
    for i, now in enumerate(held):
        step = Step(sets.places(now, before))
        numbered = list(enumerate(plan.branches))
        step.back = [(n, sets.places(members(b.tokens), now)) for n, b in numbered if b.rejoin == i != b.leave]
        step.edits = [(_edit(e, sets.of(members(e.tokens)), call, blocks), sets.places(members(e.tokens), now))
                      for e in plan.edits if e.at == i]  # fmt: skip
        for n, b in numbered:
            if b.leave == i:
                block = None if b.block is None else blocks[b.block]
                step.leave.append((n, sets.places(members(b.tokens), now), block, b.rejoin == i))
        out.append(step)
        before = now
        if i == plan.depth:
            break
        run, keys, mlp = (members(s) for s in plan.layers[i].sets())
        step.run, step.keys = sets.places(run, now), sets.places(keys, now)
        if not bool((run & ~keys).any()):
            step.inner = sets.places(run, keys)
        if not torch.equal(mlp, run):
            step.mlp = sets.places(mlp, run)
    return out


def _edit(e: Edit, tokens: Set, call: Call, blocks: nn.ModuleDict) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """An edit as a function of the tokens' hidden states, of all that is held, and of what entered the decoder.

    Raises:
        ValueError: it needs what the loop does not have.
    """
    op = REFERENCES.get(e.op, e.op)
    weights = [blocks.get_parameter(name) for name in e.weights]
    valid = torch.ones_like(tokens.columns, dtype=torch.bool) if tokens.valid is None else tokens.valid

    def edited(hidden: Tensor, held: Tensor, merged: Tensor) -> Tensor:
        given = _Given(call, held, merged)
        made = [NEEDS[need].make(given) for need in e.needs]
        new: Tensor = op(hidden, tokens.columns, valid, *made, *weights, *e.options)
        return new.to(hidden.dtype)

    if unknown := [need for need in e.needs if NEEDS[need].scores is not None]:
        raise ValueError(f"the native loop has no {', '.join(unknown)}, which edit {e.name!r} needs")
    return edited


class _Given(NamedTuple):
    """What an edit asks for; see :class:`vlmrewrite.plan.needs.Inputs`."""

    call: Call
    held: Tensor
    merged: Tensor

    def fact(self, name: str) -> Any:
        return self.call.fact(name, "frame")

    def features(self) -> Tensor:
        return self.merged[self.call.vision]

    def stream(self) -> Tensor:
        return self.held

    def prompt(self) -> Tensor:
        return self.call.text

    def attention(self, outside: bool) -> Tensor:
        raise AssertionError("refused before")
