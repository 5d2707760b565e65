"""Decoders that are called by themselves: which models have one, and where the features are in what enters it."""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin

from vlmrewrite.hf.vision import (
    MODALITIES,
    Encoded,
    EncoderOutput,
    Encoding,
    encoding_of,
    identical,
    lengths_of,
    parts_around,
)

_FEATURES = "image_embeds"
"""What a decoder that merges the features itself calls them."""


def language_model(model: Any) -> Any:
    """The part of a model that it leaves generating, or merging, to: a language model with a head; else None.

    The forward of such a model takes no encoded images, or its ``generate()`` never calls it.
    """
    decoder = model.get_decoder()
    parts = [m for m in model.modules() if m is not model and issubclass(type(m), GenerationMixin)]
    part = next((m for m in parts if any(x is decoder for x in m.modules())), None)
    if part is None or _takes_features(part):
        return part
    encodes = any(hasattr(model.base_model, f"get_{modality}_features") for modality in MODALITIES)
    return part if encodes and type(model).generate is not GenerationMixin.generate else None


def _takes_features(part: nn.Module) -> bool:
    """Whether a part's own forward takes image features, and a mask that says where they stand."""
    names = inspect.signature(type(part).forward).parameters
    return {_FEATURES, f"{_FEATURES}_position_mask"} <= names.keys()


def decoder_of(model: Any) -> Any:
    """What is captured of a model where it is not the whole: its language model, else its decoder."""
    return language_model(model) or model.get_decoder()


class Projection:
    """A run of a part of a model that is not the decoder: what came out, [I, N, C] or [F, C], and what went in."""

    def __init__(self, name: str, taken: Tensor, given: Tensor) -> None:
        self.name, self.taken, self.given = name, taken, given


@contextlib.contextmanager
def projections(model: Any) -> Iterator[list[Projection]]:
    """What the parts around the decoder make while the block runs in this thread, in order."""
    runs: list[Projection] = []
    me = threading.get_ident()

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            given = isinstance(out, Tensor) and out.dim() in (2, 3) and args and isinstance(args[0], Tensor)
            if given and threading.get_ident() == me:
                runs.append(Projection(name, args[0], out))

        return hook

    with contextlib.ExitStack() as stack:
        for name, child in parts_around(model, decoder_of(model)):
            stack.callback(child.register_forward_hook(note(name)).remove)
        yield runs


def run_around(model: Any, decoder: nn.Module, kwargs: dict[str, Any]) -> None:
    """Run a model's forward for the sake of what enters its decoder.

    On the meta device, where the rest of the model cannot ask for a value, the decoder is run by itself, on embeddings
    without features.
    """
    if model.device.type != "meta":
        type(model).forward(model, return_dict=True, **kwargs)
        return
    names = inspect.signature(type(decoder).forward).parameters
    shared = {name: x for name, x in kwargs.items() if name in names and name != "input_ids"}
    embeddings = model.get_input_embeddings()(kwargs["input_ids"])
    decoder(**shared | {"inputs_embeds": embeddings})


def merged_inside(kwargs: dict[str, Any]) -> Encoded | None:
    """The features among the arguments of a decoder that merges them itself."""
    features = kwargs.get(_FEATURES)
    if features is None:
        return None
    return Encoded(EncoderOutput({"mask": None}), {_FEATURES: features}, {_FEATURES: lengths_of(features)})


def projected(runs: Sequence[Projection], embeddings: Tensor) -> tuple[Encoded, Encoding] | None:
    """Which of some runs made features that stand in the embeddings [B, T, H]: the latest, and what went into it."""
    for run in reversed(runs):
        lengths = lengths_of(run.given)
        found = merged_outside(Encoded(EncoderOutput({}), {run.name: run.given}, {run.name: lengths}), embeddings)
        if found is not None:
            return found, encoding_of([(run.name, run.taken)], run.given, lengths)
    return None


def merged_outside(encoded: Encoded, embeddings: Tensor) -> Encoded | None:
    """The encoded images as they stand in the embeddings that enter a decoder, bit by bit.

    Args:
        encoded: images, or videos.
        embeddings: [B, T, H]; of several beams or answers to a prompt, copies of its row stand below one another.

    Returns:
        features [F, H] with the mask, bool [B, T], of where they stand; None if they do not stand there.
    """
    for name, features in encoded.candidates.items():
        lengths = encoded.lengths[name]
        if features.shape[-1] != embeddings.shape[-1]:
            continue
        flat = features.reshape(-1, features.shape[-1]).to(embeddings)
        if flat.is_meta:
            return _standing(embeddings.new_zeros(embeddings.shape[:2], dtype=torch.bool), flat, lengths)
        mask = torch.isin(_fingerprints(embeddings), _fingerprints(flat))
        copies = max(1, int(mask.sum()) // max(1, len(flat)))
        one = slice(None, None, copies)
        if len(embeddings) % copies or not identical(embeddings[one][mask[one]], flat):
            continue
        rows = _by_row(lengths, mask[one].sum(1).tolist())
        if rows is not None:
            return _standing(mask, embeddings[mask], [n for row in rows for _ in range(copies) for n in row])
    return None


def marked(kwargs: dict[str, Any], past: Cache | None) -> dict[str, Encoded]:
    """Images and videos, by modality, that stand in a forward's ``inputs_embeds`` where ``mm_token_type_ids`` say so.

    These are 1 for tokens of images and 2 for those of videos, [B, T], as processors give them. Tokens that follow one
    another are taken for one image. A prompt of embeddings alone, on a cache that holds nothing, is warned of.
    """
    embeddings, types, found = kwargs.get("inputs_embeds"), kwargs.get("mm_token_type_ids"), dict[str, Encoded]()
    if embeddings is not None and types is None and (past is None or past.get_seq_length() == 0):
        warnings.warn(
            "inputs_embeds were given without images, and nothing of them is pruned: where they hold images, pass"
            " mm_token_type_ids too (1 for tokens of images, 2 for those of videos, 0 for text)",
            stacklevel=2,
        )
    if not isinstance(embeddings, Tensor) or not isinstance(types, Tensor) or types.shape != embeddings.shape[:2]:
        return found
    for kind, modality in enumerate(MODALITIES, 1):
        mask = (types == kind).to(embeddings.device)
        lengths = [len(run) for row in mask.tolist() for here, group in groupby(row) if here and (run := [*group])]
        if lengths:
            found[modality] = Encoded(EncoderOutput({}), {"marked": embeddings[mask]}, {"marked": lengths})
    return found


def _standing(mask: Tensor, features: Tensor, lengths: list[int]) -> Encoded:
    return Encoded(EncoderOutput({"mask": mask, "merged": features}), {"merged": features}, {"merged": lengths})


def _fingerprints(x: Tensor) -> Tensor:
    """A number for the bits of each vector [..., H]; int64 [...]."""
    bits = x.detach().contiguous().view(torch.int16).long()
    odd = torch.arange(1, 2 * bits.shape[-1], 2, device=x.device) * 0x5851F42D4C957F2D
    return (bits * odd).sum(-1)


def _by_row(lengths: list[int], rows: list[int]) -> list[list[int]] | None:
    """The lengths of the images of each row, if none of them goes on in the next."""
    left, found = list(lengths), []
    for total in rows:
        row: list[int] = []
        while left and sum(row) < total:
            row.append(left.pop(0))
        if sum(row) != total:
            return None
        found.append(row)
    return found
