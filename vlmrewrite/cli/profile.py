"""The profile of a model in a folder, on pictures and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmrewrite.cli import loading
from vlmrewrite.cli.config import local, read_config
from vlmrewrite.report import LayerProfile, profile


def profile_folder(
    folder: Path,
    images: Sequence[Path],
    prompts: Sequence[str],
    device: str,
    dtype: str,
    progress: Callable[[str, int, int], None],
) -> tuple[LayerProfile, dict[str, Any]]:
    """The profile of a model with weights, and what was profiled.

    Args:
        folder: with weights and processor.
        images, prompts: one prompt about all images, or one about each image.
        device, dtype: as :mod:`vlmrewrite.cli.loading` takes them.
        progress: as for :func:`vlmrewrite.report.layer_profile.profile`.

    Raises:
        ValueError: something cannot be read or used; see :func:`vlmrewrite.report.layer_profile.profile`.
    """
    if len(prompts) not in (1, len(images)):
        raise ValueError(f"--prompt: expected one, or one for each of {len(images)} images, got {len(prompts)}")
    if folder.is_file():
        raise ValueError(f"--profile: expected a folder with weights and a processor, got the file {str(folder)!r}")
    given, folder = folder, local(folder, weights=True)
    where, (config, _) = loading.device_of(device), read_config(folder)
    kind, pictures = loading.dtype_of(dtype, config, where), loading.read_images(images)
    processor = loading.read_processor(folder)
    groups = [pictures] if len(prompts) == 1 else [[picture] for picture in pictures]
    asked = [loading.question(processor, *pair) for pair in zip(prompts, groups, strict=True)]
    model = loading.with_weights(folder, kind, where)
    found = profile(model, [dict(inputs.to(where, dtype=kind)) for inputs in asked], progress=progress)
    about: dict[str, Any] = {"model": str(given), "class": type(model).__name__, "device": str(where)}
    about |= {"dtype": str(kind).removeprefix("torch."), "images": list(map(str, images)), "prompts": list(prompts)}
    return found, about
