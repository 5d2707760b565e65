"""Stored measurements, and what compares two of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import host, running, selection
from benchmarks.compare import main, read
from benchmarks.run import PLANS
from benchmarks.table import table
from vlmrewrite.bench.rows import Row, spread, summary
from vlmrewrite.recipe import shipped_recipes

ROOT = Path(__file__).parents[2]
STORED = sorted((ROOT / "benchmarks").glob("*.json"))


def run(**samples: list[float]) -> dict[str, Any]:
    """What a measurement of recipes tells whose prefills took so long, in units of the unmodified model's."""
    plain = Row("unmodified", [1.0] * 3, [0.1] * 3, [1.0] * 3, [0.1] * 3, kv_bytes=100, flops=100)
    rows = [
        plain,
        *(Row(n.replace("_", "-"), x, [0.1] * 3, x, [0.1] * 3, kv_bytes=50, flops=50) for n, x in samples.items()),
    ]
    told = [summary(row, plain, "process") for row in rows]
    settings = {"model": "m", "prompt": "p", "dtype": "float32", "backend": "eager", "clock": "process", "repeat": 3}
    return settings | {"rows": told}


def compared(tmp_path: Path, before: Any, after: Any, *options: str) -> int:
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, found in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(found))
    return main([*map(str, paths), *options])


def test_what_a_row_tells() -> None:
    told = run(half=[0.5, 0.6, 0.4])["rows"][1]
    assert told["prefill_ratios"] == pytest.approx([2.0, 1 / 0.6, 2.5])
    assert told["prefill_speedup"] == pytest.approx(2.0)
    assert (told["kv_ratio"], told["flop_ratio"], told["prefill_speedup_of_flop_ratio"]) == pytest.approx((2, 2, 1))
    assert told["prefill_spread"] == pytest.approx(0.2)
    assert spread([3.0, 1.0, 2.0]) == 0.5


def test_the_clock_that_ratios_go_by() -> None:
    plain, row = (
        Row("unmodified", [4.0], [1.0], [1.0], [1.0], kv_bytes=1),
        Row("a", [1.0], [1.0], [0.5], [1.0], kv_bytes=1),
    )
    assert summary(row, plain, "wall")["prefill_speedup"] == 4.0
    assert summary(row, plain, "process")["prefill_speedup"] == 2.0


@pytest.mark.parametrize(
    ("after", "status", "said"),
    [
        ([0.50, 0.51, 0.49], 0, "2 compared: 0 slower, 0 faster"),
        ([0.60, 0.61, 0.59], 1, " 20.0% slower: m, p, half, prefill: 0.500 ± 0.010 -> 0.600 ± 0.010 of the unmod"),
        ([0.40, 0.41, 0.39], 0, " 20.0% faster: m, p, half, prefill"),
        ([0.60, 0.90, 0.40], 0, "2 compared: 0 slower, 0 faster"),  # it is within the second run's own noise
        ([0.512, 0.512, 0.512], 0, "2 compared: 0 slower, 0 faster"),  # beyond the noise, and too small to be told
    ],
)
def test_what_got_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: list[float], status: int, said: str
) -> None:
    assert compared(tmp_path, run(half=[0.5, 0.51, 0.49]), [run(half=after)]) == status
    assert said in capsys.readouterr().out


def test_one_round_does_not_tell_the_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = run(half=[0.5] * 3), run(half=[0.9] * 3)
    assert compared(tmp_path, before, after) == 1
    for phase in ("prefill", "decode"):
        after["rows"][1][f"{phase}_ratios"] = after["rows"][1][f"{phase}_ratios"][:1]
    assert compared(tmp_path, before, after) == 0
    assert "2 of them were measured in one round" in capsys.readouterr().out


