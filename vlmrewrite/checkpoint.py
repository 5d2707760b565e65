"""A recipe and its trained blocks, saved, loaded and shared."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForImageTextToText

from vlmrewrite.api import applied_recipe, apply_stored
from vlmrewrite.hf import on_base_model
from vlmrewrite.ops import Backend, Kernels
from vlmrewrite.runtime import SESSIONS
from vlmrewrite.saving import BLOCKS, FILE, push, put_blocks, read, refuse_other, stored_of, write

WEIGHTS, RECIPE = BLOCKS, FILE


@on_base_model
def save_blocks(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save the recipe and the trained blocks of a rewritten model, and nothing else of it.

    Args:
        model: a model that a recipe with trained blocks is applied to.
        folder: made if it is not there; gets ``vlmrewrite.json`` and ``vlmrewrite_blocks.safetensors``.

    Raises:
        ValueError: no recipe is applied, it has no trained blocks, or a pass of it is not registered.
    """
    stored = stored_of(model)
    if not stored.tensors:
        raise ValueError(f"recipe {stored.recipe.name!r} has no trained blocks: there is nothing to save")
    stored.recipe.to_data()  # raises before a folder is made
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write(path, stored)


@on_base_model
def load_blocks(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load what :func:`save_blocks` or ``save_pretrained`` saved; if no recipe is applied, the saved one is first.

    Args:
        model: a model of the kind that the blocks were trained on, in their dtype.
        folder: as for :func:`save_blocks`; what version 0.1 wrote (``blocks.safetensors`` and ``recipe.yaml``) can be
            read too.

    Returns:
        the same model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds numbers that are not finite, or the model or the recipe applied to it is
            not the one that the blocks belong to; nothing is changed.
    """
    stored = read(folder)
    if model not in SESSIONS:
        return apply_stored(model, stored)
    refuse_other(model, stored)
    current, saved = applied_recipe(model), stored.recipe
    if [_with_blocks(p) for p in current.passes] != [_with_blocks(p) for p in saved.passes]:
        raise ValueError(
            f"these blocks belong to the passes {list(saved.passes)}; recipe {current.name!r}, which is applied, has"
            f" {list(current.passes)}"
        )
    put_blocks(model, stored)
    return model


def _with_blocks(item: Any) -> str:
    """A pass as text, in which 1 and 1.0 are not the same.

    Without fields whose metadata say ``{"blocks": False}``: blocks may be loaded whatever they are.
    """
    if not is_dataclass(item):
        return repr(item)
    kept = (f for f in fields(item) if f.repr and f.metadata.get("blocks", True))
    return f"{type(item).__qualname__}({', '.join(f'{f.name}={getattr(item, f.name)!r}' for f in kept)})"


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    model_class: Any = None,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    strict: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a model that ``save_pretrained`` has saved while a recipe was applied, and apply the recipe again.

    Args:
        path: a folder, or a repository of the Hub, with ``vlmrewrite.json``. If it holds no model, but a recipe alone
            (:func:`vlmrewrite.push_to_hub`), the model is the one of the Hub that the recipe was applied to.
        model_class: what loads the model, ``AutoModelForImageTextToText`` if it is not said.
        backend, kernels, strict: as for :func:`vlmrewrite.apply`.
        kwargs: as for ``from_pretrained`` of transformers.

    Returns:
        the model, in eval mode, with the recipe applied and its blocks as they were saved.

    Raises:
        FileNotFoundError: no recipe was saved there: transformers' ``from_pretrained`` loads what is.
        ValueError: a file is damaged, or recipe and model do not fit; also where the dtype that was asked for is not
            that of the blocks.
        OSError: what transformers raises where it finds no model.
    """
    stored, source, options = read(path, **kwargs), path, dict(kwargs)
    if not stored.weights:
        if stored.base_model is None:
            raise FileNotFoundError(
                f"{os.fspath(path)!r} holds a recipe and no model, nor the name of one: load the model with"
                " transformers' from_pretrained, and call vlmrewrite.apply(model, folder)"
            )
        source = stored.base_model
        for key in ("revision", "subfolder"):
            options.pop(key, None)
    model: Any = (model_class or AutoModelForImageTextToText).from_pretrained(source, **options)
    told = isinstance(model, tuple)  # output_loading_info
    apply_stored(model[0] if told else model, stored, backend=backend, kernels=kernels, strict=strict)
    return model


@on_base_model
def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the recipe of a rewritten model, its blocks and a model card to the Hub, and nothing else of the model.

    ``vr.apply(model, repo_id)`` puts them on a model; ``vr.from_pretrained(repo_id)`` loads the model of the Hub that
    the recipe was applied to as well. ``model.push_to_hub(repo_id)``, as transformers has it, uploads the model's
    weights, the recipe and its blocks.

    Args:
        model: a model that a recipe is applied to, with trained blocks or without.
        repo_id: ``"owner/name"``; made if it is not there. A model card that is there is replaced.
        private, token: as for ``huggingface_hub.HfApi.create_repo``.
        revision, commit_message, create_pr: as for ``huggingface_hub.HfApi.upload_folder``.

    Returns:
        the address of the commit.

    Raises:
        ValueError: no recipe is applied, or a pass of it is not registered; nothing is uploaded.
        OSError: what ``huggingface_hub`` raises if the Hub refuses, or cannot be reached.
    """
    return push(
        stored_of(model),
        repo_id,
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
