"""`vlmrewrite recipes` and `vlmrewrite passes`: what there is."""

from __future__ import annotations

from typing import Any

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import AsJson
from vlmrewrite.cli.terminal import print_json, print_table, print_warning


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with vlmrewrite."""
    from vlmrewrite.cli import catalogue

    found = catalogue.recipes()
    if as_json:
        print_json(found)
        return
    rows = []
    for r in found:
        written = [f"{p['name']}: " + _options(p["options"]) for p in r["passes"]]
        rows.append([r["name"], r["description"], "\n".join(written)])
    print_table(["recipe", "description", "passes"], rows)


@app.command()
def passes(as_json: AsJson = False) -> None:
    """List the passes that a recipe can hold, with their options; other packages can bring passes too."""
    from vlmrewrite.cli import catalogue

    found, wrong = catalogue.passes()
    for reason in wrong.values():
        print_warning(reason)
    if as_json:
        print_json(found)
        return
    rows = []
    for p in found:
        options = [
            f"{o['name']}: {o['type']}" + ("" if o["required"] else f" = {o['default']!r}") for o in p["options"]
        ]
        rows.append([p["name"], p["description"], "\n".join(options), p["package"]])
    print_table(["pass", "what it does", "options", "package"], rows)
    print("Budget: int tokens of an image, or float fraction of them. Depth: int layer, or float fraction of depth.")


def _options(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in values.items())
