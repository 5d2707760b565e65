"""Kernels measured side by side; here without a GPU, at a tiny size."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vlmrewrite.bench import bench_kernels
from vlmrewrite.bench.kernels import harness as kernelbench
from vlmrewrite.bench.kernels.cases import Case, Setting
from vlmrewrite.cli.app import app
from vlmrewrite.ops.device import _installed, interpreted

CPU = torch.device("cpu")


def test_every_family_against_what_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    result = bench_kernels(CPU, sizes=["tiny"], batches=[1, 2], against=["reference", "library"], repeat=2)
    assert result["ceiling"]["copy"] > 0 and result["ceiling"]["matmul"] > 0
    assert result["no_triton"] is not None
    assert {row["kernel"] for row in result["rows"]} == set(kernelbench.FAMILIES)
    for row in result["rows"]:
        assert row["base"] == "reference" and len(row["samples"]["reference"]) == 2, row
        assert row["skipped"] in ({}, {"flex": "RuntimeError: no compiler"}), row
        assert all(error < 1e-5 for error in row["error"].values()), row
        assert row["milliseconds"]["reference"] > 0
        assert set(row["ratios"]) == set(row["milliseconds"]) - {"reference"}
        assert "of_copy" in row or "of_matmul" in row
    json.dumps(result)


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.skipif(not interpreted() or not _installed(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compute_what_their_references_do(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    from vlmrewrite.testing.triton.interpreter import trustworthy

    trustworthy()
    monkeypatch.setattr(kernelbench, "_missing", lambda _: None)
    monkeypatch.setattr(kernelbench, "_rounds", lambda calls, *_: {name: [1.0] for name in calls})
    result = bench_kernels(CPU, dtype, batches=[2], against=["reference"], repeat=1)
    for row in result["rows"]:
        assert not row["skipped"] and row["base"] == "triton", row
        assert row["error"]["triton"] < (1e-5 if dtype == torch.float32 else 2e-2), row


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_inductor_and_flex_take_part() -> None:
    result = bench_kernels(CPU, batches=[1], families=["decode"], repeat=1)
    [row] = result["rows"]
    assert not row["skipped"]
    assert set(row["milliseconds"]) == {"reference", "inductor", "sdpa, mask", "flex"}


def test_what_does_not_fit_or_fails_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("no\nsuch kernel")

    def cases(_: Setting) -> Any:
        yield Case("gather", "huge", {"reference": fails}, memory=2**60)
        yield Case("gather", "half", {"reference": lambda: lambda: torch.ones(3), "other": fails}, flops=10)

    def inputs(_: Setting) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(kernelbench.FAMILIES, "gather", (cases,))
    monkeypatch.setitem(kernelbench.FAMILIES, "decode", (inputs,))
    huge, half, inputs_row = bench_kernels(CPU, families=["gather", "decode"], batches=[1])["rows"]
    assert "1073741824.0 GiB" in huge["skipped"]["all"] and "milliseconds" not in huge
    assert half["skipped"] == {"other": "RuntimeError: no such kernel"} and half["flops_per_second"] > 0
    assert inputs_row["skipped"] == {"all": "OutOfMemoryError: CUDA out of memory"}


def test_wrong_names_and_numbers_are_refused() -> None:
    for wrong, message in (
        ({"sizes": ["huge"]}, "size: expected some of tiny, llava-1.5, .*, got huge"),
        ({"families": ["matmul"]}, "kernel: expected some of gather, .*, got matmul"),
        ({"against": ["jax"]}, "against: expected some of reference, inductor, library, got jax"),
        ({"repeat": 0}, "1 or more"),
        ({"batches": [0]}, "1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            bench_kernels(CPU, **wrong)  # type: ignore[arg-type]


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    options = "--kernel gather --against library --sizes tiny --rows 2 --repeat 1 --device cpu --dtype float16"
    done = CliRunner().invoke(app, ["bench", "--kernels", *options.split(), "--json", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert [row["case"] for row in result["rows"]] == ["select", "restore"]
    assert result["dtype"] == "float16" and result["rows"][0]["batch"] == 2
    for word in ("no Triton kernels", "ceiling: copy", "gather: select", "torch.gather"):
        assert word in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bench", "expected MODEL and --recipe, or --kernels"),
        ("bench model", "expected MODEL and --recipe, or --kernels"),
        ("bench model --kernels", "expected MODEL or --kernels, not both"),
        ("bench --kernels --recipe sts-64", "expected --kernels without --recipe"),
        ("bench model --recipe sts-64 --kernel gather", "expected --kernels with --kernel"),
        ("bench --kernels --kernel nothing", "kernel: expected some of"),
    ],
)
def test_command_refuses(options: str, message: str) -> None:
    done = CliRunner().invoke(app, options.split(), catch_exceptions=False)
    assert done.exit_code == 2 and message in done.stderr
