"""Made-up prompts: random text and features of a given shape, as a model's forward takes them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from vlmrewrite.cli.config import image_tokens as tokens_of_image
from vlmrewrite.errors import CaptureError
from vlmrewrite.plan import Call
from vlmrewrite.rewrite import Program
from vlmrewrite.runtime import trace

_NOT_ENCODED = "the prompt is made up, and no image went through the encoder; with images (vlmrewrite apply) one does"


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


def made_up_shape(
    config: Any,
    written: dict[str, Any],
    image_tokens: int | None,
    counts: dict[str, int],
    picture: tuple[int, int] | None = None,
    model: Path | None = None,
) -> tuple[Shape, str]:
    """The made-up prompt, and where its number of tokens an image comes from.

    Args:
        config, written: as :func:`vlmrewrite.cli.config.read_config` gives them.
        image_tokens: as given; None: as a picture has, or else as the configuration says.
        counts: text tokens, images and rows.
        picture: width and height in pixels of each image.
        model: the folder or file; with a picture.
    """
    if image_tokens is not None:
        tokens, source = image_tokens, "as given"
    elif picture is not None and model is not None:
        from vlmrewrite.cli.counting import tokens_of_picture

        tokens, source = tokens_of_picture(config, written, model, picture)
        source += ", as if alone in its row" if counts.get("images", 1) > 1 else ""
    else:
        tokens, source = tokens_of_image(config, written)
    return Shape(tokens, **counts), source


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
    ids[vision] = _image_token(model.config)
    size = (shape.rows * shape.images, shape.image_tokens, text.hidden_size)
    if device.type == "meta":
        features = torch.empty(size, dtype=dtype, device=device)
    else:
        features = torch.randn(size, generator=generator).to(device, dtype)
    image = _encoder_output(model)
    image.last_hidden_state, image.pooler_output = features, list(features) if as_list else features
    flat, layers = list(features) if as_list else features.flatten(0, 1), _layers_with_features(model.config)
    if layers:  # the tower's output holds features for some layers too, which may say which
        image.deepstack_features = [flat if layer is None else (layer, flat) for layer in layers]
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inspect.signature(type(model).forward).parameters:
            inputs[name] = vision.long().to(device)
    if hasattr(model.base_model, "compute_3d_position_ids"):  # multimodal rope: time, height and width, or more
        axes = (getattr(text, "rope_parameters", None) or {}).get("mrope_section") or range(3)
        columns = torch.arange(ids.shape[1], device=device)
        inputs["position_ids"] = columns.expand(len(axes), shape.rows, -1).contiguous()
    return inputs | {"mm_encoder_outputs": {"image": image}}


def _encoder_output(model: Any) -> Any:
    """An empty output of the class that ``get_image_features`` says it gives."""
    encoder = inspect.unwrap(getattr(model.base_model, "get_image_features", _encoder_output))
    said = get_type_hints(encoder).get("return")
    kinds = [kind for kind in get_args(said) or (said,) if inspect.isclass(kind) and issubclass(kind, ModelOutput)]
    return kinds[0]() if kinds else BaseModelOutputWithPooling()


def _layers_with_features(config: Any) -> list[int | None]:
    """For each layer that features are added to again (DeepStack): its index, or None if the decoder counts them."""
    unnamed = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or []
    named = [layer for _, layer in getattr(config, "deepstack_layer_map", None) or []]
    return [None] * len(unnamed) + named + [*(getattr(config, "spatial_target_layers", None) or [])]


def _image_token(config: Any) -> int:
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    known = [x for name in names if (x := getattr(config, name, None)) is not None]
    if not known:
        raise ValueError(
            f"the configuration of {config.model_type} names no image token ({', '.join(names)}), so that no prompt can"
            " be made up; with images (vlmrewrite apply, or --profile) none is needed"
        )
    return int(known[0])


def _special_ids(config: Any) -> set[int]:
    names = [name for name in config.to_dict() if name.endswith(("_token_id", "_token_index"))]
    values = [getattr(config, name, None) for name in names]
    return {v for value in values for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}


def captured_prompt(model: Any, shape: Shape) -> tuple[Program, dict[str, Any]]:
    """Capture a model's forward for a made-up prompt; the vision tower and the decoder are not run.

    Returns:
        the program, with its call known even if the model is on the meta device; and the prompt, whose features have
        the form that the model takes.

    Raises:
        ValueError: the model is not one that can be rewritten.
        CaptureError: its forward could not be captured.
    """
    refusals, details = dict[str, str](), []
    for as_list, form in ((True, "one tensor for each image"), (False, "one tensor")):
        inputs = prompt_inputs(model, shape, as_list=as_list)
        try:
            program = trace(model, inputs)
        except CaptureError as e:
            refusals.setdefault(str(e), form)
            details.append(e.details)
            continue
        call = Call(shape.vision(), None, [shape.image_tokens] * (shape.rows * shape.images))
        known = program.plan.refusals | {"encoder_features": _NOT_ENCODED}
        return replace(program.lacking(known), call=call), inputs
    reasons = " -- and ".join(f"with its image features as {form}: {cause}" for cause, form in refusals.items())
    raise CaptureError(f"no made-up prompt of {type(model).__name__} could be captured {reasons}", "\n\n".join(details))
