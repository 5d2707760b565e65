"""Everything that happens before the captured forward: encode the images, make position ids."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass
class Encoded:
    """Images as the decoder takes them.

    Attributes:
        features: [F, C] (``as_list``), or [I, N, C] as one tensor.
        lengths: tokens of each image.
    """

    features: Tensor
    as_list: bool
    lengths: list[int]


_PIXELS = ("pixel_values", "pixel_values_images", "image_patches")


def encode_images(
    model: nn.Module, kwargs: dict[str, Any], remember: Callable[[Encoding], None] | None = None
) -> dict[str, Any]:
    """Replace pixels in a forward's arguments by the encoded images, as ``generate()`` does before it calls forward.

    Args:
        model: the model.
        kwargs: its forward's arguments.
        remember: told of the run of the vision tower, if there is one; see :func:`watched`.

    Raises:
        NotImplementedError: the call has video inputs.
        ValueError: pixels and encoded images were both given.
    """
    if kwargs.get("pixel_values_videos") is not None or (kwargs.get("mm_encoder_outputs") or {}).get("video"):
        raise NotImplementedError("video inputs are not rewritten; restore the model to run them")
    given = [name for name in _PIXELS if kwargs.get(name) is not None]
    if not given:
        return kwargs
    if (kwargs.get("mm_encoder_outputs") or {}).get("image") is not None:
        raise ValueError(f"both {given[0]} and mm_encoder_outputs were given; expected one of them")
    encoder: Any = cast(nn.Module, model.base_model).get_image_features
    names = [n for n in inspect.signature(encoder).parameters if n != "kwargs"]
    taken = {n: kwargs[n] for n in names if kwargs.get(n) is not None}
    encoder = encoder if remember is None else watched(model, encoder, remember)
    position_ids = _position_ids(model, kwargs)
    rest = {k: v for k, v in kwargs.items() if k not in taken}
    if position_ids is not None:
        rest["position_ids"] = position_ids
    encoded = {"image": encoder(**taken, return_dict=True), "image_grid_thw": taken.get("image_grid_thw")}
    return rest | {"mm_encoder_outputs": encoded}


def _position_ids(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """Multimodal rope positions, for models that compute them from the image grid inside their forward."""
    compute = getattr(model.base_model, "compute_3d_position_ids", None)
    if compute is None or kwargs.get("position_ids") is not None:
        return None
    names = inspect.signature(compute).parameters
    given: dict[str, Any] = {n: kwargs.get(n) for n in names}
    if given.get("inputs_embeds") is None and kwargs.get("input_ids") is not None and "inputs_embeds" in names:
        given["inputs_embeds"] = model.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
    return compute(**given)  # type: ignore[no-any-return]


def encoded_images(output: Any) -> Encoded:
    """Read the projected features out of what ``get_image_features`` returned.

    Raises:
        ValueError: there is no ``pooler_output`` of a known form.
    """
    pooled = getattr(output, "pooler_output", None)
    if isinstance(pooled, Tensor) and pooled.dim() == 3:
        return Encoded(pooled, False, [pooled.shape[1]] * pooled.shape[0])
    if isinstance(pooled, Tensor) and pooled.dim() == 2:
        return Encoded(pooled, False, [pooled.shape[0]])
    if isinstance(pooled, (list, tuple)) and pooled and all(isinstance(x, Tensor) for x in pooled):
        flat = [x.reshape(-1, x.shape[-1]) for x in pooled]
        return Encoded(torch.cat(flat), True, [len(x) for x in flat])
    kind = type(pooled).__name__ if not isinstance(pooled, Tensor) else f"a tensor of shape {tuple(pooled.shape)}"
    raise ValueError(f"pooler_output of the vision tower is {kind}; expected [I, N, C] or one [N, C] per image")


@dataclass
class Encoding:
    """One run of ``get_image_features``: what came out of the projector for each image, and what went into it.

    Attributes:
        pairs: [n, C] and [n, C'] of each image.
        missing: why there are none, or None.
    """

    pairs: list[tuple[Tensor, Tensor]]
    missing: str | None = None


def watched(model: nn.Module, encoder: Callable[..., Any], remember: Callable[[Encoding], None]) -> Callable[..., Any]:
    """A model's ``get_image_features`` that also tells what the projector took, token by token.

    The projector is the child of the model's base that it runs last; the child's input counts only if it holds one
    vector for every vision token that comes out. What other threads run meanwhile is not looked at.

    Args:
        model: held weakly.
        encoder: its ``get_image_features``.
        remember: told of each run.
    """
    this: Any = weakref.proxy(model)

    @functools.wraps(encoder)
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        calls: list[tuple[str, Tensor]] = []
        me = threading.get_ident()

        def watch(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and threading.get_ident() == me:
                calls.append((name, args[0]))

        decoder = this.get_decoder()
        with contextlib.ExitStack() as stack:
            for name, child in this.base_model.named_children():
                if all(module is not decoder for module in child.modules()):
                    hook = child.register_forward_pre_hook(functools.partial(watch, name))
                    stack.callback(hook.remove)
            out = encoder(*args, **kwargs)
        remember(_encoding(calls, encoded_images(out)))
        return out

    return get_image_features


def _encoding(calls: list[tuple[str, Tensor]], encoded: Encoded) -> Encoding:
    if not calls:
        return Encoding([], "the vision tower's output does not go through a projector of its own")
    name, x = calls[-1]
    tokens, total = x.shape[:-1].numel(), sum(encoded.lengths)
    if x.dim() < 2 or tokens != total:
        return Encoding([], f"{name} takes {tokens} vectors of shape {tuple(x.shape)} for {total} vision tokens")
    whole, taken = (y.reshape(total, -1).split(encoded.lengths) for y in (encoded.features, x))
    return Encoding(list(zip(whole, taken, strict=True)))


def encoder_features(encodings: Sequence[Encoding], encoded: Encoded) -> Tensor | str:
    """The encoder features [F, C'] of these projected features, whatever order or repetition they come in.

    Returns:
        the features, or why they are not known.

    Raises:
        ValueError: the images were encoded elsewhere.
    """
    if not encodings:
        return "the images were given encoded, and what went into the projector is not known: give their pixels"
    pairs = [pair for encoding in encodings for pair in encoding.pairs]
    found = []
    for piece in encoded.features.reshape(sum(encoded.lengths), -1).split(encoded.lengths):
        match = next((taken for projected, taken in pairs if _identical(projected, piece)), None)
        if match is None:
            for reason in (encoding.missing for encoding in encodings if encoding.missing):
                return reason
            raise ValueError(
                "these images were not encoded by this model's get_image_features, in this generation or last, so that"
                " the encoder's features are not known; pass the pixels, or use features='projected'"
            )
        found.append(match)
    return torch.cat(found)


def _identical(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same bit by bit, NaN included; on the meta device, where there are no bits: alike."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if x.is_meta:
        return True
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
