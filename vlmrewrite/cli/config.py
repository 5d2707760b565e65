"""What `vlmrewrite inspect` shows: models and prompts made from configurations alone, and profiles of real ones.

config, written = read_config(file)                  # llava-1.5-7b/config.json
model = skeleton(config, torch.bfloat16, file)       # on the meta device: shapes, no memory
program, inputs = captured_prompt(model, Shape(image_tokens=576, text=64))
print(program)
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmrewrite.errors import blamed_on, shown

_TOKENS = ("mm_tokens_per_image", "vision_soft_tokens_per_image", "num_query_tokens")

_LENGTHS = ("image_seq_length", "image_seq_len")

_MERGES = ("spatial_merge_size", "scale_factor", "downsample_factor", "downsample_ratio", "pixel_shuffle_ratio")


def config_file(path: Path) -> Path:
    """The JSON file that is meant: a model folder's ``config.json``, or the file itself.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a model folder or a config JSON file, got {str(path)!r}: it does not exist")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"expected a model folder, got {str(path)!r}: it holds no config.json")
    return file


def read_config(path: Path) -> tuple[Any, dict[str, Any]]:
    """The configuration of a vision-language model, and what is written in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or not the configuration of an image-text-to-text model.
    """
    file = config_file(path)
    try:
        written = json.loads(file.read_bytes())
    except ValueError as e:
        raise ValueError(f"{file}: expected JSON: {e}") from None
    if not isinstance(written, dict) or not isinstance(written.get("model_type"), str):
        got = shown(written) if not isinstance(written, dict) else "one without it"
        raise ValueError(f"{file}: expected a model's configuration with a 'model_type', got {got}")
    if written["model_type"] not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        close = difflib.get_close_matches(written["model_type"], MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"{file}: expected the configuration of a vision-language model that transformers has, got model_type"
            f" {shown(written['model_type'])}{hint}"
        )
    with blamed_on(file, "the configuration"):
        return AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False), written


def skeleton(config: Any, dtype: torch.dtype, file: Path) -> Any:
    """A model on the meta device, in eval mode: shapes without memory.

    Raises:
        ValueError: the model cannot be built from the configuration, which was read from ``file``.
    """
    with blamed_on(file, "the configuration"), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def image_tokens(config: Any, written: dict[str, Any]) -> tuple[int, str]:
    """Vision tokens of one image (of one tile, for models that cut images up), and where the number comes from.

    A length written in the file counts more than the tower's patch grid, and that more than a class's default length.

    Raises:
        ValueError: the configuration does not say.
    """
    for name in (*_TOKENS, *(n for n in _LENGTHS if n in written)):
        if isinstance(n := getattr(config, name, None), int) and n > 0:
            return n, name
    tower = getattr(config, "vision_config", None)
    sides, patches = _pair(getattr(tower, "image_size", None)), _pair(getattr(tower, "patch_size", None))
    if sides and patches:
        grid = [side // patch for side, patch in zip(sides, patches, strict=True)]
        factors = [(name, getattr(c, name, None)) for c in (config, tower) for name in _MERGES]
        used = [(name, f) for name, f in factors if isinstance(f, int | float) and f > 0][:1]
        for _, f in used:
            grid = [int(side // f if f >= 1 else side * f) for side in grid]
        if min(grid) > 0:
            return grid[0] * grid[1], " and ".join(["the tower's patch grid", *(name for name, _ in used)])
    for name in _LENGTHS:
        if isinstance(n := getattr(config, name, None), int) and n > 0:
            return n, name
    raise ValueError(
        f"the configuration of {config.model_type} does not say how many tokens an image has (images of any size);"
        " give --image-tokens"
    )


def _pair(size: Any) -> tuple[int, int] | None:
    sizes = (size, size) if isinstance(size, int) else size
    if not isinstance(sizes, Sequence) or len(sizes) != 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        return None
    return sizes[0], sizes[1]
