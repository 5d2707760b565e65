"""Smaller pictures: a processor set so that pictures have fewer tokens, by what its image processor can be told."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vlmrewrite.hf.vision import encode_images

_PROBES = (480, 640), (1200, 1600)
"""Height and width of made-up pictures, on which it is looked at what a setting does."""

_SMALL = (32, 32), (64, 64), (128, 128), (256, 256)
"""Pictures that a limit may leave as they are, though it makes the others smaller."""

_MOST = ("max_patches", "max_num_patches", "max_num_tiles", "max_image_tiles", "max_slice_nums", "max_crops")
"""How image processors call the number of tiles that a picture is cut into at most."""

_FACTORS = (1.0, 0.8, 0.6, 0.4, 0.25, 0.1)
"""By how much more limits are set smaller where pictures are cut into tiles, of which some may be mostly empty."""

_ROUND = 1.1
"""Sides are rounded to whole patches, so that a share of a picture's tokens may be missed by so much."""


def smaller(processor: Any, share: float) -> Any:
    """A processor that makes about a share of the tokens of each picture, by making the picture smaller.

    What limits sizes in pixels or sides, and the number of tiles, is set smaller; where that leaves pictures below the
    limits as they are, sides are made ``sqrt(share)`` as long before they are processed. Where shapes of tiles are told
    one by one, which a model knows too, pictures are made so small that a smaller shape is taken. That it does so is
    seen on made-up pictures. Where pictures are cut into tiles, few shares can be had: the next smaller one is, or the
    smallest that there is.

    Args:
        processor: of a model, with an image processor; it is left as it is.
        share: in (0, 1].

    Returns:
        a copy of the processor with an image processor of its own.

    Raises:
        ValueError: it has none, or makes as many tokens of a picture however small that is.
    """
    images = getattr(processor, "image_processor", None)
    if images is None:
        raise ValueError(
            f"expected a processor with an image_processor, got {type(processor).__name__}, which has none"
        )
    patch = getattr(processor, "patch_size", None) or getattr(images, "patch_size", None)
    unit = patch if isinstance(patch, int) else 1  # towers differ in what they make of a part of a patch
    before, found = [_pixels(images, probe) for probe in _PROBES], list[tuple[float, float, float]]()

    def share_of(one: Any) -> float:
        return max(_pixels(one, probe) / n for probe, n in zip(_PROBES, before, strict=True))

    shorter = math.sqrt(share)
    for factor, side in ((_FACTORS[0], 1.0), (_FACTORS[0], shorter), *((factor, 1.0) for factor in _FACTORS[1:])):
        found.append((share_of(_limited(images, factor * share, unit, side)), factor, side))
        if found[-1][0] <= _ROUND * share:
            break
    least, factor, side = min(found, key=lambda x: x[0])
    made, both = (_limited(images, factor * share, unit, x) for x in (side, shorter))
    if side == 1 and share_of(both) * _ROUND >= least and _less(both, made):
        made = both
    if least >= 1 and share < 1:
        raise ValueError(
            f"{type(images).__name__} makes as many tokens of a picture however small that is: their number is fixed,"
            " and smaller pictures save nothing"
        )
    out = copy.copy(processor)
    out.image_processor = made
    return out


