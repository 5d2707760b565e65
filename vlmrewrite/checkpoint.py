"""Trained blocks on disk: their parameters as safetensors, beside the recipe that they belong to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vlmrewrite.api import applied_recipe, apply, restore
from vlmrewrite.hf import on_base_model
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.recipe import Recipe

WEIGHTS, RECIPE = "blocks.safetensors", "recipe.yaml"


@on_base_model
def save_blocks(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save the trained blocks of a rewritten model, and nothing else of it.

    Args:
        model: a model that a recipe with trained blocks is applied to.
        folder: made if it is not there; gets ``blocks.safetensors`` and ``recipe.yaml``.

    Raises:
        ValueError: no recipe is applied, it has no trained blocks, or a pass of it is not registered.
    """
    recipe, blocks = applied_recipe(model), getattr(model, ATTRIBUTE, None)
    if blocks is None:
        raise ValueError(f"recipe {recipe.name!r} has no trained blocks: there is nothing to save")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    recipe.to_yaml(path / RECIPE)
    tensors = {name: t.detach().contiguous() for name, t in blocks.state_dict().items()}
    save_file(tensors, path / WEIGHTS, metadata={"model": json.dumps(_identity(model))})


@on_base_model
def load_blocks(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load what :func:`save_blocks` saved; if no recipe is applied, the saved one is applied first.

    Args:
        model: a model of the kind that the blocks were trained on.
        folder: as for :func:`save_blocks`.

    Returns:
        the same model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the model or the recipe applied to it is not the one that the blocks belong to; nothing is changed.
    """
    path = Path(folder)
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"expected {WEIGHTS} and {RECIPE} in {os.fspath(folder)!r}, found no {WEIGHTS}")
    saved = Recipe.from_yaml(path / RECIPE)
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("model", "{}"))
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise ValueError(f"expected a whole safetensors file in {os.fspath(path / WEIGHTS)!r}: {e}") from e
    for key, value in _identity(model).items():
        if about.get(key) != value:
            raise ValueError(
                f"these blocks belong to a model with {key} {about.get(key)!r}, this {type(model).__name__} has"
                f" {value!r}"
            )
    try:
        current: Recipe | None = applied_recipe(model)
    except ValueError:
        current = None
    if current is not None and repr(current.passes) != repr(saved.passes):  # 1 and 1.0 are not the same
        raise ValueError(
            f"these blocks belong to the passes {list(saved.passes)}; recipe {current.name!r}, which is applied, has"
            f" {list(current.passes)}"
        )
    if current is None:
        apply(model, saved)
    blocks = getattr(model, ATTRIBUTE, nn.ModuleDict())
    expected = {name: tuple(t.shape) for name, t in blocks.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        if current is None:
            restore(model)
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = wrong[0]
        raise ValueError(
            f"{name} has shape {found.get(name, 'none')} in {WEIGHTS}; this model's blocks expect"
            f" {expected.get(name, 'no such tensor')}"
        )
    blocks.load_state_dict(tensors)
    return model


def _identity(model: nn.Module) -> dict[str, Any]:
    """What must agree for blocks to fit."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
    }
