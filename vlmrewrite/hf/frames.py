"""How many tokens each frame of an image or video has, also where a forward takes some of the features only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmrewrite.hf.vision import MODALITIES


def frames_of(
    lengths: Mapping[str, Sequence[int]], frames: Sequence[int], picked: Mapping[str, Tensor]
) -> list[list[tuple[int, ...]]]:
    """Tokens of each frame of the images, and of the videos, of a call.

    Args:
        lengths: by modality, tokens of each image or video, as the tower gave them.
        frames: of each video, as far as that is known.
        picked: by modality, which of them the forward takes; see :func:`left_of`.
    """
    sizes = {m: frame_sizes(n, frames if m == "video" else ()) for m, n in lengths.items()}
    return [left_of(sizes[m], picked[m]) if m in picked else sizes.get(m, []) for m in MODALITIES]


def picked_of(lengths: Mapping[str, int], taken: Sequence[tuple[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """Which of the tower's features a forward writes, by modality, int64 [n], of those of which it takes some.

    Args:
        lengths: how many features there are.
        taken: each time that some are taken: of which modality, the places of these, and of all there are then.

    Raises:
        ValueError: there are other features then than those that are left.
    """
    picked: dict[str, Tensor] = {}
    for modality, (places, every) in taken:
        before = picked.get(modality, torch.arange(lengths[modality], device=places.device))
        if every.numel() != len(before):
            raise ValueError(
                f"the forward takes some of {every.numel()} {modality} features into the stream, where the vision tower"
                f" made {len(before)}: expected that each one is written or left out as it was made"
            )
        picked[modality] = before[places.flatten()]
    return picked


def frame_sizes(lengths: Sequence[int], frames: Sequence[int]) -> list[tuple[int, ...]]:
    """Tokens of each frame of each image, or video.

    Args:
        lengths: tokens of each.
        frames: frames of each; where that is not known of all, each is one.
    """
    known = frames if len(frames) == len(lengths) else [1] * len(lengths)
    split = [(divmod(n, many), many) for n, many in zip(lengths, known, strict=True)]
    return [(*[size] * (many - 1), size + more) for (size, more), many in split]  # a mark of the end is the last one's


def left_of(sizes: Sequence[Sequence[int]], places: Tensor) -> list[tuple[int, ...]]:
    """Tokens of each frame of each image, of those of which some are left, where a forward takes some features only.

    Args:
        sizes: tokens of each frame of each image before.
        places: which of them are taken, int64 [n].

    Raises:
        ValueError: they are taken in another order, or several times.
    """
    places = places.cpu()
    if bool((back := places.diff() <= 0).any()):
        at = int(back.nonzero()[0, 0])
        raise ValueError(
            "the forward writes the vision tower's features into the stream in another order, or some of them several"
            f" times (number {int(places[at + 1])} behind number {int(places[at])}): expected each of those that it"
            " takes once, in order"
        )
    flat = torch.tensor([n for image in sizes for n in image], dtype=torch.int64)
    left = torch.bincount(torch.arange(len(flat)).repeat_interleave(flat)[places], minlength=len(flat)).tolist()
    ends = torch.tensor([0, *map(len, sizes)]).cumsum(0).tolist()
    return [tuple(left[a:b]) for a, b in pairwise(ends) if any(left[a:b])]


def in_order(of: dict[str, Tensor], of_videos: Tensor) -> Tensor:
    """What belongs to the vision tokens of images and of videos, as these stand in the sequence, [F, ...]."""
    if len(of) == 1:
        return next(iter(of.values()))
    out = of["image"].new_empty(len(of_videos), *of["image"].shape[1:])
    out[~of_videos], out[of_videos] = of["image"], of["video"]
    return out
