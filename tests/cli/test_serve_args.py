"""`vlmrewrite serve-args`: an engine's arguments, and what of a recipe runs there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmrewrite.cli import app
from vlmrewrite.passes import VTW, DivPrune
from vlmrewrite.recipe import Recipe
from vlmrewrite.serving.vllm import overrides
from vlmrewrite.testing.models import FAMILIES

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
LLAVA = CONFIGS / "llava-1.5-7b.json"


def said(*args: object) -> str:
    done = CliRunner().invoke(app, ["serve-args", *map(str, args)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_what_is_printed() -> None:
    told, of, folder, _, command = said(LLAVA, "--recipe", "sts-128").splitlines()
    assert told == (
        "STS: stage 1 only, 192 of 576; left out: policy 'relevance' at layer 16 chooses inside the decoder"
    )
    assert of == "of an image of 576 tokens: image_seq_length"
    assert folder == f"write the model's folder or name for MODEL: {LLAVA} is a configuration alone"
    *start, option, value = shlex.split(command)
    assert start == ["vllm", "serve", "MODEL"] and option == "--hf-overrides"
    assert json.loads(value) == overrides(Recipe.load("sts-128"), 576)


def test_json_alone() -> None:
    assert json.loads(said(LLAVA, "--recipe", "stride-half", "--json")) == {
        "hf_overrides": overrides(Recipe.load("stride-half"), 576)
    }


def test_a_budget_of_a_row(tmp_path: Path) -> None:
    Recipe(name="row", passes=(DivPrune(3, per="row"),)).to_yaml(tmp_path / "row.yaml")
    told = said(LLAVA, "--recipe", tmp_path / "row.yaml", "--image-tokens", 9)
    assert "DivPrune: 3 of 9\nof an image of 9 tokens: as given\nan image of several tiles: of each tile of 576" in told
    assert "depends on those in front of it" in told and """--limit-mm-per-prompt '{"image": 1}'""" in told


@pytest.mark.parametrize(
    ("family", "tile"),
    [("llava", 16), ("internvl", 4), ("gemma3", 9), ("qwen2_5_vl", None), ("llava_next", None)],
)
def test_tiles_are_found_by_the_encoder(family: str, tile: int | None, tmp_path: Path) -> None:
    """Where the encoder takes tiles alone, each is an image to a budget under transformers too."""
    FAMILIES[family](2).model.config.save_pretrained(tmp_path)
    made = json.loads(said(tmp_path, "--recipe", "stride-half", "--image-tokens", 16, "--json"))
    assert made["hf_overrides"]["vlmrewrite"].get("tile") == tile


def test_a_folder_is_served_by_its_name(tmp_path: Path) -> None:
    FAMILIES["llava"](2).model.config.save_pretrained(tmp_path)
    *_, command = said(tmp_path, "--recipe", "stride-half", "--image-tokens", 16).splitlines()
    assert shlex.split(command)[:3] == ["vllm", "serve", str(tmp_path)]


@pytest.mark.parametrize("there", [True, False])
def test_a_plug_in_that_vllm_would_not_find(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmrewrite.cli.serve_args.entry_points", lambda *, group, name: [name] if there else [])
    done = CliRunner().invoke(app, ["serve-args", str(LLAVA), "--recipe", "stride-half", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)
    assert done.stderr.startswith("warning: the installed vlmrewrite has no entry point") != there


def test_why_tiles_are_no_images(tmp_path: Path) -> None:
    FAMILIES["llava_next"](2).model.config.save_pretrained(tmp_path)
    args = ["serve-args", str(tmp_path), "--recipe", "stride-half", "--image-tokens", "16", "--json"]
    assert "note: budgets are of images, as tiles alone are not encoded (" in CliRunner().invoke(app, args).stderr


def test_a_recipe_that_keeps_nothing(tmp_path: Path) -> None:
    Recipe(name="none", passes=(VTW(at=0),)).to_yaml(tmp_path / "none.yaml")
    done = CliRunner().invoke(app, ["serve-args", str(LLAVA), "--recipe", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2 and "error: it keeps no vision token: expected a recipe that keeps some" in done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "fastv-half"], "error: FastV: policy 'fastv' at layer 2 chooses inside the decoder"),
        (["--recipe", "dape-half"], "error: DAPE: "),
        (["--recipe", "no-such"], "error: unknown recipe 'no-such'"),
        (["--recipe", "sts-128", "--image-size", "9x9", "--image-tokens", "3"], "error: expected one of --image-size"),
    ],
)
def test_what_is_refused(args: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["serve-args", str(LLAVA), *args])
    assert done.exit_code == 2 and message in done.output
