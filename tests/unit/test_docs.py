"""The documentation: what is made from the code is whole, and what it links to is there."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from tools import pages
from vlmrewrite import passes
from vlmrewrite.cli import app
from vlmrewrite.plan import FEATURES, NEEDS, LayerPlan, Plan, run_passes
from vlmrewrite.recipe import shipped_recipes
from vlmrewrite.registry import find_pass

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def cells(part: str) -> dict[str, list[str]]:
    """The rows of the tables in a page by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines() if line[:1] == "|"]
    return {row[0].strip("`"): row for row in rows}


def test_every_need_is_told() -> None:
    rows = cells(pages.needs())
    assert set(NEEDS) <= set(rows)
    for name, need in NEEDS.items():
        assert rows[name][1:3] == [need.what, "not every model" if need.optional else "always"]
    assert (rows["attention"][3], rows["attention_outside"][3], rows["stream"][3]) == ("`All`", "`Text`", "")


def test_every_operator_of_the_shipped_policies_is_told() -> None:
    rows = cells(pages.policies())
    used = set()
    for configurations in pages.shown().values():
        for p in configurations:
            plan, _ = run_passes(Plan(32, frozenset(FEATURES)), [p], strict=True)
            used |= {str(s.policy.op).removesuffix(".default").replace(".", "::") for s in plan.selections()}
    assert {f"`{name}`" for name in used} <= {row[0] for row in rows.values()} and "vlm::sts_sample" in used
    assert rows["vlm::top_attention"][2:] == ["`weights`", "", "`vlmrewrite.ops`"]
    assert rows["vlm::random_sample"][2:] == ["`ordinal`", "`seed`", "`vlmrewrite.passes`"]
    assert not {"vlm::checked", "vlm::loudest"} & set(rows)


def test_every_word_of_a_plan_is_told() -> None:
    text = pages.words()
    said = {name for kind in (Plan, LayerPlan) for name in vars(kind) if callable(getattr(kind, name))}
    hidden = "asks copy until sets check needs unmet render scored selections variant_of".split()
    for name in sorted(n for n in said if not n.startswith("_") and n not in hidden):
        assert re.search(rf"`(plan|plan\.layer\(i\))\.{name}\(", text), f"{name} is not told, and not on the list"
    assert (
        "| `plan.narrow(policy, keep, at=0, per='image')` | From layer ``at`` on, go on with ``keep`` vision tokens"
        in text
    )
    assert "Return self" not in text


def test_every_pass_is_shown() -> None:
    shown = pages.shown()
    kinds = [getattr(passes, name) for name in passes.__all__]
    assert sorted(shown) == sorted(kind.name for kind in kinds)
    for key, configurations in shown.items():
        assert {type(c) for c in configurations} == {find_pass(key)}


@pytest.mark.parametrize("name", passes.__all__)
def test_every_option_of_a_pass_is_told(name: str) -> None:
    kind = getattr(passes, name)
    rows = cells(pages.options(kind))
    del rows["option"], rows["---"]
    assert list(rows) == [field.name for field in dataclasses.fields(kind)]
    assert all(row[-1] for row in rows.values()), f"an option of {name} has no words in its docstring"


def test_the_defaults_of_options() -> None:
    rows = cells(pages.options(passes.Random))
    assert rows["keep"][1:3] == ["`Budget`", "must be given"]
    assert rows["at"][1:3] == ["`Depth`", "`0`"]
    assert rows["at"][3] == "layer (int) or fraction of the depth (float)."


def test_every_recipe_is_shown() -> None:
    text = pages.recipes()
    for name, recipe in shipped_recipes().items():
        assert f"## {name}\n\n{recipe.description}\n\n```yaml\nname: {name}\n" in text


def test_every_command_and_option_is_told() -> None:
    text = pages.commands()
    group = typer.main.get_command(app)
    assert list(group.commands) == re.findall(r"^## ([\w-]+)$", text, re.MULTILINE)
    for name, command in group.commands.items():
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert f"vlmrewrite {name} [OPTIONS]" in section
        for parameter in command.params:
            written = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
            assert f"| `{written}" in section, f"{written} of {name} is not told"


def test_every_folder_has_its_place() -> None:
    rows = [line.split(" | ") for line in pages.house().splitlines()[2:]]
    places = {row[1].strip("`"): int(row[0].strip("| ")) for row in rows}
    there = {path.stem for path in (ROOT / "vlmrewrite").iterdir() if path.suffix in ("", ".py")}
    assert set(places) == there - {"__init__", "__pycache__", "passes", "recipes"} | {"passes", "recipes"}
    assert places["cli"] < places["passes"] < places["rewrite"] < places["plan"]
    assert places["registry"] == places["recipe"]
    assert all(len(row[2].strip("| ")) > 10 for row in rows)
    told = pages.contracts().splitlines()
    assert told == [f"- {c['name']}" for c in PROJECT["tool"]["importlinter"]["contracts"][1:]]


def test_parts_and_markers_agree() -> None:
    asked = [name for path in TEXTS for name in pages.MARKER.findall(path.read_text())]
    assert sorted(asked) == sorted(pages.PARTS)
    with pytest.raises(KeyError, match="nothing"):
        pages.on_page_markdown("<!-- part: nothing -->")
    assert pages.on_page_markdown("a\n\n<!-- part: contracts -->\n\nb") == f"a\n\n{pages.contracts()}\n\nb"


def test_what_pages_take_from_files_is_there() -> None:
    taken = 0
    for path in TEXTS:
        for line in path.read_text().splitlines():
            if not re.match(r"\s*-+ ?8", line):
                continue
            found = re.fullmatch(r'--8<-- "([^":]+)(?::(\w+))?"', line)
            assert found, f"{path.name}: {line!r} is not as the snippets of pymdownx are written; did ruff format it?"
            text = (ROOT / found[1]).read_text()
            assert found[2] is None or all(f"--8<-- [{end}:{found[2]}]" in text for end in ("start", "end"))
            taken += 1
    assert taken > 10


def test_roles_in_docstrings() -> None:
    assert pages.prose("see :class:`vlmrewrite.plan.Call` and ``x``") == "see `vlmrewrite.plan.Call` and ``x``"
    assert pages.on_page_content("see :class:<code>Call</code>: <code>x</code>") == (
        "see <code>Call</code>: <code>x</code>"
    )


def test_arguments_of_a_docstring() -> None:
    def f() -> None:
        """One.

        Args:
            a, b: two
                lines.
            c: one: with a colon.

        Returns:
            d: nothing.
        """

    assert pages.arguments(f) == {"a": "two lines.", "b": "two lines.", "c": "one: with a colon."}


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.is_file(), f"{target} is not there"
        assert not anchor or anchor in anchors(found.read_text()), f"{target}: no such heading"


def test_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", text))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"changelog.md"}


def test_nothing_is_fetched_while_pages_are_read() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^  font: false", text, re.MULTILINE)
    assert "http" not in text
    for path in TEXTS:
        assert "```mermaid" not in path.read_text(), "it would be fetched from elsewhere"


def test_citation() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "authors"} <= set(cited)
    assert (cited["title"], cited["version"]) == (project["name"], project["version"])
    assert (cited["license"], cited["keywords"]) == (project["license"], project["keywords"])
