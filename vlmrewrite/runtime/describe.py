"""A call as its plan needs it: which tokens are vision, text or padding, and what is known of the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from vlmrewrite.hf import Encoding, encoder_features, grids
from vlmrewrite.plan import Call, TokenCounts
from vlmrewrite.runtime.facts import Given


def describe(
    vision: Tensor,
    given: Given,
    wants: Collection[str],
    reads_last: bool,
    encodings: Sequence[Encoding],
    config: Any,
) -> tuple[Call, dict[str, str]]:
    """The call, and which of the facts that the recipe asks for are missing, with the reason.

    Args:
        vision: the vision-token mask, bool [B, T].
        given: what the call was given.
        wants: what the recipe's policies and edits ask for.
        reads_last: whether something is read at the last prompt token.
        encodings: runs of the vision tower that the images may come from.
        config: the model's.

    Raises:
        ValueError: the encoder's features are wanted, and the images were encoded elsewhere.
    """
    missing: dict[str, str] = {}
    mask, padding, features = given.mask, None, None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        padding = mask[:, -vision.shape[1] :].bool().to(vision.device)
    if "encoder_features" in wants:
        known = encoder_features(encodings, given.images)
        if isinstance(known, str):
            missing["encoder_features"] = known
        else:
            features = known
    end = ends = None
    if given.end is not None and not len(vision) % len(given.end):
        copies = len(vision) // len(given.end)  # beams, or several sequences of a prompt
        end = given.end.to(vision.device).repeat_interleave(copies) - given.past
        here = (end >= 0) & (end < vision.shape[1])
        if not reads_last:
            ends = here
        end = end if bool(here.all()) else None
    call = Call(vision, padding, given.images.lengths, given.past, end, features, ends=ends)
    if "grid" in wants:
        found = grids(config, call.counts.images, _of_copies(given.thw, call.counts))
        if isinstance(found, str):
            missing["grid"] = found
        else:
            call.grid = found
    return call, missing


def _of_copies(thw: Tensor | None, counts: TokenCounts) -> Tensor | None:
    """The grids of a call in which each row of the prompt stands several times: one for each image."""
    images = len(counts.images)
    if thw is None or len(thw) in (0, images) or images % len(thw):
        return thw
    copies, in_row = images // len(thw), Counter(counts.rows)
    sources = range(0, len(counts.text), copies)
    before = [0, *accumulate(in_row[row] for row in sources)]
    which = [before[row // copies] + i for row, i in zip(counts.rows, counts.ordinals, strict=True)]
    return thw[which] if before[-1] == len(thw) else thw
