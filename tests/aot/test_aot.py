"""Every kernel compiles for GPUs, keeps its values in registers, and fits into shared memory.

``make aot`` compiles every configuration, which takes minutes, and keeps what came out in ``compiled.json``. As long as
that is of these very kernels, by this Triton, it is what is looked at; else each kernel is compiled anew, in the
configuration of its largest blocks.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from vlmrewrite.testing.triton import aot

FILES = sorted(map(str, (Path(__file__).parents[1] / "kernels").glob("cases_*.py")))
KEPT = Path(__file__).with_name("compiled.json")
TRITON = importlib.metadata.version("triton")
BY = f"Triton {TRITON}, Python {sys.version_info[0]}.{sys.version_info[1]}"
FAMILIES = sorted({case.partition(": ")[0] for case in aot.cases(FILES)})

BROKEN = """
import torch, triton, triton.language as tl

@triton.jit
def spilling_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(out + i, a - tl.sum(a, 0))

@triton.jit
def broken_kernel(x, n):
    for i in range(n):
        break

@triton.autotune([triton.Config({"N": 16}), triton.Config({"N": 32})], key=["n"])
@triton.jit
def fine_kernel(x, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + i, 0.0, mask=i < n)

def fine(n, rows=1):
    x = torch.empty(rows, n, device="meta")
    fine_kernel[lambda meta: (triton.cdiv(n, meta["N"]), rows)](x, n)

def spilling():
    x = torch.empty(2048, device="meta")
    spilling_kernel[(1,)](x, x, N=2048, num_warps=1, maxnreg=24)

def broken():
    broken_kernel[(1,)](torch.empty(1, device="meta"), 3)

def cases():
    return [("fine", lambda: fine(100)), ("grid", lambda: fine(100, 2**16)), ("spilling", spilling),
            ("broken", broken), ("none", lambda: None), ("raises", lambda: fine("x"))]
"""


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    output: Path
    errors: Path


def start(files: list[str], target: str, folder: Path, *more: str) -> Running:
    folder.mkdir(parents=True)
    output, errors = folder / "output", folder / "errors"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "vlmrewrite.testing.triton.aot", *files, "--target", target, "--json", *more]
    with output.open("wb") as out, errors.open("wb") as err:
        return Running(subprocess.Popen(command, env=env, stdout=out, stderr=err), output, errors)


def finish(running: Running) -> dict[str, list[dict[str, Any]]]:
    code = running.process.wait()
    assert code in (0, 1), running.errors.read_text()[-4000:]
    found = defaultdict(list)
    for line in running.output.read_text().splitlines():
        one = json.loads(line)
        found[one.pop("case")].append(one)
    return found


def digest() -> str:
    """Of all that decides what comes out: kernels, what launches them with what, and Triton; docstrings do not."""
    root = Path(__file__).parents[2]
    folders = [root / "vlmrewrite" / "kernels", *sorted(root.glob("passes/*/kernels"))]
    files = [*map(Path, FILES), Path(aot.__file__), *sorted(x for folder in folders for x in folder.rglob("*.py"))]
    said = hashlib.sha256(TRITON.encode())
    for file in files:
        code = ast.parse(file.read_text())
        for node in ast.walk(code):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        said.update(f"{file.name} {ast.dump(code)}".encode())
    return said.hexdigest()


def kept() -> dict[str, dict[str, list[dict[str, Any]]]] | None:
    """What an earlier run compiled in every configuration; None if it was of other kernels, or by another Triton."""
    made = json.loads(KEPT.read_text()) if KEPT.exists() else {"of": None}
    if made["of"] != digest():
        return None
    found: dict[str, dict[str, list[dict[str, Any]]]] = {target: defaultdict(list) for target in aot.TARGETS}
    for row in made["rows"]:
        found[row["target"]][row["case"]].append(row)
    return found


def keep(found: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    rows = [
        {"case": case, **{name: x for name, x in one.items() if name not in ("seconds", "error")}}
        for cases in found.values()
        for case, made in sorted(cases.items())
        for one in made
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    KEPT.write_text(f'{{"of": "{digest()}", "by": "{BY}", "rows": [\n{lines}\n]}}\n')


@pytest.fixture(scope="session")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[dict[str, dict[str, list[dict[str, Any]]]]]:
    every = pytestconfig.getoption("every_config")
    if not every and (found := kept()) is not None:
        yield found
        return
    folder = tmp_path_factory.mktemp("compiled")
    more = () if every else ("--largest",)
    running = {target: start(FILES, target, folder / target, *more) for target in aot.TARGETS}
    found = {target: finish(one) for target, one in running.items()}
    if every:
        keep(found)
    yield found


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_without_spills(compiled: dict[str, Any], family: str, target: str) -> None:
    found = compiled[target]
    cases = [case for case in aot.cases(FILES) if case.startswith(f"{family}: ")]
    assert cases
    wrong = []
    for case in cases:
        if not found[case]:
            wrong.append(f"{case}: nothing was compiled")
        for one in found[case]:
            what = f"{case}: {one['kernel']} [{one['config']}]"
            wrong += [f"{what}: {fault}" for fault in one["faults"]]
            tensor_cores = "attention_forward" in one["kernel"] and "bf16" in one["dtypes"] and target == "sm_90"
            if tensor_cores and "wgmma.mma_async" not in one["mma"]:
                wrong.append(f"{what}: uses {one['mma']}; expected wgmma")
    assert not wrong, "\n".join(wrong)


def test_what_is_kept_is_of_every_kernel_and_target() -> None:
    """Where kernels have changed since: ``make aot``, and commit what it writes."""
    made = json.loads(KEPT.read_text())
    rows = made["rows"]
    cases = {row["case"] for row in rows}
    assert {row["target"] for row in rows} == {*aot.TARGETS}
    assert {*aot.cases(FILES)} == cases
    if made["by"] == BY:  # Pythons write code as text in different ways
        assert made["of"] == digest(), "kernels have changed since, and each run of tests compiles them: make aot"


@pytest.mark.slow
def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    (tmp_path / "cases_broken.py").write_text(BROKEN)
    found = finish(start([str(tmp_path / "cases_broken.py")], "sm_90", tmp_path / "out"))
    faults = {case: [" ".join(x["faults"]) for x in made] for case, made in found.items()}
    assert faults["broken: fine"] == ["", ""]
    assert [x["config"].split(",")[0] for x in found["broken: fine"]] == ["N=16", "N=32"]
    assert all(x["registers"] > 0 and x["dtypes"] == ["fp32"] for x in found["broken: fine"])
    assert "a grid of (7, 65536)" in faults["broken: grid"][0]
    assert "spills" in faults["broken: spilling"][0]
    assert "unsupported AST node type: Break" in faults["broken: broken"][0]
    assert faults["broken: none"] == ["launched no kernel"]
    assert "TypeError" in faults["broken: raises"][0]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_nothing_is_compiled_in_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"), aot.dry_run():
        pass