def refuse_smaller(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Encode pictures that were made smaller.

    Args:
        model: unmodified.
        inputs: what its forward takes, where the model is.

    Raises:
        ValueError: the model does not take pictures of that size; with what it says.
    """
    try:
        with torch.no_grad():
            encode_images(model, dict(inputs))
    except Exception as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise ValueError(f"{type(model).__name__} does not take smaller pictures: {why}") from e


def refuse_one_size(model: Any, processor: Any, made: Any) -> None:
    """Try a made-up picture, where no other is at hand: of the tower's size, or else one that has to be resized.

    Args:
        model: unmodified.
        processor: the model's.
        made: what :func:`smaller` made of it.

    Raises:
        ValueError: the model takes the picture as its own processor makes it, and not the smaller one.
    """
    side = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    for probe in ([(side, side)] if isinstance(side, int) else []) + [_PROBES[0]]:
        try:
            refuse_smaller(model, _one(model, processor, probe))
        except Exception:
            continue  # nothing follows from a picture that the model does not take anyway
        refuse_smaller(model, _one(model, made, probe))
        return


def _one(model: Any, processor: Any, probe: tuple[int, int]) -> dict[str, Any]:
    """A made-up picture as a forward takes it, and no prompt."""
    from PIL import Image  # only what reads images needs it

    pixels = processor.image_processor(images=[Image.new("RGB", probe[::-1])], return_tensors="pt")
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    return {"input_ids": ids, **pixels.to(model.device, dtype=model.dtype)}


def _less(images: Any, than: Any) -> bool:
    """Whether an image processor makes less of a small picture than another one."""
    for probe in _SMALL:
        try:
            if _pixels(images, probe) < _pixels(than, probe):
                return True
        except Exception:
            continue  # too small for it
    return False


def _pixels(images: Any, probe: tuple[int, int]) -> int:
    """Numbers that stand for a picture behind the image processor."""
    from PIL import Image  # only what reads images needs it

    made = images(images=[Image.new("RGB", probe[::-1])], return_tensors="pt")
    return int(made["pixel_values"].numel())


def _with_settings(images: Any, share: float) -> Any:
    """A copy whose limits of sizes are smaller; one size for all, which is the encoder's, stays."""
    out = copy.deepcopy(images)
    known = dict(getattr(out, "size", None) or {})
    if "longest_edge" in known or "max_pixels" in known:
        area = known.get("longest_edge", 0) > 2**13 or "max_pixels" in known  # pixels of the picture, not of a side
        times = share if area else math.sqrt(share)
        scaled = {key: max(1, round(value * times)) for key, value in known.items()}
        out.size = scaled if isinstance(out.size, Mapping) else type(out.size)(**scaled)
    for name in ("min_pixels", "max_pixels"):
        if isinstance(getattr(out, name, None), int):
            setattr(out, name, max(1, round(getattr(out, name) * share)))
    for name in _MOST:
        if isinstance(getattr(out, name, None), int):
            setattr(out, name, max(1, math.floor(getattr(out, name) * share)))
            least = name.replace("max", "min")
            if isinstance(getattr(out, least, None), int):
                setattr(out, least, min(getattr(out, least), getattr(out, name)))
    return out


def _limited(images: Any, share: float, unit: int, side: float) -> Any:
    """A copy with smaller limits, which makes sides so much shorter first; where shapes are told, as these ask for."""
    points: Sequence[Sequence[int]] | None = getattr(images, "image_grid_pinpoints", None)
    most = share * max(a * b for a, b in points) if points else math.inf
    out = _with_settings(images, share)
    return out if side == 1 and most == math.inf else _shrinking(out, side, unit, most)


def _shrinking(images: Any, side: float, unit: int, most: float) -> Any:
    """A copy that makes pictures smaller first, to whole units of pixels, and to so many pixels at most, about."""
    kind: Any = type(images)

    def preprocess(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.preprocess(self, _shrunk(images, side, unit, most), *args, **kwargs)

    out = copy.deepcopy(images)
    out.__class__ = type(f"Smaller{kind.__name__}", (kind,), {"preprocess": preprocess})
    return out


def _shrunk(images: Any, side: float, unit: int, most: float) -> Any:
    if isinstance(images, list | tuple):
        return [_shrunk(image, side, unit, most) for image in images]
    if not callable(getattr(images, "resize", None)) or not hasattr(images, "width"):
        raise TypeError(f"expected pictures of PIL, which can be made smaller, got {type(images).__name__}")
    side = min(side, math.sqrt(most / (images.width * images.height)))
    sides = (min(n, max(1, round(n * side / unit)) * unit) for n in (images.width, images.height))
    return images.resize(tuple(sides))
