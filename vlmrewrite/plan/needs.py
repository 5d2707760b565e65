"""What a policy or an edit may ask for, each declared once.

An image, in what is said of each one, is what a selection's budget is of: an image or a whole video, whose frames stand
below one another; with ``per="frame"`` one frame; with ``per="row"`` all of a row. For an edit it is one frame.

The rewrite makes it in the graph, the oracle in the eager model, by an :class:`Inputs` of its own: they share no code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from vlmrewrite.compat import taking
from vlmrewrite.plan.tokens import Text, TokenSet, Vision


class Inputs(Protocol):
    """What can be made at a layer's entry, for a policy's source or an edit's tokens."""

    def fact(self, name: str) -> Any:
        """A fact of the call, by the name of a field of :class:`vlmrewrite.plan.Call`."""

    def features(self) -> Any:
        """The projected vision features, [F, C]."""

    def attention(self, outside: bool) -> Any:
        """What the last prompt token pays to each vision token there, fp32 [F]; it sees what :attr:`Need.scores` says.

        Args:
            outside: of the vision tokens those that are not in the source or the edited set, in place of these.
        """

    def stream(self) -> Any:
        """The hidden states, [B, T, H]."""

    def prompt(self) -> Any:
        """The text tokens up to the last prompt token, bool [B, T]."""


class Need(NamedTuple):
    """One thing that can be asked for.

    Attributes:
        what: what it is, with its shape.
        make: makes it.
        scores: the keys that the last prompt token is scored against, for a source or edited tokens, which the layer's
            costs count; None: nothing is read at that token.
        optional: not every model can give it.
    """

    what: str
    make: Callable[[Inputs], Any]
    scores: Callable[[TokenSet], TokenSet] | None = None
    optional: bool = False


NEEDS = {
    "features": Need("projected vision features, [F, C]", lambda x: x.features()),
    "encoder_features": Need("what the projector took, [F, C']", lambda x: x.fact("encoder_features"), optional=True),
    "attention": Need(
        "weight from the last prompt token, mean of heads, fp32 [F]", lambda x: x.attention(False), lambda s: Text | s
    ),
    "attention_outside": Need(
        "the same, outside the source or edited set", lambda x: x.attention(True), lambda s: Text | (Vision - s)
    ),
    "ordinal": Need("number of each image within its row, int64 [I], on the CPU", lambda x: x.fact("ordinal")),
    "grid": Need("rows, columns of each image's tokens, int64 [I, 2], CPU", lambda x: x.fact("grid"), optional=True),
    "frames": Need("frames of each image, int64 [I], on the CPU", lambda x: x.fact("frames")),
    "frame": Need("number of each vision token's frame within its video, int64 [F]", lambda x: x.fact("frame")),
    "stream": Need("hidden states of all tokens, [B, T, H]", lambda x: x.stream()),
    "text": Need("the text tokens, bool [B, T]", lambda x: x.fact("text")),
    "prompt": Need("the text tokens up to the last prompt token, bool [B, T]", lambda x: x.prompt()),
    "flat": Need("row * T + column of each vision token, int64 [F]", lambda x: x.fact("flat")),
    "lengths": Need("tokens of each image, int64 [I], on the CPU", lambda x: x.fact("lengths")),
}
"""Every :class:`Need`, as policies and edits write it."""

FEATURES = tuple(name for name, need in NEEDS.items() if need.optional)
"""Facts about the images that not every model can give."""


def operator_of(who: str, op: Any, needs: tuple[str, ...], *given: object) -> Any:
    """The operator of a policy or an edit that asks for ``needs`` and calls it with ``given``, in words or as they are.

    Raises:
        ValueError: a need is not in :data:`NEEDS`, or the operator takes something else.
    """
    for need in needs:
        if need not in NEEDS:
            raise ValueError(f"{who} needs {need!r}; expected one of {', '.join(NEEDS)}")
    return taking(op, who, list(map(str, given)), needs)
