"""Options that several commands share, and their checks."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vlmrewrite.cli.terminal import Errors

if TYPE_CHECKING:
    from vlmrewrite.recipe import Recipe


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Model folder, a model on the Hub, or a config JSON file.")
]

ModelFolder = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder with a model's weights and processor, or a model on the Hub.")
]

ImageTokens = Annotated[int | None, typer.Option(help="Tokens of each made-up image, if not as the config says.")]

ImageSize = Annotated[
    str | None, typer.Option(metavar="WxH", help="Pixels of each made-up image, whose tokens and tiles are counted.")
]

Samples = Annotated[Path, typer.Option(help="JSONL or Parquet: image, prompt, answer in each row; see docs.")]

Metric = Annotated[
    str, typer.Option(help="exact, contains, choice, vqa, anls, number, f1, rouge, iou, iou50; auto: exact or choice.")
]

Batch = Annotated[int, typer.Option(help="Prompts at a time.")]

LongestAnswer = Annotated[int, typer.Option(help="Longest answer.")]

Limit = Annotated[int | None, typer.Option(help="Only so many of the first samples.")]

Backend = Annotated[Literal["auto", "eager", "inductor", "inductor-whole"], typer.Option(help="What runs the graph.")]

Kernels = Annotated[Literal["auto", "reference", "triton"], typer.Option(help="Which kernels run.")]

Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="PATH", help="Write it as JSON to this file too; - prints JSON in place of text."),
]

Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto is the GPU if there is one.")]

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto is float32 on a CPU, else the config's.")
]


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr, and no other one meanwhile."""
    from vlmrewrite.progress import quietly

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with quietly(), Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """A function that tells of each step on stderr, before it is made: a bar on a terminal, elsewhere a line each."""
    with contextlib.ExitStack() as stack:
        if not Console(stderr=True).is_terminal:
            yield lambda text: print(text, file=sys.stderr, flush=True)
            return
        progress, done = stack.enter_context(progress_bar()), itertools.count()
        task = progress.add_task("", total=None)
        yield lambda text: progress.update(task, description=text, completed=next(done))
        progress.update(task, description="done")


def unset(options: dict[str, Any], expected: str) -> None:
    """Raise ValueError if any of the options was given."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None and value != []]
    if given:
        raise ValueError(f"expected {expected} {', '.join(given)}")


def recipe_named(name: str) -> Recipe:
    """The recipe that an option names; what is wrong with it is one error a line."""
    from vlmrewrite.recipe import Recipe

    try:
        return Recipe.load(name)
    except ValueError as e:
        raise Errors(str(e)) from e


def a_question(option: str, value: str) -> None:
    """Raise ValueError for a prompt that asks nothing."""
    if not value.strip():
        raise ValueError(f"{option}: expected a question about the images, got {value!r}")


def pixels(value: str) -> tuple[int, int]:
    """Width and height of an option such as 640x480.

    Raises:
        ValueError: it is not written so.
    """
    width, _, height = value.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"--image-size: expected width and height in pixels, such as 640x480, got {value!r}")
    return int(width), int(height)


def at_least(option: str, value: int, least: int) -> None:
    """Raise ValueError for an option below its least value."""
    if value < least:
        raise ValueError(f"{option}: expected at least {least}, got {value}")
