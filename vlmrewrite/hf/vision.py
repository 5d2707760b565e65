"""Everything that happens before the captured forward: encode the images, make position ids, tidy the arguments."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
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


def encode_images(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Replace pixels in a forward's arguments by the encoded images, as ``generate()`` does before it calls forward.

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


class EncoderFeatures:
    """What the projector took, kept from the last encoding of each thread, token by token.

    The projector is the child of the model's base that ``get_image_features`` runs last; its input counts only if it
    holds one vector for every vision token that comes out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._thread = threading.local()
        self._model = model

    @property
    def missing(self) -> str | None:
        """Why they are not known, or None."""
        reason: str | None = getattr(self._thread, "missing", "no image was encoded yet")
        return reason

    def wrap(self, encoder: Callable[..., Any]) -> Callable[..., Any]:
        """``get_image_features`` that also remembers."""

        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            with self._watching() as calls:
                out = encoder(*args, **kwargs)
            self._remember(calls, encoded_images(out))
            return out

        return get_image_features

    @contextlib.contextmanager
    def _watching(self) -> Iterator[list[tuple[str, Tensor]]]:
        calls: list[tuple[str, Tensor]] = []
        me = threading.get_ident()

        def watch(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor) and threading.get_ident() == me:
                    calls.append((name, args[0]))

            return hook

        base: nn.Module = self._model.base_model  # type: ignore[assignment]
        decoder = self._model.get_decoder()  # type: ignore[operator]
        towers = [(n, m) for n, m in base.named_children() if all(x is not decoder for x in m.modules())]
        handles = [m.register_forward_pre_hook(watch(n)) for n, m in towers]
        try:
            yield calls
        finally:
            for h in handles:
                h.remove()

    def _remember(self, calls: list[tuple[str, Tensor]], encoded: Encoded) -> None:
        self._thread.pairs = []
        if not calls:
            self._thread.missing = "the vision tower's output does not go through a projector of its own"
            return
        name, x = calls[-1]
        tokens, total = x.shape[:-1].numel(), sum(encoded.lengths)
        if x.dim() < 2 or tokens != total:
            self._thread.missing = f"{name} takes {tokens} vectors of shape {tuple(x.shape)} for {total} vision tokens"
            return
        self._thread.missing = None
        whole = encoded.features.reshape(total, -1).split(encoded.lengths)
        self._thread.pairs = list(zip(whole, x.reshape(total, -1).split(encoded.lengths), strict=True))

    def of(self, encoded: Encoded) -> Tensor | None:
        """The encoder features [F, C'] of these projected features, whatever order or repetition they come in."""
        flat = encoded.features.reshape(sum(encoded.lengths), -1).split(encoded.lengths)
        found = []
        for piece in flat:
            match = next((e for p, e in self._thread.pairs if _identical(p, piece)), None)
            if match is None:
                return None
            found.append(match)
        return torch.cat(found)


def _identical(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same bit by bit, NaN included."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
