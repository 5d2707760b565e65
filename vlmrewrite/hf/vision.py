"""Everything that happens before the captured forward: encode the images, make position ids."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.hf.exchanged import parameters_of
from vlmrewrite.hf.lent import copied, device_of, lends, weights_brought


class EncoderOutput:
    """What a vision tower gave, as the decoder reads it: the fields of transformers' own output, by attribute or name.

    Not a ``ModelOutput``, which looks at its fields as it is made: a captured forward depends on those that it reads.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.__dict__.update(fields)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@dataclass
class Encoded:
    """Images, or videos, as the decoder takes them.

    Attributes:
        output: what the decoder reads. What is of several images, listed or along an axis, is as of one.
        candidates: by name, tensors of it that may be the features, [F, C] or [1, F, C], the likeliest first.
        lengths: for each of them, the tokens of each image.
    """

    output: EncoderOutput
    candidates: dict[str, Tensor]
    lengths: dict[str, list[int]]

    @property
    def features(self) -> Tensor:
        """The likeliest candidate."""
        return next(iter(self.candidates.values()))


_PIXELS = {
    "image": ("pixel_values", "pixel_values_images", "image_patches"),
    "video": ("pixel_values_videos",),
}

MODALITIES = tuple(_PIXELS)
"""What a vision tower encodes, as ``mm_encoder_outputs`` names it."""


def images_of(arguments: Mapping[str, Any]) -> list[str]:
    """The names under which images or videos are given, to a forward or to ``generate``, encoded or not."""
    names = [name for each in _PIXELS.values() for name in each]
    return [name for name in (*names, "mm_encoder_outputs", "image_embeds") if arguments.get(name) is not None]


def encode_images(
    model: nn.Module, kwargs: dict[str, Any], remember: Callable[[Encoding], None] | None = None
) -> dict[str, Any]:
    """Replace pixels in a forward's arguments by encoded images and videos, as ``generate()`` does before its forward.

    Args:
        model: the model.
        kwargs: its forward's arguments.
        remember: told of each run of the vision tower; see :func:`watched`.

    Raises:
        ValueError: pixels and encoded images were both given, or pixels of videos to a model that takes none.
    """
    given = {m: [n for n in names if kwargs.get(n) is not None] for m, names in _PIXELS.items()}
    before = dict(kwargs.get("mm_encoder_outputs") or {})
    outputs, taken = dict(before), set[str]()
    for modality, names in given.items():
        if not names:
            continue
        if before.get(modality) is not None:
            raise ValueError(f"both {names[0]} and mm_encoder_outputs were given; expected one of them")
        encoder = _encoder(model, modality, names)
        if encoder is None:
            raise ValueError(
                f"{names[0]} was given, and {type(model).__name__} has no get_{modality}_features: it encodes no"
                f" {modality}s apart from its decoder; expected none"
            )
        arguments = _arguments(encoder, names[0], kwargs)
        encoder = encoder if remember is None else watched(model, encoder, remember)
        with weights_brought(model.base_model):  # type: ignore[arg-type]
            made = encoder(**arguments, return_dict=True)
        outputs[modality] = copied(made, device_of(model)) if lends(model) else made
        taken |= arguments.keys() | {names[0]}
    if not taken:
        return kwargs
    outputs |= {k: kwargs[k] for k in taken if k.endswith("_grid_thw")}  # who keeps what was encoded keeps its sizes
    position_ids = _position_ids(model, kwargs)
    rest = {k: v for k, v in kwargs.items() if k not in taken} | {"mm_encoder_outputs": outputs}
    return rest if position_ids is None else rest | {"position_ids": position_ids}


def _encoder(model: nn.Module, modality: str, names: Sequence[str]) -> Callable[..., Any] | None:
    """What encodes pixels given under some names; the one for images encodes whatever the forward takes besides."""
    own: Callable[..., Any] | None = getattr(model.base_model, f"get_{modality}_features", None)
    if own is None and names[0] in parameters_of(model.forward):
        return getattr(model.base_model, "get_image_features", None)
    return own


