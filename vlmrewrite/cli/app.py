"""The command line's root."""

from __future__ import annotations

import typer

from vlmrewrite.cli.terminal import Commands

app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def commands(context: typer.Context) -> None:
    """Prune and reroute the vision tokens of Hugging Face vision-language models."""
    if context.invoked_subcommand is None:
        print(context.get_help())
