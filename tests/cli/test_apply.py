"""`vlmrewrite apply`: answers without and with a recipe, how long they took, and what was refused."""

import json
import warnings
from pathlib import Path

from saved_llava import WORDS
from test_cli import output, run, write


def test_apply_answers_without_and_with_a_recipe(folder: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "name: all-of-them\npasses:\n- stride: {keep: 1.0}\n")
    arguments = ("apply", folder, "--image", folder / "picture.png", "--max-new-tokens", 3, "--prompt", "w10 w20")
    lines = output(*arguments, "--recipe", mine).splitlines()
    before, after = lines[0].split(), lines[1].split()
    assert before[0] == "unmodified"
    assert after[0] == "all-of-them"
    assert before[1:] == after[1:]
    assert len(before) == 4
    assert set(before[1:]) <= set(WORDS)
    assert lines[3] == "recipe all-of-them, backend eager"
    assert "  Stride(keep=1.0, at=0, per='image'): matched, CHANGES NOTHING" in lines
    assert "costs of the last call with an image: 1 row of 18 tokens, 1 image, 16 vision tokens" in " ".join(
        " ".join(lines).split()
    )


def test_apply_with_timing_as_json(folder: Path, tmp_path: Path) -> None:
    asked = ("--image", folder / "picture.png", "--max-new-tokens", 3, "--prompt", "w10 w20", "--recipe", "STS_half")
    more = ("--timing", "--detail", "--html", tmp_path / "out.html")
    text = output("apply", folder, *asked, *more, "--json", tmp_path / "out.json")
    assert "reference for attention x4" in text
    assert "Recipe sts-half, backend eager</h3>" in (tmp_path / "out.html").read_text()
    found = json.loads((tmp_path / "out.json").read_text())
    assert [one["name"] for one in found["answers"]] == ["unmodified", "sts-half"]
    for one, line in zip(found["answers"], text.splitlines(), strict=False):
        assert line.split() == [one["name"], *one["answer"].split()]
        assert one["new_tokens"] == 3 and one["seconds_first"] > 0 and one["seconds"] > 0
    assert text.count(" s the second (3 tokens, ") == 2
    assert found["prompt"] == "w10 w20" and found["class"] == "LlavaForConditionalGeneration"
    assert found["report"]["recipe"] == "sts-half" and len(found["report"]["layers"]) == 4
    printed = json.loads(output("apply", folder, *asked, "--json", "-"))
    assert [one["answer"] for one in printed["answers"]] == [one["answer"] for one in found["answers"]]
    assert "seconds" not in printed["answers"][0]


def test_what_a_recipe_cannot_do_is_a_line_on_stderr(folder: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "name: mine\npasses:\n- vtw: {at: 1}\n- stride: {keep: 2, at: 2}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = run("apply", folder, "--image", folder / "picture.png", "--prompt", "w10", "--recipe", mine)
    [line] = [line for line in done.stderr.splitlines() if "Stride" in line]
    assert line.startswith("warning: recipe 'mine': Stride(keep=2, at=2, per='image') does nothing: an earlier pass")