def test_what_is_told_at_least(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = run(half=[0.5] * 3), run(half=[0.51] * 3)
    assert compared(tmp_path, before, after) == 0
    assert compared(tmp_path, before, after, "--least", "0.01") == 1
    assert "2.0% slower" in capsys.readouterr().out


def test_files_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run(half=[0.5] * 3)
    other = copy.deepcopy(one) | {"prompt": "q"}
    for before, after, reason in (
        (one, other, "the files have no setting and recipe in common"),
        (one, {"rows": []}, "after.json: expected what vlmrewrite bench --json writes, it has no model"),
        (one, [3], "after.json: expected what vlmrewrite bench --json writes, it has no model"),
    ):
        assert compared(tmp_path, before, after) == 2
        assert reason in capsys.readouterr().err
    (tmp_path / "none.json").write_text("{")
    for name in ("none.json", "absent.json"):
        with pytest.raises(ValueError, match=rf"{name}: expected a file that vlmrewrite bench --json wrote: "):
            read(tmp_path / name)


def test_the_table() -> None:
    found = run(half=[0.5] * 3, none=[1.0] * 3, alone=[0.5] * 3)
    half, none, alone = found["rows"][1:]
    half["native"] = {"prefill_efficiency": 0.97, "decode_efficiency": 1.0}
    none["passes_refused"], alone["native"] = ["because"], {"refused": "because"}
    lines = table(found).splitlines()
    assert lines[0] == "### m, p"
    assert "| `half` | × 2.00 | 1.00 | 0.97 | × 1.00 | 1.00 | ÷ 2.00 |" in lines
    assert "| `none` | refused here | | | | | |" in lines
    assert "| `alone` | × 2.00 | 1.00 | none | × 1.00 | none | ÷ 2.00 |" in lines


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
def test_stored_measurements_are_whole(path: Path) -> None:
    recipes = ["unmodified", *(name for name, recipe in shipped_recipes().items() if not recipe.sets_processor)]
    for found in read(path):
        assert [row["name"] for row in found["rows"]] == recipes
        assert table(found)
    assert main([str(path), str(path)]) == 0


def test_the_page_shows_what_is_stored() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert STORED
    for path in STORED:
        for found in read(path):
            assert table(found) in page, f"{path.name}: python -m benchmarks.table makes the tables of the page"


@pytest.mark.parametrize("plan", PLANS)
def test_settings_can_be_built(plan: str) -> None:
    for setting in PLANS[plan]:
        config = setting.config()
        text = config.text_config
        assert (text.num_hidden_layers, text.hidden_size) == (setting.layers, setting.hidden)
        assert text.num_attention_heads * text.head_dim == text.hidden_size


@pytest.mark.slow
def test_what_the_host_does_is_told_by_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    host.main(["--recipe", "stride-half", "--layers", "2", "--rounds", "1", "--steps", "1"])
    *_, row = capsys.readouterr().out.splitlines()
    name, *numbers = row.split()
    assert name == "stride-half"
    assert len([float(x) for x in numbers]) == 4


def test_what_is_beyond_is_the_least_and_the_median_of_each_call() -> None:
    ours, plain = [[3.0, 5.0], [9.0, 4.0], [4.0, 6.0]], [[1.0, 1.0], [1.0, 3.0], [2.0, 2.0]]
    assert host.beyond(ours, plain) == (3.5 - 1.0, 4.5 - 1.5)


@pytest.mark.slow
def test_a_running_start_is_told_of_all_calls_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    running.main(["--layers", "2", "--rows", "4", "--image-tokens", "16", "--hidden", "64", "--calls", "3"])
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[2:]]
    assert [name for name, *_ in rows] == ["0", "running"]
    assert all(float(x) > 0 for _, *numbers in rows for x in numbers)


@pytest.mark.slow
def test_what_selection_takes_is_a_part_of_a_prefill(capsys: pytest.CaptureFixture[str]) -> None:
    selection.main(["--layers", "2", "--image-tokens", "64", "--hidden", "64", "--calls", "1", "--recipe", "sts-half"])
    name, whole, _, part, _, share = capsys.readouterr().out.splitlines()[-1].split()
    assert name == "sts-half"
    assert 0 < float(part) < float(whole)
    assert share.endswith("%")
