"""Who chooses among VISOR's configurations in each call: the confidence of the first token, or a router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmrewrite.ops import define
from vlmrewrite.plan import Depth

THRESHOLD = 0.8


def visor_router(hidden: Tensor, inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor) -> Tensor:
    """Scores of each configuration from the last prompt token's hidden states, by an MLP behind a norm without weights.

    Args:
        hidden: [B, 1, H].
        inner: [M, H]. inner_bias: [M]. outer: [C, M]. outer_bias: [C], C configurations.

    Returns:
        [B, C], dtype of ``hidden``.
    """
    x = F.layer_norm(hidden[:, 0], hidden.shape[-1:])
    return F.linear(F.gelu(F.linear(x, inner, inner_bias)), outer, outer_bias)


define(
    "visor_router(Tensor hidden, Tensor inner, Tensor inner_bias, Tensor outer, Tensor outer_bias) -> Tensor",
    visor_router,
)


class Router(nn.Module):
    """Parameters of :func:`visor_router`; untrained, it always chooses the last, most demanding configuration."""

    def __init__(self, hidden: int, configurations: int, width: int = 64) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(width, hidden) * hidden**-0.5)
        self.inner_bias = nn.Parameter(torch.zeros(width))
        self.outer = nn.Parameter(torch.zeros(configurations, width))
        self.outer_bias = nn.Parameter(F.one_hot(torch.tensor(configurations - 1), configurations).float())


def cheapest(right: Tensor) -> Tensor:
    """The first plan, which is the cheapest, that no other one is better than, int64 [b].

    Args:
        right: how good each plan is, [b, C].
    """
    return (right == right.amax(1, keepdim=True)).int().argmax(1)


def start_of(likeliest: Tensor, flops: Tensor, threshold: float) -> tuple[int, list[float]]:
    """With which plan to start, so that rows cost least; the cheaper one, if there are several.

    Args:
        likeliest: the probability of each row's most likely first token under each plan, [C, R].
        flops: of each layer, [C, R, L]. Layers before the first that plans treat differently run once.
        threshold: below it, the next plan is tried, as :class:`Confidence` does.

    Returns:
        the plan, and what starting with each one costs, in units of the last plan's cost.
    """
    apart = (flops != flops[-1:]).any(1).any(0).nonzero()[:, 0].tolist()  # the layers
    once, each = flops[-1, :, : min(apart, default=0)].sum(1), flops[:, :, min(apart, default=0) :].sum(2)
    sure, costs = likeliest.nan_to_num(1.0) >= threshold, []
    for start in range(len(flops)):
        total, left = once.clone(), torch.ones_like(once, dtype=torch.bool)
        for i in range(start, len(flops)):
            total += each[i] * left
            left &= ~sure[i]
        costs.append(float(total.sum() / flops[-1].sum()))
    return costs.index(min(costs)), costs


@dataclass(frozen=True)
class Confidence:
    """From plan ``start`` on, the next one for rows whose most likely next token is below ``threshold``.

    Where ``start`` is ``"running"``, a call begins with the plan that, by the rows of earlier calls, costs least.
    """

    at: Depth
    threshold: float
    start: int | Literal["running"] = 0
    op: ClassVar[None] = None
    weights: ClassVar[tuple[str, ...]] = ()

    @property
    def running(self) -> bool:
        """Whether earlier calls say where to start."""
        return self.start == "running"

    def first(self, value: Tensor | None, images: Tensor, variants: int) -> int | None:
        """The same for all; None where it is not said here."""
        return None if self.running else self.start  # type: ignore[return-value]

    def then(self, tried: int, logits: Tensor, images: Tensor, variants: int) -> Tensor | None:
        """The next, for rows with an image that are not confident, unless it was the last."""
        sure = logits.float().softmax(-1).amax(-1).nan_to_num(1.0)  # no plan mends NaN
        return tried + (images & (sure < self.threshold)).long() if tried + 1 < variants else None

    def __str__(self) -> str:
        told = f"Confidence(at={self.at}, threshold={self.threshold}"
        return f"{told}, start={self.start})" if self.start else f"{told})"


@dataclass(frozen=True)
class Routed:
    """The plan that a router's scores, or a function, read off the last prompt token's hidden states.

    Args:
        at: where they are read.
        policy: called with the hidden states [B, 1, H]; returns scores [B, C], a plan's number for each row [B], or one
            number. None: the router's scores.
        weights: of the router.
        enough: how likely it must be that no plan behind the chosen one is needed; None: the likeliest plan.
    """

    at: Depth
    policy: Callable[[Tensor], Any] | None = None
    weights: tuple[str, ...] = ()
    enough: float | None = None

    @property
    def op(self) -> Callable[..., Any]:
        """The router, or nothing but the hidden states."""
        return torch.clone if self.policy is not None else torch.ops.vlm.visor_router.default

    def first(self, value: Tensor | None, images: Tensor, variants: int) -> Tensor | int:
        """What was read of each row; rows without an image, to which all plans are the same, go with the cheapest."""
        assert value is not None
        found: Any = value if self.policy is None else self.policy(value)
        if isinstance(found, Tensor) and found.is_floating_point() and not bool(found.isfinite().all()):
            raise ValueError(f"{self} scored the plans of the rows {found.tolist()}; expected finite scores")
        if isinstance(found, Tensor) and found.shape in ((len(images),), (len(images), variants)):
            if found.dim() == 2 and self.enough is not None:
                found = (found.float().softmax(-1).cumsum(-1)[:, :-1] < self.enough).sum(-1)
            found = (found.argmax(-1) if found.dim() == 2 else found).to(images.device)
            found = found.where(images, found[images].amin())
        elif isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        return found  # type: ignore[no-any-return]

    def then(self, tried: int, logits: Tensor, images: Tensor, variants: int) -> None:
        """It stays."""

    def loss(self, scores: Tensor, right: Tensor) -> Tensor:
        """How far the router is from choosing the cheapest plan whose answer is as good as any plan's: cross entropy.

        Args:
            scores: of the router, [b, C].
            right: how many tokens of the answer each plan predicts, int64 [b, C].
        """
        return F.cross_entropy(scores.float(), cheapest(right))

    def __str__(self) -> str:
        name = f"{self.weights[0].partition('.')[0] if self.weights else self.policy}"
        return name if self.enough is None else f"{name}(enough={self.enough})"
