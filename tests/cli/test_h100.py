"""The end-to-end measurement for a GPU runs, on tiny models, without one."""

import json
from pathlib import Path

import pytest

from tests import scripts

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_dry(tmp_path: Path) -> None:
    options = ["--dry", "--model", "llava-next-7b", "--batch", "2", "--new-tokens", "2"]
    printed = scripts.run(EXAMPLES, "h100.py", *options, "--json", tmp_path / "out.json")
    [run] = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in run["rows"]] == ["unmodified", "sts-64", "visor-cross"]
    for row in run["rows"][1:]:
        assert row["flop_ratio"] > 1
        said = run["predicted"][row["name"]]
        assert said["kv"][1] == row["kv_bytes"] and said["peak"][1] < said["peak"][0]
    said = [check["what"].partition(": ")[2] for check in run["checks"] if check["what"].startswith("sts-64")]
    for what in ("K/V bytes with it", "decoding, times unmodified", "sampling, of its prefill"):
        assert any(what in line for line in said)
    assert "K/V bytes with it, as the report says" in printed and "FALLS SHORT" not in printed
