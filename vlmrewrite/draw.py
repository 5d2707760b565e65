"""What a pass is given when recipes are searched: see :func:`vlmrewrite.tune`, and docs/tune.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Draw(Protocol):
    """Options that a search chooses, and what it knows of the model.

    A pass joins the search by a class attribute ``tunes``, which says what of a plan it decides: ``"start"`` (which
    vision tokens enter the decoder), ``"later"`` (which of them go on from some layer) and ``"layers"`` (what layers do
    with them); and by a class method ``tuned(amount, draw)`` that makes the pass. The more the ``amount`` in (0, 1],
    the more the pass costs; the search solves it for the budget. All else is drawn: the same name gives the same value
    for one candidate. A pass with ``control = True``, made by ``keep=amount``, is what others are compared with.

    Attributes:
        depth: decoder layers.
        freeze, hide: what each layer loses, in nats, when vision tokens are not updated in it, and when text does not
            see them there; see :class:`vlmrewrite.report.LayerProfile`.
        key_share: work of a layer that only makes keys and values of vision tokens, of that of a whole one.
    """

    depth: int
    freeze: Sequence[float]
    hide: Sequence[float]
    key_share: Sequence[float]

    def layer(self, name: str, first: int = 0) -> int:
        """A layer, from ``first`` on."""

    def share(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        """A number in between."""

    def pick(self, name: str, options: Sequence[Any]) -> Any:
        """One of some plain values."""
