"""Recipes: the shipped ones, strict reading, writing, and what `Recipe.of` accepts."""

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, VTW, DivPrune, Downsample, FastV, Random, Stride, VidCom2
from vlmrewrite.plan.budget import Budget, layer_index, tokens_kept
from vlmrewrite.plan.pipeline import frozen_pass
from vlmrewrite.recipe import Recipe, shipped_recipes
from vlmrewrite.registry import find_pass, known_passes

CONTROLS = ["downsample-half", "random-half", "stride-half"]
PRUNING = ["divprune-half", "fastv-half", "sts-128", "sts-32", "sts-64", "sts-half"]
NAMES = [
    "dape-half",
    *CONTROLS,
    *PRUNING,
    "vidcom2-quarter",
    "dpvr",
    "sts-dpvr",
    "sts-visor",
    "visor-cross",
    "visor-policy",
    "visor-third",
    "vtw-half",
]


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_shipped_recipes() -> None:
    shipped = shipped_recipes()
    assert list(shipped) == sorted(NAMES)
    assert all(recipe.name == name and recipe.description for name, recipe in shipped.items())
    assert all((recipe.backend, recipe.kernels) == ("auto", "auto") for recipe in shipped.values())
    thirds = VISOR(self_layers=0.3333, cross_layers=0.3333)
    chain = [{"cross_layers": 0.3333}, {"self_layers": 0.3333, "cross_layers": 0.3333}, {"self_layers": 1.0}]
    assert {name: recipe.passes for name, recipe in shipped.items()} == {
        "dape-half": (DAPE(budget=0.5),),
        "dpvr": (DPVR(at=0.5625, fuse=1, branch="copy"),),
        "sts-dpvr": (STS(keep=0.5, refine=0.25, at=0.25), DPVR()),
        "visor-policy": (VISOR(policy="confidence", chain=chain, threshold=0.8),),
        "downsample-half": (Downsample(keep=0.5),),
        "divprune-half": (DivPrune(keep=0.5),),
        "fastv-half": (FastV(keep=0.5, at=2),),
        "random-half": (Random(keep=0.5, at=0, seed=0),),
        "stride-half": (Stride(keep=0.5, at=0),),
        "sts-128": (STS(keep=192, refine=64, at=0.5),),
        "sts-32": (STS(keep=48, refine=16, at=0.5),),
        "sts-64": (STS(keep=96, refine=32, at=0.5),),
        "sts-half": (STS(keep=0.75, refine=0.25, at=0.5),),
        "sts-visor": (STS(keep=0.75, refine=0.25, at=0.5), thirds),
        "visor-cross": (VISOR(cross_layers=[0.0, 1 / 32, 7 / 32, 8 / 32, 9 / 32, 10 / 32, 11 / 32, 14 / 32]),),
        "visor-third": (thirds,),
        "vidcom2-quarter": (VidCom2(keep=0.25),),
        "vtw-half": (VTW(at=0.5),),
    }


@pytest.mark.parametrize(("name", "average"), [("sts-128", 128), ("sts-64", 64), ("sts-32", 32), ("sts-half", 288)])
def test_an_sts_recipe_is_named_after_its_average(name: str, average: int) -> None:
    [sts] = Recipe.load(name).passes
    at = layer_index(sts.at, 32)
    assert (tokens_kept(sts.keep, 576) * at + tokens_kept(sts.refine, 576) * (32 - at)) / 32 == average


def test_passes_that_come_with_vlmrewrite() -> None:
    known = known_passes()
    assert {"sts", "visor", "vtw", "divprune", "fastv", "random", "shortv", "stride", "vica"} <= set(known)
    assert [find_pass(name) for name in ("sts", "random", "stride")] == [STS, Random, Stride]


def test_from_yaml(tmp_path: Path) -> None:
    text = """
name: mine
description: Two passes.
passes:
  - sts: {keep: 1.0, refine: null}
  - random:
      keep: 1
      seed: 3
backend: eager
kernels: reference
"""
    recipe = Recipe.from_yaml(write(tmp_path, text))
    assert repr(recipe.passes) == (
        "(STS(keep=1.0, refine=None, at=0.5, features='projected', per='image'),"
        " Random(keep=1, at=0, seed=3, per='image'))"
    )
    assert recipe == Recipe(
        name="mine",
        description="Two passes.",
        passes=(STS(keep=1.0, refine=None), Random(keep=1, seed=3)),
        backend="eager",
        kernels="reference",
    )


