"""Models and processors from local folders, and a question about images as model inputs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from vlmrewrite.cli.config import read_config
from vlmrewrite.errors import blamed_on
from vlmrewrite.evaluate import Together, with_image_tokens


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """In a group with the other processes that a launcher has started, if it has; whether this is the first of them.

    The others print nothing, errors of their own aside.

    Raises:
        ValueError: the launcher has not said where they meet (``MASTER_ADDR`` and its like).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or (dist.is_available() and dist.is_initialized()):
        yield Together().rank == 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device_of("cuda"))  # the clock waits for the current one
    dist.init_process_group("gloo", timeout=timedelta(days=1))  # objects of Python are exchanged
    try:
        with contextlib.ExitStack() as stack:
            if rank := dist.get_rank():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield rank == 0
    finally:
        dist.destroy_process_group()


def device_of(name: str) -> torch.device:
    """The device that is meant: ``"auto"`` is a GPU if there is one.

    It is the GPU of this process where a launcher has started one for each (``LOCAL_RANK``).

    Raises:
        ValueError: there is no such device here.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("--device cuda: torch sees no GPU here; expected cpu or auto")
    if name not in ("auto", "cuda"):
        return torch.device(name)
    if not there:
        return torch.device("cpu")
    own = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(own)) if own else torch.device("cuda")


def dtype_of(name: str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype that is meant: ``"auto"`` is float32 on a CPU, elsewhere what the configuration names."""
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    if device.type == "cpu" or not isinstance(config.dtype, torch.dtype):
        return torch.float32
    return config.dtype


def with_weights(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model that a folder holds, in eval mode.

    Raises:
        ValueError: the folder holds no weights, or they cannot be loaded.
    """
    if not any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*")):
        raise ValueError(f"{folder}: expected a folder with weights (*.safetensors or *.bin), found none")
    with blamed_on(folder, "its weights"), _silence():
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No progress bar of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def with_random_weights(config: Any, file: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A freshly initialised model in eval mode, the same in every run.

    Raises:
        ValueError: the model cannot be built from the configuration, which was read from ``file``.
    """
    with torch.random.fork_rng(), blamed_on(file, "the configuration"), device:
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def read_processor(folder: Path) -> Any:
    """The processor that a folder holds.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder that holds a processor, got a file")
    with blamed_on(folder, "the processor"):
        processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    if not callable(getattr(processor, "image_processor", None)):
        raise ValueError(f"{folder}: expected a processor of texts and images, got a {type(processor).__name__}")
    return processor


def with_processor(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """The model and the processor that a folder holds, on the device and of the dtype that options name.

    Raises:
        ValueError: as :func:`device_of`, :func:`read_processor` and :func:`with_weights`.
    """
    where, (config, _) = device_of(device), read_config(folder)
    processor = read_processor(folder)
    return with_weights(folder, dtype_of(dtype, config, where), where), processor


def read_images(paths: Sequence[Path]) -> list[Any]:
    """Images in RGB.

    Raises:
        ValueError: a file is missing or is no image.
    """
    from PIL import Image  # only commands that read images need it

    images = []
    for path in paths:
        try:
            images.append(Image.open(path).convert("RGB"))
        except OSError as e:
            raise ValueError(f"{path}: expected an image file: {e.strerror or e}") from None
    return images


def question(processor: Any, prompt: str, images: Sequence[Any]) -> Any:
    """A prompt about images as the model takes it: through the chat template, if the processor has one.

    Without a template, image tokens that the prompt lacks are put in front of it.

    Raises:
        ValueError: the prompt holds image tokens for another number of images, or it cannot be known what they are.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    text = with_image_tokens(processor, prompt, len(images), "--prompt: ")
    return processor(images=list(images), text=text, return_tensors="pt")
