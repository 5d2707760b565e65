"""A prompt as policies see it before the decoder, where there is no model and no graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmrewrite.plan import Call, TokenCounts


class Facts(NamedTuple):
    """What policies may ask for before the decoder; see :class:`vlmrewrite.plan.needs.Inputs`."""

    call: Call
    whole: Tensor
    per: str
    earlier: int

    def fact(self, name: str) -> Any:
        """A fact about the images."""
        found = self.call.fact(name, self.per)
        return found + self.earlier if name == "ordinal" and self.per != "row" else found

    def features(self) -> Tensor:
        """What enters the decoder, [F, C]."""
        return self.whole

    def attention(self, outside: bool) -> Tensor:
        """Not there."""
        raise NotImplementedError("policies that ask for attention were refused")

    def stream(self) -> Tensor:
        """Not there."""
        raise NotImplementedError("policies that ask for hidden states were refused")

    def prompt(self) -> Tensor:
        """Not there."""
        raise NotImplementedError("policies that ask for the prompt were refused")


def call_of(
    lengths: Sequence[int], places: Sequence[int | Tensor] | None, device: torch.device
) -> tuple[Call | None, list[Tensor]]:
    """A prompt as the plan's arithmetic sees it, None without a vision token, and where each image's tokens stand."""
    starts: Sequence[int | Tensor] = [0, *accumulate(lengths)][:-1] if places is None else places
    if len(starts) != len(lengths):
        raise ValueError(f"places: expected one for each of {len(lengths)} images, got {len(starts)}")
    at = [
        x.to(device="cpu", dtype=torch.int64) if isinstance(x, Tensor) else torch.arange(n, device="cpu") + x
        for x, n in zip(starts, lengths, strict=True)
    ]
    if wrong := [f"{len(x)} of {n}" for x, n in zip(at, lengths, strict=True) if len(x) != n]:
        raise ValueError(f"places: expected one position, or one of each token of an image, got {', '.join(wrong)}")
    flat = torch.cat([*at, torch.empty(0, dtype=torch.int64, device="cpu")])
    if len(flat) and (int(flat[0]) < 0 or bool((flat[1:] <= flat[:-1]).any())):
        raise ValueError("places: expected positions from 0 that ascend, image by image, in the order of the prompt")
    moved = [x.to(device) for x in at]
    if not len(flat):
        return None, moved
    vision = torch.zeros(1, int(flat[-1]) + 2, dtype=torch.bool, device="cpu")  # a token of text is the last one
    vision[0, flat] = True
    return Call(vision.to(device), None, list(lengths)), moved


def checked_grids(
    grids: Sequence[tuple[int, int]] | None, lengths: Sequence[int], counts: TokenCounts
) -> list[tuple[int, int]]:
    """The grids, if they are of these images.

    Raises:
        ValueError: they are not, or an image is in pieces.
    """
    sizes = [rows * columns for rows, columns in grids or ()]
    if grids is None or sizes != list(lengths) or counts.images != tuple(lengths):
        raise ValueError(f"grids: expected rows and columns of images in one piece, {list(counts.images)}, got {grids}")
    return [(int(rows), int(columns)) for rows, columns in grids]
