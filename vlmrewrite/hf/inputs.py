"""A forward's arguments, by name and tidied, and which of them are refused."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vlmrewrite.compat import record_outputs
from vlmrewrite.hf.grid import Sizes
from vlmrewrite.hf.vision import Encoding, encode_images

_KEEP = "logits_to_keep"


@functools.lru_cache(maxsize=64)
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a class's forward takes."""
    return tuple(inspect.signature(forward).parameters)[1:]


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module's forward was given, by name."""
    return dict(zip(argument_names(type(module).forward), args, strict=False)) | kwargs


def tidy(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    remember: Callable[[Encoding], None] | None = None,
    encode: bool = True,
) -> tuple[dict[str, Any], Sizes]:
    """A forward's arguments by name, images encoded, and what they say about sizes.

    Args:
        model, args, kwargs: the model, and what its forward was given.
        remember: told of the run of the vision tower, if there is one; see :func:`vlmrewrite.hf.watched`.
        encode: False leaves images as they are.

    Raises:
        NotImplementedError: attentions are asked for, or ``torch.export`` is tracing the call.
        ValueError: there is no token.
    """
    if torch.compiler.is_exporting():
        raise NotImplementedError(
            f"torch.export.export() cannot look into this {type(model).__name__}, which a recipe is applied to: call"
            " vlmrewrite.export(model, inputs), which gives the prompt and a step behind it as exported programs"
        )
    kwargs = named(model, args, kwargs)
    if _KEEP in argument_names(type(model).forward):
        kwargs.setdefault(_KEEP, 0)
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(x := kwargs.get(name), Tensor) and 0 in x.shape[:2]:
            raise ValueError(f"{name} has the shape {tuple(x.shape)}; expected a row, and a token in each row")
    configs = model.config, text_config(model)
    attentions = kwargs.pop("output_attentions", None)
    if attentions or (attentions is None and any(getattr(c, "output_attentions", False) for c in configs)):
        raise NotImplementedError(
            f"output_attentions=True{' (in the config)' * (attentions is None)} is not available while a recipe is"
            " applied: its attention keeps no weights; restore the model first"
        )
    if (states := kwargs.pop("output_hidden_states", None)) is None:
        states = getattr(configs[-1], "output_hidden_states", None)
    sizes = Sizes.of(kwargs)
    kwargs = encode_images(model, kwargs, remember) if encode else kwargs
    if states:
        record_outputs(model)
        kwargs = kwargs | {"output_hidden_states": states}
    return kwargs, sizes


def keeping_all_tokens(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments, with an int ``logits_to_keep`` as the slice that it means.

    Given an int, some decoders leave tokens whose logits are not wanted out of their last layers: what a layer runs on
    is for a recipe to say.
    """
    keep = kwargs.get(_KEEP)
    return kwargs | {_KEEP: slice(-keep, None)} if isinstance(keep, int) else kwargs


def with_tokens(mask: Tensor) -> Tensor:
    """The mask of whole prompts, [B, T], if each of them has a token.

    Raises:
        ValueError: a row is nothing but padding.
    """
    if not mask.is_meta and not bool(mask.any(1).all()):
        empty = ", ".join(map(str, (~mask.bool().any(1)).nonzero()[:, 0].tolist()))
        raise ValueError(f"attention_mask has no token in row {empty} of {len(mask)}; expected a prompt in each row")
    return mask


def prompt_end(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, int]:
    """Where the sequence ends in a call of ``generate``: its last column, for each row, int64 [B], and how many it has.

    None and 0 without tokens. Columns count from the start of the sequence, what a cache holds of it included.

    On a kept cache, ``generate`` takes ids as wide as the mask, or without a mask, for the whole sequence, and narrower
    ones for what is new. Embeddings are always the whole sequence.
    """
    given = (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    tokens = next((x for x in given if isinstance(x, Tensor) and x.dim() > 1), None)
    past, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if tokens is None:
        return None, 0
    columns = tokens.shape[1]
    if tokens.dim() == 2 and isinstance(past, Cache) and isinstance(mask, Tensor) and mask.shape[1] != columns:
        columns += past.get_seq_length()
    return torch.full(tokens.shape[:1], columns - 1, device=tokens.device), columns


def prompt_end_in(end: Tensor, rows: int, columns: int, past: int) -> tuple[Tensor, Tensor]:
    """Where prompts end in a call on what a cache holds: the column in it, int64 [rows], and whether that is there.

    Args:
        end: column of each prompt's last token in the whole sequence, int64 [B].
        rows, columns: of the call; beams, or several sequences of a prompt, are below one another.
        past: how many columns the cache holds.

    Raises:
        ValueError: there are not as many rows, or several times as many, as prompts.
    """
    if rows % len(end):
        raise ValueError(f"ends of {len(end)} prompts were given for a call of {rows} rows")
    end = end.repeat_interleave(rows // len(end)) - past
    return end, (end >= 0) & (end < columns)


def without_full_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments, with None in place of a mask without padding.

    Not for calls without a cache: there, transformers takes a missing mask as leave to look for packed sequences.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_meta and bool(mask.all()):
        return kwargs | {"attention_mask": None}
    return kwargs


def refuse_packed(kwargs: dict[str, Any]) -> None:
    """Refuse packed sequences: transformers would mask each from the others, and a rewritten graph does not.

    The condition is that of :func:`transformers.masking_utils.find_packed_sequence_indices`, which counts without a
    cache and without a mask: positions of a row that do not go up by one. Multimodal rope positions ([3, B, T], and
    all but the first of [4, B, T]) are not looked at.

    Raises:
        ValueError: the call, which is one without a cache, has such positions.
    """
    at = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or not isinstance(at, Tensor) or at.is_meta:
        return
    at = at[0] if at.dim() == 3 and at.shape[0] == 4 else at
    if at.dim() != 2 or bool((at.diff(dim=-1) == 1).all()):
        return
    row, column = (at.diff(dim=-1) != 1).nonzero()[0].tolist()
    raise ValueError(
        f"position_ids go from {int(at[row, column])} to {int(at[row, column + 1])} at token {column + 1} of row {row},"
        " in a call with images, without a cache and without an attention_mask: transformers takes that for packed"
        " sequences, which are not rewritten; pass one sequence a row, or an attention_mask if these tokens are one"
        " sequence"
    )


def wants_cache(model: nn.Module, use_cache: bool | None) -> bool:
    """Whether a call keeps a cache: as asked, or as the text config says."""
    return bool(getattr(text_config(model), "use_cache", True) if use_cache is None else use_cache)


def text_config(model: nn.Module) -> Any:
    """The decoder's part of a model's config, which transformers finds too, in ten times the time."""
    config: Any = model.config
    inside = vars(config)
    found = [x for name in _PARTS if (x := inside.get(name)) is not None]
    return found[0] if len(found) == 1 else config.get_text_config()


_PARTS = ("text_encoder", "decoder", "generator", "text_config")
"""Where :meth:`transformers.PreTrainedConfig.get_text_config` looks."""