def test_only_name_and_passes_are_required(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(write(tmp_path, "name: mine\npasses: [sts]"))
    assert recipe == Recipe(name="mine", passes=(STS(),))
    assert (recipe.description, recipe.backend, recipe.kernels) == ("", "auto", "auto")
    assert Recipe.from_yaml(write(tmp_path, "name: mine\npasses: []")).passes == ()


@pytest.mark.parametrize("load", [Recipe.load, Recipe.from_yaml, Recipe.of])
def test_missing_file(tmp_path: Path, load: object) -> None:
    assert callable(load)
    for path in (tmp_path / "absent.yaml", tmp_path, str(tmp_path / "absent.yml"), str(tmp_path / "absent")):
        with pytest.raises(FileNotFoundError, match=rf"expected a recipe file, got '{path}', which is not a file"):
            load(path)


def test_load_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "name: mine\npasses: [sts]")
    mine = Recipe(name="mine", passes=(STS(),))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").write_bytes(path.read_bytes())
    for given_path in (path, str(path), "mine.yaml", "./bare", Path("bare")):
        assert Recipe.load(given_path) == mine
    with pytest.raises(
        ValueError, match=r"^unknown recipe 'bare', expected one of dape-half, .* path ending in .yaml$"
    ):
        Recipe.load("bare")
    for meant in ("STS-128", "sts_128", "Sts_128"):
        assert Recipe.load(meant) == Recipe.load("sts-128")
    with pytest.raises(ValueError, match=r"^unknown recipe 'STS_12', .*\(did you mean 'sts-128'\?\)"):
        Recipe.load("STS_12")
    with pytest.raises(ValueError, match=r"^unknown recipe 'sts-12', .*\(did you mean 'sts-128'\?\)"):
        Recipe.load("sts-12")
    with pytest.raises(ValueError, match="^unknown recipe '', "):
        Recipe.load("")


def test_of(tmp_path: Path) -> None:
    half = Recipe.load("sts-half")
    assert Recipe.of(half) is half
    assert Recipe.of("sts-half") == half
    path = write(tmp_path, "name: mine\npasses: [sts]")
    assert Recipe.of(path) == Recipe.of(str(path)) == Recipe(name="mine", passes=(STS(),))
    assert Recipe.of(STS()) == Recipe.of([STS()]) == Recipe.of((STS(),)) == Recipe(name="custom", passes=(STS(),))
    assert Recipe.of([Stride(0.5), STS()]).passes == (Stride(0.5), STS())
    assert Recipe.of([]).passes == ()


@pytest.mark.parametrize("wrong", [3, None, STS, {"sts": {}}, object])
def test_of_refuses(wrong: object) -> None:
    with pytest.raises(ValueError, match="^expected a recipe, its name or path, a pass .* or a list of passes, got "):
        Recipe.of(wrong)


def test_of_refuses_what_is_no_pass() -> None:
    with pytest.raises(ValueError, match=r"^passes: expected a pass .* as item 1, got 'sts' \(str\)$"):
        Recipe.of([STS(), "sts"])
    with pytest.raises(
        ValueError, match=r"^passes: expected a pass as item 0, got the class STS; write STS\(\.\.\.\)$"
    ):
        Recipe.of([STS])


def test_a_recipe_is_frozen_and_strict() -> None:
    recipe = Recipe.load("sts-half")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="backend"):
        Recipe(name="a", passes=(), backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep"):
        Recipe(name="a", passes=(), keep=3)  # type: ignore[call-arg]
    assert hash(recipe) == hash(Recipe.load("sts-half"))


def budgets() -> st.SearchStrategy[Budget]:
    return st.integers(1, 10**6) | st.floats(0, 1, exclude_min=True)


def depths() -> st.SearchStrategy[int | float]:
    return st.integers(0, 200) | st.floats(0, 1, exclude_max=True)


def passes() -> st.SearchStrategy[object]:
    features = st.sampled_from(["projected", "encoder"])
    return st.one_of(
        st.builds(STS, budgets(), st.none() | budgets(), depths(), features),
        st.builds(Random, budgets(), depths(), st.integers(0, 2**32 - 1)),
        st.builds(Stride, budgets(), depths()),
        st.just(STS()),
    )


@pytest.mark.slow
@settings(deadline=None)
@example(recipe=Recipe(name="\x85", description="\u2028 \ufeff \x7f \r\n no: 1e-3 😀", passes=()))
@given(
    recipe=st.builds(
        Recipe,
        name=st.text(min_size=1),
        description=st.text(),
        passes=st.lists(passes(), max_size=4).map(tuple),
        backend=st.sampled_from(["auto", "eager", "inductor", "inductor-whole"]),
        kernels=st.sampled_from(["auto", "reference", "triton"]),
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    recipe.to_yaml(path)
    again = Recipe.from_yaml(path)
    assert again == recipe
    assert repr(again) == repr(recipe)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_of_shipped_recipes(tmp_path: Path, name: str) -> None:
    recipe = Recipe.load(name)
    recipe.to_yaml(tmp_path / "copy.yaml")
    assert Recipe.load(tmp_path / "copy.yaml") == recipe


def test_to_yaml_text(tmp_path: Path) -> None:
    Recipe.load("stride-half").to_yaml(tmp_path / "copy.yaml")
    assert (tmp_path / "copy.yaml").read_text() == (
        "name: stride-half\n"
        "description: Control, 1/2 of each image's tokens, evenly spaced, before the decoder.\n"
        "passes:\n"
        "- stride: {keep: 0.5, at: 0, per: image}\n"
        "backend: auto\n"
        "kernels: auto\n"
    )


def test_to_yaml_refuses_a_pass_that_could_not_be_read(tmp_path: Path) -> None:
    @frozen_pass
    class Unregistered:
        name: ClassVar[str] = "unregistered"

    @frozen_pass
    class Impostor:
        name: ClassVar[str] = "stride"

    for item, message in (
        (Unregistered(), "unknown pass 'unregistered'"),
        (Impostor(), "expected a pass of .*Stride.*Impostor"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe.of(item).to_yaml(tmp_path / "mine.yaml")
        assert not (tmp_path / "mine.yaml").exists()
