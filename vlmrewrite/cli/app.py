"""The command line's root."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Annotated

import typer

from vlmrewrite import __version__
from vlmrewrite.cli.terminal import Commands

app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode=None)


def _version(asked: bool) -> None:
    if asked:
        used = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        print(f"vlmrewrite {__version__} (Python {platform.python_version()}, {used})")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def commands(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print versions and exit.")
    ] = False,
) -> None:
    """Prune and reroute the vision tokens of Hugging Face vision-language models."""
    if context.invoked_subcommand is None:
        print(context.get_help())
