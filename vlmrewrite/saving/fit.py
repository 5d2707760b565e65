"""Whether what was saved belongs to a model, and putting it there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlmrewrite.compat import Apart
from vlmrewrite.plan import ATTRIBUTE, blocks_of
from vlmrewrite.runtime import session_of
from vlmrewrite.saving.folder import Identity, Stored


def identity(model: Any) -> Identity:
    """What must agree for blocks to fit a model."""
    text = model.config.get_text_config(decoder=True)
    return Identity(
        model_type=model.config.model_type,
        hidden_size=getattr(text, "hidden_size", None),
        num_hidden_layers=text.num_hidden_layers,
    )


def stored_of(model: nn.Module, state: dict[str, Tensor] | None = None) -> Stored:
    """What is to be saved of a rewritten model.

    Args:
        model: the model.
        state: a state dict of it that is to be taken in place of its own parameters, where it has them.

    Raises:
        ValueError: no recipe is applied.
    """
    recipe, blocks = session_of(model).recipe, blocks_of(model)
    own = {} if blocks is None else blocks.state_dict()
    given = state or {}
    tensors = {n: given.get(f"{ATTRIBUTE}.{n}", t).detach().cpu().contiguous() for n, t in own.items()}
    base = getattr(model, "name_or_path", "")
    known = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None
    return Stored(recipe, identity(model), tensors, "", known)


def refuse_other(model: nn.Module, stored: Stored) -> None:
    """Refuse what belongs to a model of another kind or other sizes.

    Raises:
        ValueError: it does; the message says in what it differs.
    """
    for key, value in identity(model):
        if getattr(stored.model, key) != value:
            raise ValueError(
                f"{stored.where}: these blocks belong to a model with {key} {getattr(stored.model, key)!r}, this"
                f" {type(model).__name__} has {value!r}"
            )


def put_blocks(model: nn.Module, stored: Stored) -> None:
    """Put what was saved into the blocks of a model that the recipe is applied to.

    Raises:
        ValueError: names, shapes or dtypes are not those of the blocks; nothing is changed.
    """
    blocks = blocks_of(model)
    own = {} if blocks is None else blocks.state_dict()
    for what in ("shape", "dtype"):
        expected = {name: _said(t, what) for name, t in own.items()}
        found = {name: _said(t, what) for name, t in stored.tensors.items()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"{stored.where}: {name} has {what} {found.get(name, 'none')}; this model's blocks expect"
                f" {expected.get(name, 'no such tensor')}"
                + (" (load the model in the dtype of the blocks, and move both afterwards)" if what == "dtype" else "")
            )
    if blocks is not None:
        blocks.load_state_dict(stored.tensors)
        _remember(model)


def _remember(model: nn.Module) -> None:
    """That the blocks are now as in a file."""
    held = getattr(model, ATTRIBUTE)
    if isinstance(held, Apart):
        held.remember()


def _said(t: Tensor, what: str) -> str:
    return str(tuple(t.shape)) if what == "shape" else str(t.dtype).removeprefix("torch.")
