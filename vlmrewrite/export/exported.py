"""What an export is: two programs, kept and found again in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

FILE = "vlmrewrite_export.json"

_PROGRAMS = ("prefill", "decode")


def plain(x: Any) -> Any:
    """Tensors in nested dicts and lists, of what a vision tower gave; what only its own layers made is left out."""
    if isinstance(x, Tensor) or x is None:
        return x if x is None else x.contiguous()  # what is compiled ahead of time reads memory as in the example
    if isinstance(x, (list, tuple)):
        return [plain(y) for y in x]
    fields = x if isinstance(x, Mapping) else vars(x)
    inner = {name: plain(y) for name, y in fields.items() if name not in ("hidden_states", "attentions")}
    return {name: y for name, y in inner.items() if y is not None}


@dataclass(frozen=True)
class Exported:
    """A model under a recipe, exported; see :func:`vlmrewrite.export`.

    Attributes:
        prefill: takes the arguments named in ``takes``; gives ``logits`` and ``past_key_values``.
        decode: takes ``input_ids`` int64 [B, 1], ``attention_mask`` [B, seen + 1], ``past_key_values`` as it was given
            back last and, if ``prefill`` takes any, ``position_ids`` of the new tokens, all contiguous; gives the same.
        takes: the names of what ``prefill`` takes.
        model: the class of the model.
        recipe: its name.
        images: vision tokens of each image, rows in order.
    """

    prefill: ExportedProgram
    decode: ExportedProgram
    takes: tuple[str, ...]
    model: str
    recipe: str
    images: tuple[int, ...]

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What ``prefill`` takes, out of a model's inputs: encoded images as plain dicts of tensors.

        Raises:
            ValueError: one is missing.
        """
        if lacking := [name for name in self.takes if inputs.get(name) is None]:
            raise ValueError(
                f"the inputs lack {', '.join(lacking)}; expected {', '.join(self.takes)}, as when it was exported"
            )
        return {name: plain(inputs[name]) for name in self.takes}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write both programs, each with the model's weights.

        Args:
            folder: made if it is not there; gets ``prefill.pt2``, ``decode.pt2`` and ``vlmrewrite_export.json``.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for name in _PROGRAMS:
            torch.export.save(getattr(self, name), path / f"{name}.pt2")
        told = {name: getattr(self, name) for name in ("takes", "model", "recipe", "images")}
        (path / FILE).write_text(json.dumps(told, indent=1) + "\n")

    def __repr__(self) -> str:
        images = f"{len(self.images)} image{'s' * (len(self.images) != 1)} of {sum(self.images)} vision tokens"
        return f"Exported({self.model} under {self.recipe!r}; {', '.join(self.takes)}; {images})"


def load_export(folder: str | os.PathLike[str]) -> Exported:
    """Load what :meth:`Exported.save` wrote; the model and its recipe are not needed.

    ``torch.export.load`` reads each program by itself, where this package is not installed.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder holds no export, or a damaged one.
    """
    path = Path(folder)
    for name in (FILE, *(f"{name}.pt2" for name in _PROGRAMS)):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing; expected a folder that Exported.save has written")
    try:
        told = json.loads((path / FILE).read_text())
        if not all(isinstance(told[name], list) for name in ("takes", "images")):
            raise ValueError(f"takes={told['takes']!r}, images={told['images']!r}, where lists are expected")
        facts = {"takes": tuple(told["takes"]), "model": str(told["model"]), "recipe": str(told["recipe"])}
        facts["images"] = tuple(map(int, told["images"]))
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path / FILE} is damaged ({e}); expected what Exported.save has written") from e
    programs = {}
    for name in _PROGRAMS:
        try:
            programs[name] = torch.export.load(path / f"{name}.pt2")
        except Exception as e:  # of zip files, of JSON, of PyTorch's own
            raise ValueError(
                f"{path / name}.pt2 is damaged ({type(e).__name__}: {e}); expected what Exported.save has written"
            ) from e
    return Exported(**programs, **facts)  # type: ignore[arg-type]
