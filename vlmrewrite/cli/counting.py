"""How many vision tokens a picture of some size has, as the family's own image processor and processor count them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor
from transformers.models.auto.auto_mappings import IMAGE_PROCESSOR_MAPPING_NAMES, PROCESSOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.models.auto.processing_auto import processor_class_from_name

from vlmrewrite.cli.config import image_tokens
from vlmrewrite.compat import tokens_of_image
from vlmrewrite.errors import blamed_on

_SETTINGS = ("preprocessor_config.json", "processor_config.json")

_INSTEAD = "give --image-tokens, the number of the model's image tokens in the prompt for one such picture"

_IN_CONFIG = {"merge_size": "spatial_merge_size", "img_size": "image_size"}
"""What configurations call a setting of a processor that has another name there."""


def tokens_of_picture(config: Any, written: dict[str, Any], folder: Path, size: tuple[int, int]) -> tuple[int, str]:
    """Vision tokens of one picture that is alone in its row, and who counted them.

    Args:
        config, written: as :func:`vlmrewrite.cli.config.read_config` gives them.
        folder: of the model; where it holds an image processor's settings these count, else the class's defaults with
            the configuration's sizes.
        size: width and height in pixels.

    Raises:
        ValueError: this family's processor cannot say.
    """
    width, height = size
    images = _image_processor(config, folder)
    name, one = type(images).__name__, f"a picture of {width}x{height}"
    found = None
    if hasattr(images, "get_number_of_image_patches"):
        with blamed_on(folder, f"{name} for {one}"):
            found = images.get_number_of_image_patches(height, width, {})
    # of a grid, rows and columns, the processor knows what the tower adds to each row
    if found is not None and not (isinstance(found, tuple) and len(found) == 2):
        patches = found[0] if isinstance(found, tuple) else found
        merge = getattr(images, "merge_size", None)
        if merge is not None:
            return patches // merge**2, f"{name}, {one}: {patches} patches, {merge}x{merge} of them a token"
        each, source = image_tokens(config, written)
        return patches * each, f"{name}, {one}: {patches} tiles of {each}, from {source}"
    kind = processor_class_from_name(PROCESSOR_MAPPING_NAMES.get(config.model_type, ""))
    try:
        processor = None if kind is None else _bare(kind, images, config, written, folder)
        counted = tokens_of_image(processor, height, width)
        if counted is not None:
            return counted, f"{type(processor).__name__}, {one}"
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as e:  # it wants more than a bare one has
        raise ValueError(
            f"{getattr(kind, '__name__', kind)} cannot count the tokens of {one} here ({_first(e)}); {_INSTEAD}"
        ) from e
    raise ValueError(f"{name} does not say how many tokens {one} has; {_INSTEAD}")


def _image_processor(config: Any, folder: Path) -> Any:
    if any((folder / name).is_file() for name in _SETTINGS):
        with blamed_on(folder, "the image processor"):
            return AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    kinds = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type)
    names = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    found = [kind for name in names if name and (kind := get_image_processor_class_from_name(name)) is not None]
    usable = [kind for kind in found if _is_there(kind)]
    if found and not usable:
        raise ValueError(f"{found[0].__name__} needs a library that is not installed (torchvision?); {_INSTEAD}")
    if not usable:
        raise ValueError(
            f"transformers has no image processor for model_type {config.model_type!r} here, so that the tokens of a"
            f" picture cannot be counted; {_INSTEAD}"
        )
    kind = usable[0]
    known = {
        n: _setting(config, n) for n in ("patch_size", "temporal_patch_size", "merge_size", "image_grid_pinpoints")
    }
    side = _setting(config, "image_size")
    for name in ("size", "crop_size", "max_image_size"):
        sides = getattr(kind, name, None)
        default = {} if sides is None or isinstance(sides, int) else dict(sides)
        of_a_tile = [{"height", "width"}, {"longest_edge"} if name == "max_image_size" else {"shortest_edge"}]
        if side is not None and set(default) in of_a_tile:
            known[name] = dict.fromkeys(default, side)
    return kind(**{name: value for name, value in known.items() if value is not None and hasattr(kind, name)})


def _is_there(kind: Any) -> bool:
    """Whether a class of transformers can be used with what is installed."""
    try:
        return hasattr(kind, "preprocess")
    except ImportError:
        return False


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _bare(kind: type[Any], images: Any, config: Any, written: dict[str, Any], folder: Path) -> Any:
    """A processor without a tokenizer, which counting does not need and a configuration does not hold."""
    processor, told = object.__new__(kind), dict[str, Any]()
    for name in _SETTINGS:
        if (folder / name).is_file():
            told |= json.loads((folder / name).read_bytes())
    try:
        each: int | None = image_tokens(config, written)[0]
    except ValueError:
        each = None
    told_by_config = {"image_seq_length": each, "image_seq_len": each, "num_image_tokens": each}
    strategy = _setting(config, "vision_feature_select_strategy")
    told_by_config["num_additional_image_tokens"] = int(strategy == "default")  # the class token, which it leaves out
    for parameter in inspect.signature(kind.__init__).parameters.values():
        known = [told.get(parameter.name), told_by_config.get(parameter.name), _setting(config, parameter.name)]
        value = next((x for x in known if x is not None), parameter.default)
        setattr(processor, parameter.name, None if value is parameter.empty else value)
    for name, value in told_by_config.items():
        if not hasattr(processor, name):  # some take it from the image processor
            setattr(processor, name, value)
    processor.image_processor, processor.tokenizer = images, _NoTokenizer()
    return processor


class _NoTokenizer:
    """A tokenizer without settings."""

    init_kwargs: dict[str, Any] = {}  # noqa: RUF012 (read only)


def _setting(config: Any, name: str) -> Any:
    """What a configuration, or its vision tower's, says of a processor's setting; of a square one side."""
    for part in (config, getattr(config, "vision_config", None)):
        for key in (name, _IN_CONFIG.get(name, name)):
            value = getattr(part, key, None)
            if value is not None:
                return value[0] if isinstance(value, list | tuple) and key in ("image_size", "patch_size") else value
    return None
