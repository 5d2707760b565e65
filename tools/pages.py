"""The parts of the documentation that are made from the code: a hook of mkdocs, which `make docs` runs.

A line ``<!-- part: NAME -->`` in a page is replaced by what the function of that name in :data:`PARTS` returns.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CONFIG = ROOT / "examples" / "configs" / "llava-1.5-7b.json"

ROLE = re.compile(r":\w+:(?=`)")
MARKER = re.compile(r"^<!-- part: (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with a page's text.

    Raises:
        KeyError: there is no such part.
    """
    return MARKER.sub(lambda found: PARTS[found[1]](), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with a page's HTML: roles that docstrings hold, such as ``:class:``, are left out."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)


# ---- pieces


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; bars are written as they are in code, and escaped elsewhere."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" for line in lines)


def prose(text: str) -> str:
    """A docstring as Markdown."""
    return ROLE.sub("", text)


def first(thing: object) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(prose(inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def listing(text: str) -> str:
    """Text that is shown as it is."""
    return f"```text\n{text}\n```"


def arguments(thing: object) -> dict[str, str]:
    """What a docstring says of each argument, by its name; several that share a line share the text."""
    _, _, text = (inspect.getdoc(thing) or "").partition("\nArgs:\n")
    found, names = dict[str, str](), list[str]()
    for line in text.splitlines():
        if line and not line.startswith(" "):
            break
        new = re.match(r" {4}([\w, ]+): (.*)", line)
        if new:
            names = new[1].split(", ")
        for name in names:
            found[name] = f"{found.get(name, '')} {prose(new[2] if new else line.strip())}".strip()
    return found


def layers() -> list[tuple[str, ...]]:
    """The folders and modules of the package by who may import whom, highest first; those of a group share a place."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [tuple(re.split(r" [:|] ", group)) for group in contracts[0]["layers"]]


def _docstring_of(name: str) -> str:
    """The first line of a module's docstring, which is not imported: it may need what is not installed."""
    path = ROOT / "vlmrewrite" / name
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    line = re.match(r'"""(.*?)(?:"""|\n)', source)
    return prose(line[1]) if line and line[1] else ""


# ---- parts


def house() -> str:
    """The folders, highest first, and what each is for."""
    rows = []
    for place, group in enumerate(layers(), start=1):
        rows += [[str(place), f"`{name}`", _docstring_of(name)] for name in group]
    return table(["place", "folder or module", "what it is for"], rows)


def contracts() -> str:
    """The other rules of who may import whom."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return "\n".join(f"- {c['name']}" for c in project["tool"]["importlinter"]["contracts"][1:])


def needs() -> str:
    """What a policy or an edit may ask for."""
    from vlmrewrite.plan import NEEDS, Vision

    rows = []
    for name, need in NEEDS.items():
        scores = "" if need.scores is None else f"`{need.scores(Vision)}`"
        rows.append([f"`{name}`", need.what, "not every model" if need.optional else "always", scores])
    head = ["name", "what the operator is given", "can be had", "keys that are scored, for the source `Vision`"]
    return table(head, rows)


def policies() -> str:
    """The operators that policies can go by: what each chooses, and what it is given around the usual arguments."""
    from vlmrewrite import passes
    from vlmrewrite.ops import REFERENCES

    usual, rows = ("member", "lengths", "keep"), []
    for operator, reference in REFERENCES.items():
        names = list(inspect.signature(reference).parameters)
        own = reference.__module__.startswith((passes.__name__, "vlmrewrite.ops"))
        if not own or not set(usual) <= set(names) or "chosen" in names:
            continue
        at = names.index("member")
        cells = (", ".join(f"`{name}`" for name in part) for part in (names[:at], names[at + len(usual) :]))
        name, home = str(operator).removesuffix(".default").replace(".", "::"), reference.__module__
        home = "vlmrewrite.ops" if home.startswith("vlmrewrite.ops") else passes.__name__
        rows.append([f"`{name}`", first(reference), *cells, f"`{home}`"])
    return table(["operator", "what it marks", "inputs", "weights and options", "module"], sorted(rows))


def words() -> str:
    """What can be said to a plan, to a layer and to a token set."""
    from vlmrewrite.plan import LayerPlan, Plan, TokenSet

    said = {
        Plan: "layer vision exhausted narrow widen edit block branch branched dispatch",
        LayerPlan: "run_on attend_to mlp_on change",
        TokenSet: "select __or__ __and__ __sub__ text_part vision_part",
    }
    signs = {
        "__or__": ["`a | b`", "The tokens of either set."],
        "__and__": ["`a & b`", "The tokens of both sets."],
        "__sub__": ["`a - b`", first(TokenSet.__sub__)],
    }
    rows = []
    for kind, names in said.items():
        for name in names.split():
            function = getattr(kind, name)
            taken = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
            call = f"{name}({', '.join(str(p).partition(':')[0] + _default(p) for p in taken)})"
            owner = {"Plan": "plan.", "LayerPlan": "plan.layer(i).", "TokenSet": "tokens."}[kind.__name__]
            rows.append(signs.get(name, [f"`{owner}{call}`", first(function)]))
    return table(["word", "what it says"], rows)


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f"={parameter.default!r}"


@functools.cache
def captured() -> Any:
    """LLaVA-1.5-7B without weights, captured for one image and 64 text tokens, as `vlmrewrite inspect` does."""
    import torch

    from vlmrewrite.cli.config import config_file, read_config, skeleton
    from vlmrewrite.cli.prompt import captured_prompt, made_up_shape

    config, written = read_config(CONFIG)
    shape, _ = made_up_shape(config, written, None, {})
    return captured_prompt(skeleton(config, torch.bfloat16, config_file(CONFIG)), shape)[0]


def planned(passes: Sequence[Any]) -> str:
    """What `vlmrewrite inspect` prints of the rewritten model; of a dispatch, the plan of each of its variants."""
    from vlmrewrite.compiler import rewrite

    program = rewrite(captured(), passes, strict=True, propagate=False)
    return str(program.plan if program.plan.variants else program)


def written(configuration: Any) -> str:
    """A pass as one would write it: the options that are not the defaults."""
    given = {f.name: (getattr(configuration, f.name), f.default) for f in dataclasses.fields(configuration)}
    values = {name: value for name, (value, default) in given.items() if value != default}
    return f"{type(configuration).__name__}({', '.join(f'{k}={v!r}' for k, v in values.items())})"


def shown() -> dict[str, list[Any]]:
    """By the key of each pass, the configurations whose plans are shown."""
    from vlmrewrite import passes as p
    from vlmrewrite.recipe import Recipe

    return {
        "sts": [p.STS()], "fastv": [p.FastV()], "divprune": [p.DivPrune()], "vidcom2": [p.VidCom2()],
        "vtw": [p.VTW()], "shortv": [p.ShortV(layers=tuple(range(12, 31)))], "vica": [p.ViCA()], "dpvr": [p.DPVR()],
        "visor": [p.VISOR(self_layers=(0, 1), cross_layers=(8, 16, 24)), *Recipe.load("visor-policy").passes],
        "dape": [p.DAPE()], "random": [p.Random(keep=0.5)], "stride": [p.Stride(keep=0.5)],
        "framestride": [p.FrameStride(keep=0.5)], "downsample": [p.Downsample(keep=0.5)],
    }  # fmt: skip


def unmodified() -> str:
    """The plan without a pass."""
    return listing(str(captured()))


def techniques() -> str:
    """Each pass: what it does, its source, its options, and its plan."""
    from vlmrewrite.registry import find_pass

    return "\n\n".join(technique(find_pass(key), configurations) for key, configurations in shown().items())


def technique(kind: type[Any], configurations: Sequence[Any]) -> str:
    """One pass."""
    text = inspect.getdoc(sys.modules[kind.__module__]) or ""
    papers = list(dict.fromkeys(re.findall(r"arXiv\s+(\d{4}\.\d{5})", text)))
    source = ", ".join(f"arXiv {number}" for number in papers) or "this project's own"
    parts = [
        f"## {kind.__name__}",
        f"**What it does.** {first(kind)}",
        f"**Source.** {source}. **Key in a recipe.** `{kind.name}`.",
        prose(text),
        options(kind),
    ]
    for configuration in configurations:
        parts += [f"With `{written(configuration)}`:", listing(planned([configuration]))]
    return "\n\n".join(parts)


def options(kind: type[Any]) -> str:
    """A pass's options."""
    from vlmrewrite.cli.catalogue import passes

    [found] = [p for p in passes()[0] if p["name"] == kind.name]
    told, rows = arguments(kind), []
    for o in found["options"]:
        default = "must be given" if o["required"] else f"`{o['default']!r}`"
        kind_of_value = re.sub(r"(?:typing|collections\.abc)\.", "", o["type"])
        rows.append([f"`{o['name']}`", f"`{kind_of_value}`", default, told.get(o["name"], "")])
    return table(["option", "type", "default", "what it is"], rows)


def recipes() -> str:
    """The shipped recipes and their files."""
    from vlmrewrite.recipe import shipped_recipes

    parts = []
    for name, recipe in shipped_recipes().items():
        file = (ROOT / "recipes" / f"{name}.yaml").read_text().strip()
        parts += [f"## {name}", recipe.description, f"```yaml\n{file}\n```"]
    return "\n\n".join(parts)


def commands() -> str:
    """Every command with its arguments and options."""
    import typer

    from vlmrewrite.cli import app

    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        with command.make_context(name, [], resilient_parsing=True) as context:
            context.info_name = f"vlmrewrite {name}"
            usage = context.get_usage().removeprefix("Usage: ")
            records = [p.get_help_record(context) for p in command.get_params(context)]
        rows = [[f"`{name}`", " ".join(text.split()).replace("|", r"\|")] for name, text in filter(None, records)]
        parts += [
            f"## {name}",
            listing(usage),
            inspect.cleandoc(command.help),
            table(["argument or option", "what it is"], rows),
        ]
    return "\n\n".join(parts)


def families() -> str:
    """What works with which family, and why the rest does not."""
    from tools.families import page

    return page(table)


PARTS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (house, contracts, needs, policies, words, unmodified, techniques, recipes, commands, families)
}
"""What a page can ask for."""
