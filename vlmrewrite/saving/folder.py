"""The files of a recipe and its blocks: ``vlmrewrite.json`` and ``vlmrewrite_blocks.safetensors``."""

from __future__ import annotations

import importlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from vlmrewrite.errors import explain, shown
from vlmrewrite.recipe import LARGEST, Recipe, shipped_names

FILE, BLOCKS = "vlmrewrite.json", "vlmrewrite_blocks.safetensors"
MODEL_FILES = (CONFIG_NAME, ADAPTER_CONFIG_NAME)
"""Where one of these is, transformers' ``from_pretrained`` finds a model, or adapters of one."""

_OLD_RECIPE, _OLD_BLOCKS = "recipe.yaml", "blocks.safetensors"
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class Identity(BaseModel):
    """What of a model must agree for blocks to fit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model_type: str
    hidden_size: int | None
    num_hidden_layers: int


class _File(BaseModel):
    """What ``vlmrewrite.json`` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]
    vlmrewrite: str
    transformers: str
    model: Identity
    base_model: str | None = None
    weights: bool
    blocks: bool
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A recipe that was saved, with its blocks.

    Attributes:
        recipe: the recipe.
        model: what it belongs to.
        tensors: the parameters of its blocks by name, each in the dtype of its file; empty if it has none.
        where: the file of the blocks, or of a recipe without, for messages.
        base_model: the repository of the Hub that holds the weights which the recipe was applied to, if it is known.
        weights: whether the model's weights are beside it.
    """

    recipe: Recipe
    model: Identity
    tensors: dict[str, Tensor]
    where: str
    base_model: str | None = None
    weights: bool = False


def write(folder: Path, stored: Stored, *, weights: bool = False) -> None:
    """Write both files into a folder that is there; without blocks, a file of old ones is removed.

    Args:
        folder: where to.
        stored: what.
        weights: whether a model's weights will be beside the files, though they are not in this folder.

    Raises:
        ValueError: a pass of the recipe is not registered; nothing is written.
    """
    about = _File(
        format=1,
        vlmrewrite=importlib.import_module("vlmrewrite").__version__,
        transformers=transformers.__version__,
        model=stored.model,
        base_model=stored.base_model,
        weights=weights or _weights(folder),
        blocks=bool(stored.tensors),
        recipe=stored.recipe.to_data(),
    )
    text = about.model_dump_json(indent=2)
    if stored.tensors:
        save_file(stored.tensors, folder / BLOCKS, metadata={"format": "pt"})
    else:
        (folder / BLOCKS).unlink(missing_ok=True)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def named_folder(name: object) -> bool:
    """Whether this means a folder, or a repository of the Hub, and not a recipe or its file."""
    if not isinstance(name, str | os.PathLike) or name in shipped_names():  # "./name" is a folder of such a name
        return False
    if Path(name).is_dir():
        return True
    looks = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".")
    return bool(looks) and not Path(name).exists() and Path(name).suffix not in (".yaml", ".yml")


def _found(name: str | os.PathLike[str], file: str, **hub: Any) -> Path | None:
    """A file of a folder, or of a repository of the Hub, in the cache that transformers uses too.

    Raises:
        FileNotFoundError: neither is there, or the Hub cannot be asked.
    """
    if Path(name).is_dir():
        there = Path(name) / (hub.get("subfolder") or "") / file
        return there if there.is_file() else None
    options = {key: value for key, value in hub.items() if key in _HUB}
    try:
        return Path(hf_hub_download(os.fspath(name), file, **options))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError, HfHubHTTPError) as e:
        raise FileNotFoundError(
            f"expected a folder, or a repository of the Hub, got {os.fspath(name)!r}, which is no folder here, and the"
            f" Hub gives no {file}: {e}"
        ) from e


def read(name: str | os.PathLike[str], **hub: Any) -> Stored:
    """What was written into a folder, or a repository of the Hub; also what version 0.1 wrote.

    Args:
        name: of the folder or the repository.
        hub: ``revision``, ``token`` and so on, as for transformers' ``from_pretrained``; others are left out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not as it is written; the message names it.
    """
    path = _found(name, FILE, **hub)
    if path is None:
        if Path(name).is_dir() and (Path(name) / _OLD_BLOCKS).is_file():
            return _old(Path(name))
        raise FileNotFoundError(
            f"expected {FILE} in {os.fspath(name)!r}, found none: nothing of a recipe was saved there (transformers'"
            " from_pretrained loads a model without; then vlmrewrite.apply(model, recipe))"
        )
    about = _about(path)
    recipe = Recipe.of_data(about.recipe, str(path))
    facts = about.base_model, about.weights or _weights(Path(name))
    if not about.blocks:
        return Stored(recipe, about.model, {}, str(path), *facts)
    blocks = _found(name, BLOCKS, **hub)
    if blocks is None:
        raise FileNotFoundError(f"expected {BLOCKS} in {os.fspath(name)!r}, which {path} names, found none")
    return Stored(recipe, about.model, _tensors(blocks)[0], str(blocks), *facts)


def _weights(folder: Path) -> bool:
    """Whether transformers' ``from_pretrained`` finds a model there, or adapters of one."""
    return any((folder / name).is_file() for name in MODEL_FILES)


def _about(path: Path) -> _File:
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path}: expected at most {LARGEST:,} bytes, got {size:,}")
    data = _json(path.read_bytes(), str(path))
    if isinstance(data, dict) and data.get("format") != 1:
        raise ValueError(
            f"{path}: format: expected 1, got {shown(data.get('format'))}: this version of vlmrewrite cannot read it"
        )
    try:
        return _File.model_validate(data)
    except ValidationError as e:
        raise ValueError("\n".join(f"{path}: {line}" for line in explain(e, "", list(_File.model_fields)))) from None


def _json(text: bytes | str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: expected JSON: {e}") from None


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, all of them finite, and its other facts."""
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as e:
        raise ValueError(f"expected a whole safetensors file in {str(path)!r}: {e}") from e
    for name, t in tensors.items():
        if not torch.isfinite(t.float() if t.element_size() == 1 else t).all():
            raise ValueError(f"{path}: {name}: expected finite numbers, got some that are not")
    return tensors, facts


def _old(folder: Path) -> Stored:
    """What version 0.1 wrote: the model's identity is in the header of the blocks."""
    path = folder / _OLD_BLOCKS
    recipe = Recipe.from_yaml(folder / _OLD_RECIPE)
    tensors, facts = _tensors(path)
    about = _json(facts.get("model", "{}"), f"{path}: model")
    try:
        model = Identity.model_validate(about)
    except ValidationError as e:
        lines = explain(e, "model", list(Identity.model_fields))
        raise ValueError("\n".join(f"{path}: {line}" for line in lines)) from None
    return Stored(recipe, model, tensors, str(path))
