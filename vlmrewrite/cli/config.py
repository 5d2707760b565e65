"""What `vlmrewrite inspect` shows: models and prompts made from configurations alone, and profiles of real ones.

config, written = read_config(file)                  # a folder's config.json
model = skeleton(config, torch.bfloat16, file)       # on the meta device: shapes, no memory
program, inputs = captured_prompt(model, Shape(image_tokens=576, text=64))
print(program)
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from vlmrewrite.errors import blamed_on, shown

_TOKENS = ("mm_tokens_per_image", "vision_soft_tokens_per_image", "num_query_tokens")

_LENGTHS = ("image_seq_length", "image_seq_len")

_MERGES = ("spatial_merge_size", "scale_factor", "downsample_factor", "downsample_ratio", "pixel_shuffle_ratio")


_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

_SMALL = ("*.json", "*.jinja", "*.txt", "*.model")  # of a model on the Hub, all but the weights


def local(model: Path, *, weights: bool = False) -> Path:
    """A model's folder or file as it is; of a Hub id, ``organisation/name``, transformers' copy of the folder.

    Args:
        model: a path; or a Hub id, if there is no such path.
        weights: whether the copy shall have them.

    Raises:
        FileNotFoundError: there is no such path, and the Hub's copy cannot be had.
    """
    if model.exists() or not _HUB.fullmatch(model.as_posix()) or model.suffix == ".json":
        return model
    from huggingface_hub import snapshot_download

    try:
        wanted = [*_SMALL, "*.safetensors"] if weights else list(_SMALL)
        return Path(snapshot_download(model.as_posix(), allow_patterns=wanted))
    except Exception as e:
        why = " ".join(str(e).split("\n\n")[0].split())
        raise FileNotFoundError(
            f"expected a model folder, a config JSON file or a model on the Hub, got {str(model)!r}: there is no such"
            f" path, and the Hub's copy cannot be had ({type(e).__name__}: {why[:300]})"
        ) from e


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
        raise ValueError(
            f"{file}: expected the configuration of a vision-language model that transformers has, got model_type"
            f" {shown(written['model_type'])}{_what_it_is(written['model_type'])}"
        )
    with blamed_on(file, "the configuration"):
        return AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False), written


def _what_it_is(kind: str) -> str:
    """What a model type stands for that is no image-text-to-text model's; if it is not known, what is like it."""
    if kind in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return ", a model that compares images with texts and writes none"
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return ", a model of text alone: it has no vision tokens"
    if kind in CONFIG_MAPPING_NAMES:
        return f", a model that does not answer questions about images ({CONFIG_MAPPING_NAMES[kind]})"
    close = difflib.get_close_matches(kind, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


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
        f"the configuration of {config.model_type} does not say how many tokens an image has: it takes images of any"
        " size; give --image-size, such as 640x480 (pixels), or --image-tokens"
    )


def _pair(size: Any) -> tuple[int, int] | None:
    sizes = (size, size) if isinstance(size, int) else size
    if not isinstance(sizes, Sequence) or len(sizes) != 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        return None
    return sizes[0], sizes[1]
