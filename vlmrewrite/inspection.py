"""What `vlmrewrite inspect` shows: models and prompts made from configurations alone, and profiles of real ones.

config, written = read_config(file)                  # llava-1.5-7b/config.json
model = skeleton(config, torch.bfloat16, file)       # on the meta device: shapes, no memory
program, inputs = traced_prompt(model, Shape(image_tokens=576, text=64))
print(program)
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmrewrite.call import Call
from vlmrewrite.complaints import blamed_on, shown
from vlmrewrite.plan import Plan
from vlmrewrite.program import Program
from vlmrewrite.traced import trace

if TYPE_CHECKING:
    from vlmrewrite.layerwise import LayerProfile

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


@dataclass(frozen=True)
class Shape:
    """A made-up prompt: ``rows`` rows, each of ``text`` text tokens and ``images`` images of ``image_tokens`` tokens.

    A text token stands before each image, the other ones behind the last.
    """

    image_tokens: int
    text: int = 64
    images: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        for name in ("images", "rows", "image_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        if self.text <= self.images:
            raise ValueError(f"--text: expected more text tokens than images ({self.images}), got {self.text}")

    def __str__(self) -> str:
        return f"{self.rows} x ({self.text} text tokens, {self.images} x {self.image_tokens} vision tokens)"

    def vision(self) -> Tensor:
        """The vision tokens, bool [rows, T], on the CPU."""
        one = torch.tensor([False] + [True] * self.image_tokens)
        row = torch.cat([one.repeat(self.images), torch.zeros(self.text - self.images, dtype=torch.bool)])
        return row.repeat(self.rows, 1)


def prompt_inputs(model: Any, shape: Shape, *, as_list: bool, seed: int = 0) -> dict[str, Any]:
    """What the model's forward takes for a made-up prompt whose images are encoded already: random text and features.

    Args:
        model: on any device.
        shape: of the prompt.
        as_list: whether the features are one tensor [N, C] per image, or one tensor [I, N, C].
        seed: of the random numbers.
    """
    device, dtype = model.device, model.dtype
    generator = torch.Generator().manual_seed(seed)
    vision, text = shape.vision(), model.config.get_text_config(decoder=True)
    ids = torch.randint(text.vocab_size, vision.shape, generator=generator)
    special = _special_ids(model.config) | _special_ids(text)
    ids[torch.isin(ids, torch.tensor(sorted(special)))] = min(set(range(len(special) + 1)) - special)
    ids[vision] = model.config.image_token_id
    size = (shape.rows * shape.images, shape.image_tokens, text.hidden_size)
    if device.type == "meta":
        features = torch.empty(size, dtype=dtype, device=device)
    else:
        features = torch.randn(size, generator=generator).to(device, dtype)
    image = BaseModelOutputWithPooling(pooler_output=list(features) if as_list else features)  # type: ignore[arg-type]
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inspect.signature(type(model).forward).parameters:
            inputs[name] = vision.long().to(device)
    if hasattr(model.base_model, "compute_3d_position_ids"):  # multimodal rope: time, height and width
        columns = torch.arange(ids.shape[1], device=device)
        inputs["position_ids"] = columns.expand(3, shape.rows, -1).contiguous()
    return inputs | {"mm_encoder_outputs": {"image": image}}


def _special_ids(config: Any) -> set[int]:
    names = [name for name in config.to_dict() if name.endswith(("_token_id", "_token_index"))]
    values = [getattr(config, name, None) for name in names]
    return {v for value in values for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}


def traced_prompt(model: Any, shape: Shape) -> tuple[Program, dict[str, Any]]:
    """Capture a model's forward for a made-up prompt; the vision tower and the decoder are not run.

    Returns:
        the program, with its call known even if the model is on the meta device; and the prompt, whose features have
        the form that the model takes.

    Raises:
        ValueError: the model is not one that can be rewritten.
        RuntimeError: its forward could not be captured.
    """
    refusals: dict[str, str] = {}
    for as_list, form in ((True, "one tensor for each image"), (False, "one tensor")):
        inputs = prompt_inputs(model, shape, as_list=as_list)
        try:
            program = trace(model, inputs)
        except RuntimeError as e:
            refusals.setdefault(_cause(e), form)
            continue
        call = Call(shape.vision(), None, [shape.image_tokens] * (shape.rows * shape.images))
        return replace(program, call=call), inputs
    reasons = " -- and ".join(f"with its image features as {form}: {cause}" for cause, form in refusals.items())
    raise RuntimeError(f"no made-up prompt of {type(model).__name__} could be captured {reasons}")


def _cause(error: RuntimeError) -> str:
    """What Dynamo says first, its details, and the innermost source line, of the many lines in its message."""
    lines = [line.strip() for line in str(error).splitlines()]
    details = [line.partition(": ")[2] for line in lines if line.startswith("Developer debug context: ")]
    places = re.findall(r'File "(?:[^"]*/)?([^"/]+)", line (\d+)', str(error))
    at = [f"({places[-1][0]}, line {places[-1][1]})"] if places else []
    return " ".join([*lines[:1], *details[:1], *at])


def summary(program: Program) -> dict[str, Any]:
    """What each layer works on and costs, before and after, and the totals; plain values.

    Raises:
        ValueError: the program's call is not known.
    """
    if program.call is None:
        raise ValueError("the program was captured from a call that is not known; expected one with a Call")
    census, past = program.call.census, program.call.past
    after = program.costs(census, past)
    before = replace(program, plan=Plan(program.plan.depth)).costs(census, past)
    layers = []
    for a, b in zip(after, before, strict=True):
        entry = program.plan.layers[a.index]
        where = {"layer": a.index, "run_on": program.plan.render(entry.run_set)}
        where["attend_to"] = program.plan.render(entry.keys)
        now = {"tokens": a.run, "keys": a.keys, "flops": a.flops, "kv_bytes": a.kv_bytes}
        then = {"tokens": b.run, "keys": b.keys, "flops": b.flops, "kv_bytes": b.kv_bytes}
        layers.append(where | now | {f"{k}_before": v for k, v in then.items()})
    return {
        "passes": [
            {"name": o.name, "configuration": o.configuration, "matched": o.reason is None, "reason": o.reason}
            for o in program.outcomes
        ],
        "layers": layers,
        "totals": {
            name: {
                "flops": sum(c.flops for c in found),
                "kv_bytes": sum(c.kv_bytes for c in found),
                "tokens": sum(c.run for c in found) / len(found),
            }
            for name, found in (("before", before), ("after", after))
        },
        "seconds": program.seconds,
    }


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
        device, dtype: as :mod:`vlmrewrite.loading` takes them.
        progress: as for :func:`vlmrewrite.layerwise.profile`.

    Raises:
        ValueError: something cannot be read or used; see :func:`vlmrewrite.layerwise.profile`.
    """
    from vlmrewrite import layerwise, loading

    if len(prompts) not in (1, len(images)):
        raise ValueError(f"--prompt: expected one, or one for each of {len(images)} images, got {len(prompts)}")
    if folder.is_file():
        raise ValueError(f"--profile: expected a folder with weights and a processor, got the file {str(folder)!r}")
    where, (config, _) = loading.device_of(device), read_config(folder)
    kind, pictures = loading.dtype_of(dtype, config, where), loading.read_images(images)
    processor = loading.read_processor(folder)
    groups = [pictures] if len(prompts) == 1 else [[picture] for picture in pictures]
    asked = [loading.question(processor, *pair) for pair in zip(prompts, groups, strict=True)]
    model = loading.with_weights(folder, kind, where)
    found = layerwise.profile(model, [dict(inputs.to(where, dtype=kind)) for inputs in asked], progress=progress)
    about: dict[str, Any] = {"model": str(folder), "class": type(model).__name__, "device": str(where)}
    about |= {"dtype": str(kind).removeprefix("torch."), "images": list(map(str, images)), "prompts": list(prompts)}
    return found, about
