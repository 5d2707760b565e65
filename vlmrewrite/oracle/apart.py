"""Modules that mix tokens otherwise than by attention alone, run eagerly on some tokens of each row apart.

``layers`` holds the tokens of each layer, bool [B, T]: those that a recurrence runs on, those that are keys.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.compat import set_attention_implementation


def row_by_row(mixer: Any, layers: Mapping[int, Tensor], hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """A recurrent module on its layer's tokens, a row at a time; rows of all tokens as the model runs it: [B, T, H]."""
    tokens = layers[mixer.layer_idx]
    run = functools.partial(type(mixer).forward, mixer, **kwargs)
    if bool(tokens.all()):
        return run(hidden_states)  # type: ignore[no-any-return]
    out = torch.where(tokens.all(1)[:, None, None], run(hidden_states), 0.0)
    for row, there in enumerate(tokens):
        if bool(there.any()) and not bool(there.all()):
            out[row, there] = run(hidden_states[row : row + 1, there], attention_mask=None)[0]
    return out


def rows_of_keys(
    mixer: Any, layers: Mapping[int, Tensor], hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """A module with an index over its keys on the keys of its layer, a row at a time and without padding: [B, T, H].

    A token that is no key goes through behind the keys before it, its own key hidden from it, at the place of the last.
    """
    keys, out = layers[mixer.layer_idx], torch.zeros_like(hidden_states)
    seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    seen = seen.expand(len(keys), -1, -1, -1)
    real = seen[:, 0].diagonal(dim1=1, dim2=2)
    before = [(m, m.config) for m in mixer.modules() if "config" in vars(m)]
    for module, config in before:
        module.config = copy.copy(config)
        set_attention_implementation(module.config, "sdpa")

    def run(row: int, at: Tensor, alone: bool) -> Tensor:
        """What comes out of some tokens of a row, [n, H]; ``alone``: the last is no key."""

        def of_tokens(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(of_tokens, x))
            followed = isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] == keys.shape[1]
            return x.expand(len(keys), -1, -1)[row : row + 1, at] if followed else x

        mask, places = seen[row : row + 1, :, at][..., at].clone(), torch.arange(len(at), device=at.device)[None]
        if alone:
            mask[..., -1, -1], places[0, -1] = False, len(at) - 2
        given = {name: of_tokens(x) for name, x in kwargs.items()} | {"position_ids": places, "attention_mask": mask}
        made: Tensor = type(mixer).forward(mixer, hidden_states[row : row + 1, at], **given)[0][0]
        return made

    for row in range(len(keys)):
        held = (keys[row] & real[row]).nonzero()[:, 0]
        if len(held):
            out[row, held] = run(row, held, False)
        for t in (real[row] & ~keys[row]).nonzero()[:, 0]:
            earlier = held[held < t]
            if len(earlier):
                out[row, t] = run(row, torch.cat([earlier, t[None]]), True)[-1]
    for module, config in before:
        module.config = config
    return out, None
