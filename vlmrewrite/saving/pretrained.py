"""``save_pretrained`` and ``load_state_dict`` of a rewritten model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlmrewrite.compat import Apart
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.saving.fit import stored_of
from vlmrewrite.saving.folder import write
from vlmrewrite.saving.twin import sharing


def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Save the model without its recipe, as its class does, and the recipe and its blocks beside it."""
    save: Callable[..., Any] = type(self).save_pretrained  # type: ignore[attr-defined]
    given = inspect.signature(save).bind(self, *args, **kwargs)
    given.apply_defaults()
    options = given.arguments
    if options.get("push_to_hub"):
        raise ValueError(
            "save_pretrained(push_to_hub=True) would upload the model before its recipe is written: call"
            " model.push_to_hub(repo_id), which uploads both, or vlmrewrite.push_to_hub(model, repo_id) for the recipe"
            " and its blocks alone"
        )
    state: dict[str, Tensor] | None = options.get("state_dict")
    stored = stored_of(self, state)
    stored.recipe.to_data()  # raises before anything is written
    if state is not None:
        options["state_dict"] = {n: t for n, t in state.items() if not n.startswith(f"{ATTRIBUTE}.")}
    options[next(iter(options))] = sharing(self)
    out = save(*given.args, **given.kwargs)
    folder = Path(options["save_directory"])
    if options.get("is_main_process", True) and folder.is_dir():
        write(folder, stored)
    return out


def load_state_dict(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    """As the class does; says so if blocks that are in no file stay as they are."""
    out = type(self).load_state_dict(self, state_dict, *args, **kwargs)
    held = getattr(self, ATTRIBUTE, None)
    lacking = not any(name.startswith(f"{ATTRIBUTE}.") for name in state_dict)
    if lacking and isinstance(held, Apart) and not held.as_remembered:
        warnings.warn(
            f"the state dict has none of the blocks of this {type(self).__name__}, which stay as they are:"
            " save_pretrained and transformers' Trainer write them beside the model's weights;"
            " vlmrewrite.load_blocks(model, folder) loads them from there",
            stacklevel=3,
        )
    return out
