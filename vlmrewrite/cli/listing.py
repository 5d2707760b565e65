"""`vlmrewrite recipes` and `vlmrewrite passes`: what there is."""

from __future__ import annotations

from typing import Any

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import Json
from vlmrewrite.cli.terminal import as_json, check_json, print_table, print_warning, print_wrapped


@app.command()
def recipes(json: Json = None) -> None:
    """List the recipes that come with vlmrewrite."""
    from vlmrewrite.cli import catalogue

    check_json(json)
    found = catalogue.recipes()
    if as_json(json, found):
        return
    rows = []
    for r in found:
        written = [f"{p['name']}: " + _options(p["options"]) for p in r["passes"]]
        rows.append([r["name"], r["description"], "\n".join(written)])
    print_table(["recipe", "description", "passes"], rows)


@app.command()
def passes(json: Json = None) -> None:
    """List the passes that a recipe can hold, with their options; other packages can bring passes too."""
    from vlmrewrite.cli import catalogue

    check_json(json)
    found, wrong = catalogue.passes()
    for reason in wrong.values():
        print_warning(reason)
    if as_json(json, found):
        return
    for p in found:
        package = "" if p["package"] == "vlmrewrite" else f" (of the package {p['package']})"
        print_wrapped(f"{p['name']}{package}: {p['description']}", "  ")
        for o in p["options"]:
            print_wrapped(f"    {o['name']}: {o['type']}" + ("" if o["required"] else f" = {o['default']!r}"), "      ")
    print()
    for what in _TYPES:
        print_wrapped(what, "  ")


_TYPES = (
    "Budget: int >= 1, tokens of each image; or float in (0, 1], a fraction of each image's tokens.",
    "Depth: int >= 0, a layer; or float in [0, 1), a fraction of the decoder's depth.",
    "Layers: list of Depth; or float in (0, 1], that share of the layers, evenly spaced.",
)


def _options(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in values.items())
