"""What the study compares: at each share of the FLOPs, of every technique the recipe that costs most within it.

Which layers update and read vision tokens is chosen by a profile of the model on questions to learn from, as
``vlmrewrite tune`` has it; nothing is chosen by accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlmrewrite as vr
from vlmrewrite.evaluate import encode, read_data
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, VTW, DivPrune, Downsample, FastV, Random, ShortV, Stride, ViCA
from vlmrewrite.tune import Prompts, Shape, smaller_pictures, solve

SHARES = {"1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8}
CONTROLS = ("random", "stride", "downsample")
PROFILED = 48
"""Questions to learn from that the layers are profiled on."""

Build = Callable[[float], tuple[Any, ...]]


@dataclass(frozen=True)
class Method:
    """One row to be: a technique at a share of the FLOPs, or why it is not there.

    Attributes:
        technique: its name; share: as text, ``"1/4"``.
        blocks: ``""`` where nothing is trained, ``"untrained"`` or ``"trained"``.
        recipe: what :func:`vlmrewrite.apply` takes; None with a ``reason``.
    """

    technique: str
    share: str
    blocks: str = ""
    recipe: Any = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Of the row, one for all of the study."""
        return "-".join(filter(None, (self.technique, self.share.replace("/", "of"), self.blocks)))


def builders(depth: int, freeze: Sequence[float], hide: Sequence[float]) -> dict[str, Build]:
    """Passes by technique, for an amount in (0, 1] with which cost rises.

    Args:
        depth: decoder layers.
        freeze: KL by layer where vision tokens are not updated.
        hide: KL by layer where text does not see them.
    """
    update = sorted(range(depth), key=lambda i: -freeze[i])
    see = sorted(range(depth), key=lambda i: -hide[i])

    def visor(amount: float) -> tuple[Any, ...]:
        """First layers that read, then, while all read, layers that update."""
        bought = max(1, round(2 * depth * amount))
        own = sorted(update[: max(0, bought - depth)])
        cross = [i for i in range(depth) if i not in own] if bought >= depth else sorted(see[:bought])
        return (VISOR(self_layers=tuple(own), cross_layers=tuple(cross)),)

    def shortv(amount: float) -> tuple[Any, ...]:
        return (ShortV(layers=tuple(sorted(update[max(0, min(depth - 1, int(amount * depth))) :]))),)

    return {
        "random": lambda a: (Random(keep=a, at=0),),
        "stride": lambda a: (Stride(keep=a, at=0),),
        "sts": lambda a: (STS(keep=min(1.0, 1.5 * a), refine=0.5 * a, at=0.5),),
        "divprune": lambda a: (DivPrune(keep=a),),
        "dape": lambda a: (DAPE(budget=a),),
        "fastv": lambda a: (FastV(keep=a, at=1),),
        "vtw": lambda a: (VTW(at=min(int(a * depth), depth - 1)),),
        "shortv": shortv,
        "vica": lambda a: (ViCA(cross=tuple(sorted(see[: max(1, round(a * depth))]))),),
        "visor": visor,
        "dpvr": lambda a: (DPVR(at=min(int(a * depth), depth - 1)),),
    }


def methods(model: Any, processor: Any, learn: Any, shares: Sequence[str], only: Sequence[str] = ()) -> list[Method]:
    """Every technique and control at some shares of the FLOPs.

    Args:
        model: unmodified.
        processor: its.
        learn: rows of questions to learn from, for profile and costs.
        shares: keys of ``SHARES``.
        only: techniques; all if empty.
    """
    samples = read_data(learn)
    batches = [dict(encode(processor, samples[i : i + 16])) for i in range(0, len(samples), 16)]
    prompts = Prompts(model, batches)
    profile = prompts.profile(len(batches))
    found = []
    for share in shares:
        for name, build in {"downsample": None, **builders(profile.depth, profile.freeze_kl, profile.hide_kl)}.items():
            if only and name not in only:
                continue
            if build is None:
                found.append(_smaller(model, processor, samples[:16], share))
                continue
            solved = solve(Shape(build), prompts, "flops", SHARES[share])
            blocks = "untrained" if name == "dpvr" else ""
            if solved is None:
                found.append(Method(name, share, blocks, reason=f"its least costs more than {share} of the FLOPs"))
                continue
            method = Method(name, share, blocks)
            recipe = vr.Recipe(name=method.name, passes=solved.passes)
            found.append(Method(name, share, blocks, recipe))
    return found


def _smaller(model: Any, processor: Any, samples: Any, share: str) -> Method:
    try:
        recipe, _ = smaller_pictures(Downsample, model, processor, samples, "flops", SHARES[share])
    except ValueError as e:
        return Method("downsample", share, reason=str(e))
    method = Method("downsample", share)
    return Method("downsample", share, recipe=recipe.model_copy(update={"name": method.name}))


def trained(folder: Path, share_of: dict[str, str]) -> list[Method]:
    """Rows of the trained blocks in a folder; what is not there is a row with the reason.

    Args:
        folder: with a folder of blocks for each.
        share_of: name of the folder, which begins with its technique -> the share that it belongs to.
    """
    out = []
    for name, share in share_of.items():
        technique = name.partition("-")[0]
        if (folder / name).is_dir():
            out.append(Method(technique, share, "trained", folder / name))
        else:
            out.append(Method(technique, share, "trained", reason=f"the blocks {name} are not trained: --train does"))
    return out
