"""VISOR, vision on request (arXiv 2603.23495): which layers update, read or ignore the vision tokens.

    layer 0        run_on All  ->  layer 0        run_on All                      self: an ordinary layer
    layer 1        run_on All      layer 1        run_on Text, attend_to All      cross: text reads vision as it stands
    layer 2        run_on All      layer 2        run_on Text                     text only

The layers are given, or chosen by a measured budget, or one of a chain of configurations is chosen for each row.
Refused where no vision tokens are left. The paper trains a network whose cross layers have weights of their own and a
depth-wise convolution. Ours: the model's own weights without training, one softmax over vision and text keys, original
positions; the budget by :mod:`vlmrewrite.report.layer_profile` (contribution of a layer as in ShortV, arXiv
2504.00502); the rule by confidence; and a router that reads the last prompt token where the configurations part.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from vlmrewrite.draw import Draw
from vlmrewrite.passes.visor.allocate import spend
from vlmrewrite.passes.visor.dispatch import THRESHOLD, Confidence, Routed, Router, start_of
from vlmrewrite.plan import Layers, Plan, Text, Weights, chosen_layers, frozen_pass
from vlmrewrite.report import calibration, tried

_LOG = logging.getLogger(__name__)


@frozen_pass
class VISOR:
    """Update vision tokens in the self layers, let text attend to them in these and the cross layers, nowhere else.

    Args:
        self_layers: list of layers (int) or fractions of the depth (float), or a float: the share of the layers, evenly
            spaced.
        cross_layers: the same; a share is spaced evenly over the layers that are not self layers.
        sa_vision_mlp: whether the MLP of a self layer runs on vision tokens too.
        budget: instead of layers: the share of the vision tokens' work that is left, in (0, 1]. A self layer is work
            1 of the depth, a cross layer the share of a layer's matrix products that makes keys and values.
        calibration: what the model's forward takes, with images, to measure the layers on; with ``budget``.
        policy: with ``chain``: ``"confidence"`` tries the chain from its first configuration on until the first token's
            probability is ``threshold``; ``"router"`` is a trained block; or a function from the last prompt token's
            hidden states [B, 1, H] to each row's configuration.
        chain: configurations, cheapest first: mappings with ``self_layers``, ``cross_layers`` and ``sa_vision_mlp``;
            what one updates or reads, the next does too.
        threshold: of the policy ``"confidence"``, in (0, 1].
        start: of the policy ``"confidence"``: the configuration that it begins with, by its number in the chain. Where
            most prompts end with a later one, the first ones are work for nothing: :func:`vlmrewrite.calibrate` with
            prompts of the kind finds the start that costs least. ``"running"``: the one that costs least by what share
            of the rows of earlier calls (of this model, since the recipe was applied) each configuration did not do
            for, so that what a prompt is answered depends on those before it.
        enough: of the policy ``"router"``, in (0, 1]: a row runs the first configuration such that, by the router's
            probabilities, none behind it is needed with at least this one; the closer to 1, the more work. Blocks that
            were trained with another one can be loaded. None: the likeliest configuration.
        cross: short for ``cross_layers``.
    """

    name: ClassVar[str] = "visor"
    tunes: ClassVar[tuple[str, ...]] = ("layers",)

    self_layers: Layers = ()
    cross_layers: Layers = ()
    sa_vision_mlp: bool = True
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    calibration: Annotated[Any, Field(exclude=True)] = dataclasses.field(default=None, repr=False, compare=False)
    policy: Literal["confidence", "router"] | Callable[..., Any] | None = None
    chain: tuple[dict[str, Any], ...] | list[dict[str, Any]] = ()
    threshold: Annotated[float, Field(gt=0, le=1)] = THRESHOLD
    start: int | Literal["running"] = dataclasses.field(default=0, metadata={"blocks": False})
    enough: Annotated[float, Field(gt=0, le=1)] | None = dataclasses.field(default=None, metadata={"blocks": False})
    cross: Annotated[Layers, Field(exclude=True)] = ()

    def __post_init__(self) -> None:
        if self.cross:
            if self.cross_layers:
                raise ValueError("expected cross or cross_layers, which mean the same, got both")
            object.__setattr__(self, "cross_layers", self.cross)
            object.__setattr__(self, "cross", ())
        given = bool(self.self_layers or self.cross_layers), self.budget is not None, bool(self.chain)
        if sum(given) != 1:
            raise ValueError("expected self_layers and cross_layers, or a budget, or a chain; got " + self._what(given))
        if bool(self.chain) != (self.policy is not None):
            raise ValueError("expected a policy with a chain of configurations, got one of them alone")
        if self.calibration is not None and self.budget is None:
            raise ValueError("expected a budget with calibration inputs, got these alone")
        if self.policy != "confidence" and self.threshold != THRESHOLD:
            raise ValueError(f"threshold={self.threshold} is for policy='confidence', got policy={self.policy!r}")
        if self.policy != "confidence" and self.start:
            raise ValueError(f"start={self.start} is for policy='confidence', got policy={self.policy!r}")
        if self.policy != "router" and self.enough is not None:
            raise ValueError(f"enough={self.enough} is for policy='router', got policy={self.policy!r}")
        object.__setattr__(self, "chain", tuple({k: _tuple(v) for k, v in c.items()} for c in self.chain))
        if self.chain:
            if len(self.chain) < 2:
                raise ValueError("expected a chain of at least two configurations, got one")
            if self.start != "running" and not 0 <= self.start < len(self.chain):
                raise ValueError(
                    f"start={self.start}; expected the number of one of {len(self.chain)} configurations, or 'running'"
                )
            self.configurations()
        if not isinstance(self.self_layers, float) and not isinstance(self.cross_layers, float):
            _apart(self.self_layers, self.cross_layers)

    @staticmethod
    def _what(given: Sequence[bool]) -> str:
        return " and ".join(n for n, g in zip(("layers", "a budget", "a chain"), given, strict=True) if g) or "none"

    def configurations(self) -> list[VISOR]:
        """The passes of the chain."""
        known = ("self_layers", "cross_layers", "sa_vision_mlp")
        for i, c in enumerate(self.chain):
            if unknown := [k for k in c if k not in known]:
                raise ValueError(
                    f"chain[{i}]: expected the keys {', '.join(known)}, got {', '.join(map(repr, unknown))}"
                )
        return [VISOR(**c) for c in self.chain]

    def calibrated(self, model: nn.Module, inputs: Any = None) -> VISOR:
        """The pass with the layers that its budget buys on this model, or the start of its chain that costs least.

        See :func:`vlmrewrite.calibrate`. The start is looked for where there are inputs, and with this pass alone.
        """
        if self.policy == "confidence" and inputs is not None:
            return self._started(model, inputs)
        if self.budget is None:
            return self
        found = calibration(model, self.calibration if inputs is None else inputs, f"VISOR(budget={self.budget})")
        share = found.key_share
        own, cross = spend(self.budget, found.freeze_kl, found.hide_kl, share)
        if not own and not cross:
            least = min(share) / len(share)
            raise ValueError(f"VISOR(budget={self.budget}) buys no layer; expected at least {least:.3g} for this model")
        return VISOR(self_layers=tuple(own), cross_layers=tuple(cross), sa_vision_mlp=self.sa_vision_mlp)

    def _started(self, model: nn.Module, inputs: Any) -> VISOR:
        found = tried(model, inputs, [[p] for p in self.configurations()])
        likeliest, flops = (torch.stack(x) for x in zip(*found, strict=True))
        start, costs = start_of(likeliest, flops, self.threshold)
        unsure = (likeliest < self.threshold).sum(1).tolist()
        _LOG.info(
            "VISOR starts with configuration %d: of %d prompts %s were unsure after each; starting with each one costs"
            " %s of the last one's FLOPs",
            start,
            likeliest.shape[1],
            ", ".join(map(str, unsure)),
            ", ".join(f"{x:.2f}" for x in costs),
        )
        return dataclasses.replace(self, start=start)

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> VISOR:
        """The layers that a share of the work buys."""
        tilt = 10 ** draw.share("tilt", -1.0, 1.0)  # how much seeing vision tokens counts against updating them
        hide = [f + tilt * (h - f) for f, h in zip(draw.freeze, draw.hide, strict=True)]
        own, cross = spend(amount, draw.freeze, hide, draw.key_share)
        mlp = draw.pick("vision_mlp", (True, False))
        return cls(self_layers=tuple(own), cross_layers=tuple(cross), sa_vision_mlp=mlp)

    @property
    def trained_by(self) -> tuple[str, ...]:
        """Other blocks learn under any configuration of a chain, a router from what each of them answers."""
        return ("plans",) * bool(self.chain) + ("choice",) * (self.policy == "router")

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left."""
        return plan.exhausted()

    def change(self, plan: Plan) -> None:
        """Self layers stay; cross layers run on text and see what they saw before; the rest is text only."""
        if self.budget is not None:
            raise ValueError(
                f"VISOR(budget={self.budget}) must be calibrated first: vlmrewrite.calibrate(model, recipe)"
            )
        if self.chain:
            self._dispatch(plan)
            return
        own, cross = self.layers(plan.depth)
        for entry in plan.layers:
            keys = entry.keys if entry.index in cross else Text
            if entry.index not in own:
                entry.run_on(Text).attend_to(keys)
                continue
            entry.run_on(entry.run_set)
            if not self.sa_vision_mlp:
                entry.mlp_on(Text)

    def layers(self, depth: int) -> tuple[list[int], list[int]]:
        """The self layers and the cross layers of a decoder of this depth."""
        own = chosen_layers(self.self_layers, depth)
        cross = chosen_layers(self.cross_layers, depth, [i for i in range(depth) if i not in own])
        _apart(own, cross)
        return own, cross

    def _dispatch(self, plan: Plan) -> None:
        passes, plans = self.configurations(), []
        kinds = [p.layers(plan.depth) for p in passes]
        for i, ((own, cross), (more, wider)) in enumerate(pairwise(kinds)):
            if not set(own) <= set(more) or not {*own, *cross} <= {*more, *wider}:
                raise ValueError(
                    f"chain[{i + 1}] must update what chain[{i}] updates and read what it reads; got self layers {more}"
                    f" behind {own}, cross layers {wider} behind {cross}"
                )
        for p in passes:
            plans.append(plan.copy())
            p.change(plans[-1])
        parts = (i for i in range(plan.depth) if any(p.layers[i].sets() != plans[0].layers[i].sets() for p in plans))
        at = next(parts, None)
        if at is None:
            raise ValueError("the configurations of the chain are all the same on this model")
        if self.policy == "confidence":
            plan.dispatch(Confidence(at, self.threshold, self.start), plans)
        elif self.policy == "router":
            block = plan.block(Weights(lambda hidden: Router(hidden, len(plans))), "router")
            names = tuple(f"{block}.{n}" for n in ("inner", "inner_bias", "outer", "outer_bias"))
            plan.dispatch(Routed(at, weights=names, enough=self.enough), plans)
        else:
            assert callable(self.policy)
            plan.dispatch(Routed(at, self.policy), plans)


def _tuple(x: object) -> object:
    return tuple(x) if isinstance(x, list) else x


def _apart(own: Sequence[int | float], cross: Sequence[int | float]) -> None:
    both = [str(i) for i in cross if i in own]
    if both:
        raise ValueError(f"expected a layer in self_layers or in cross_layers, got {', '.join(both)} in both")