def _arguments(encoder: Callable[..., Any], pixels: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an encoder takes of a forward's arguments; None for what it must be given and the forward was not."""
    parameters = {n: p for n, p in parameters_of(encoder).items() if p.kind != p.VAR_KEYWORD}
    taken = {n: kwargs.get(n) for n, p in parameters.items() if kwargs.get(n) is not None or p.default is p.empty}
    if pixels not in parameters:  # the forward calls it otherwise
        taken[next(iter(parameters))] = kwargs[pixels]
    return taken


def _position_ids(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """Multimodal rope positions, for models that compute them from the image grid inside their forward."""
    compute = getattr(model.base_model, "compute_3d_position_ids", None)
    if compute is None or kwargs.get("position_ids") is not None:
        return None
    names = parameters_of(compute)
    given: dict[str, Any] = {n: kwargs.get(n) for n in names}
    if given.get("inputs_embeds") is None and kwargs.get("input_ids") is not None and "inputs_embeds" in names:
        given["inputs_embeds"] = model.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
    return compute(**given)  # type: ignore[no-any-return]


def lengths_of(features: Tensor) -> list[int]:
    """Tokens of each image in one tensor of features, [I, N, C] or [F, C]."""
    return [features.shape[1]] * len(features) if features.dim() == 3 else [len(features)]


_OF_THE_TOWER = ("hidden_states", "attentions", "router_logits")


def encoded_images(output: Any) -> Encoded:
    """Read the projected features out of what ``get_image_features`` or ``get_video_features`` returned.

    Raises:
        ValueError: no tensor of it has a known form.
    """
    fields = {name: x for name, x in vars(output).items() if x is None or name not in _OF_THE_TOWER}
    likely = dict.fromkeys(n for n in ("pooler_output", "last_hidden_state", *fields) if n in fields)
    candidates: dict[str, Tensor] = {}
    lengths: dict[str, list[int]] = {}

    def handed(name: str, x: Any) -> Any:
        """A field, or a part of one, as the decoder gets it."""
        if isinstance(x, Tensor) and x.dim() in (2, 3):
            lengths[name] = lengths_of(x)
            x = candidates[name] = x if x.dim() == 2 else x.flatten(0, 1)[None]  # one graph for any number of images
            return x
        if not isinstance(x, (list, tuple)) or not x:
            return x
        if all(isinstance(y, Tensor) and y.dim() > 1 for y in x):
            sizes = [y.shape[:-1].numel() for y in x]
            if sizes == next(iter(lengths.values()), sizes):  # of each image, and not of each layer
                candidates[name], lengths[name] = torch.cat([y.reshape(-1, y.shape[-1]) for y in x]), sizes
                return [candidates[name]]
        return [handed(f"{name}[{i}]", y) for i, y in enumerate(x)]

    read = {name: handed(name, fields[name]) for name in likely}
    if not candidates:
        pooled = fields.get("pooler_output")
        kind = type(pooled).__name__ if not isinstance(pooled, Tensor) else f"a tensor of shape {tuple(pooled.shape)}"
        raise ValueError(f"pooler_output of the vision tower is {kind}; expected [I, N, C] or one [N, C] per image")
    return Encoded(EncoderOutput(read), candidates, lengths)


@dataclass
class Encoding:
    """One run of ``get_image_features``: what came out of the projector for each image, and what went into it.

    Attributes:
        pairs: [n, C] and [n, C'] of each image.
        missing: why there are none, or None.
    """

    pairs: list[tuple[Tensor, Tensor]]
    missing: str | None = None


def parts_around(model: Any, decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a model's base that do not hold its decoder, by name: towers and projectors."""
    for name, child in model.base_model.named_children():
        if all(module is not decoder for module in child.modules()):
            yield name, child


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
    def get_features(*args: Any, **kwargs: Any) -> Any:
        calls: list[tuple[str, Tensor]] = []
        me = threading.get_ident()

        def watch(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and threading.get_ident() == me:
                calls.append((name, args[0]))

        with contextlib.ExitStack() as stack:
            for name, child in parts_around(this, this.get_decoder()):
                stack.callback(child.register_forward_pre_hook(functools.partial(watch, name)).remove)
            out = encoder(*args, **kwargs)
        made = encoded_images(out)
        remember(encoding_of(calls, made.features, next(iter(made.lengths.values()))))
        return out

    return get_features


def encoding_of(calls: list[tuple[str, Tensor]], features: Tensor, lengths: list[int]) -> Encoding:
    """What one run of a vision tower made.

    Args:
        calls: names of its parts, in the order in which they ran, and what each of them took.
        features, lengths: [F, C] or [I, N, C], and the tokens of each image.
    """
    if not calls:
        return Encoding([], "the vision tower's output does not go through a projector of its own")
    name, x = calls[-1]
    tokens, total = x.shape[:-1].numel(), sum(lengths)
    if x.dim() < 2 or tokens != total:
        return Encoding([], f"{name} takes {tokens} vectors of shape {tuple(x.shape)} for {total} vision tokens")
    whole, taken = (y.reshape(total, -1).split(lengths) for y in (features, x))
    return Encoding(list(zip(whole, taken, strict=True)))


def encoder_features(encodings: Sequence[Encoding], features: Tensor, lengths: Sequence[int]) -> Tensor | str:
    """The encoder features [F, C'] of these projected features, whatever order or repetition they come in.

    Args:
        encodings: runs of the vision tower that they may come from.
        features, lengths: [F, C] or [I, N, C], and the tokens of each image.

    Returns:
        the features, or why they are not known.

    Raises:
        ValueError: the images were encoded elsewhere.
    """
    if not encodings:
        return "the images were given encoded, and what went into the projector is not known: give their pixels"
    pairs = [pair for encoding in encodings for pair in encoding.pairs]
    found = []
    for piece in features.reshape(sum(lengths), -1).split(list(lengths)):
        match = next((taken for projected, taken in pairs if identical(projected, piece)), None)
        if match is None:
            for reason in (encoding.missing for encoding in encodings if encoding.missing):
                return reason
            raise ValueError(
                "these images were not encoded by this model's get_image_features, in this generation or last, so that"
                " the encoder's features are not known; pass the pixels, or use features='projected'"
            )
        found.append(match)
    return torch.cat(found)


def identical(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same bit by bit, NaN included; on the meta device, where there are no bits: alike."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if x.is_meta:
        return True
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
