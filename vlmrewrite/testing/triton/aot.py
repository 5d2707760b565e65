"""Compile the kernels that launchers would launch, for GPUs that are not there.

``python -m vlmrewrite.testing.triton.aot tests/kernels/cases_*.py --target sm_90`` runs the launchers of all cases on
meta tensors, compiles each kernel in each configuration that is left after pruning, and prints registers, spills and
shared memory. Needs ptxas, which Triton brings along, and no ``TRITON_INTERPRET`` in the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from vlmrewrite.ops import interpreted

SM80, SM90 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)

TARGETS = {"sm_80": SM80, "sm_90": SM90}

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may use."""

GRID = (2**31 - 1, 65535, 65535)
"""The most programs in each dimension of a grid."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration.

    Attributes:
        config: the autotuner's choice, or None if there is none.
        dtypes: of the tensors, as Triton writes them.
        registers: per thread; ptxas says 32 where nearly everything is spilled.
        spill_stores, spill_loads: bytes per thread.
        shared: bytes of shared memory per program.
        mma: the kinds of tensor core instructions in the PTX.
        error: why it was not compiled, or could not be launched.
    """

    kernel: str
    config: str | None
    target: str
    dtypes: tuple[str, ...] = ()
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    mma: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str | None = None

    def faults(self) -> list[str]:
        """What makes it unfit for use."""
        found = [] if self.error is None else [self.error]
        if self.spill_stores or self.spill_loads:
            found.append(f"spills: {self.spill_stores} bytes of stores, {self.spill_loads} bytes of loads")
        limit = SHARED[int(self.target.removeprefix("sm_"))]
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory; expected at most {limit}")
        return found


class _Driver:
    """As much of a driver as compiling needs. Each target is a device of its own, so that caches tell them apart."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return -int(self.target.arch)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextlib.contextmanager
def dry_run(target: GPUTarget = SM90, largest: bool = False) -> Iterator[list[Compiled]]:
    """Within it, launching a kernel compiles it for ``target``, in all configurations, and runs nothing.

    Tensors may be on any device, meta among them. What is compiled is cached on disk beside what Triton caches.

    Args:
        target: the GPU.
        largest: compile only the configuration of the largest blocks, stages counted: it needs the most shared memory.

    Yields:
        A list that grows by one entry for each kernel and configuration; an exception of the compiler is an entry too.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET=1``, where nothing is compiled.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set, so kernels are interpreted; expected it unset")
    log: list[Compiled] = []
    run, tune, assemble = JITFunction.run, Autotuner.run, CUDABackend.make_cubin
    active = triton.runtime.driver._active
    config: list[str | None] = [None]

    def make_cubin(self: Any, src: Any, metadata: dict[str, Any], *args: Any) -> bytes:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            cubin: bytes = assemble(self, src, metadata, *args)
        metadata["ptxas"] = said.getvalue()  # kept with the cubin in the cache
        return cubin

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        name, began = self.fn.__name__, time.perf_counter()
        try:
            _check_grid(grid, dict(zip(self.arg_names, args, strict=False)) | kwargs)
            made = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            log.append(Compiled(name, config[0], f"sm_{target.arch}", error=f"{type(error).__name__}: {error}"))
            return None
        found = _read(made, name, config[0], f"sm_{target.arch}", time.perf_counter() - began)
        if found not in log:
            log.append(found)
        return made

    def all_configs(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs, made = dict(zip(self.arg_names, args, strict=False)), None
        choices = self.prune_configs(kwargs)
        for choice in [max(choices, key=_size)] if largest else choices:
            config[0] = ", ".join(f"{k}={v}" for k, v in choice.all_kwargs().items())
            made = self.fn.run(*args, **kwargs, **choice.all_kwargs())
        self.nargs = config[0] = None
        return made

    JITFunction.run, Autotuner.run, CUDABackend.make_cubin = compile_only, all_configs, make_cubin
    triton.runtime.driver._active = _Driver(target)
    try:
        with triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
            triton.knobs.cache.dir = os.path.join(triton.knobs.cache.dir, "dry_run")
            triton.knobs.nvidia.dump_ptxas_log = True
            yield log
    finally:
        JITFunction.run, Autotuner.run, CUDABackend.make_cubin = run, tune, assemble
        triton.runtime.driver._active = active


def _size(choice: triton.Config) -> int:
    return int(choice.num_stages) * math.prod(n for n in choice.kwargs.values() if type(n) is int and n > 0)


def _check_grid(grid: Any, named: dict[str, Any]) -> None:
    sizes = tuple(grid(named) if callable(grid) else grid)
    if not 1 <= len(sizes) <= 3 or any(not 0 < n <= most for n, most in zip(sizes, GRID, strict=False)):
        raise ValueError(f"a grid of {sizes}; expected 1 or more programs, at most {GRID}")


def _read(made: Any, kernel: str, config: str | None, target: str, seconds: float) -> Compiled:
    said, ptx = made.metadata.ptxas, made.asm["ptx"]

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, said)))

    return Compiled(
        kernel,
        config,
        target,
        dtypes=tuple(sorted({x[1:] for x in made.src.signature.values() if str(x).startswith("*")})),
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        shared=made.metadata.shared,
        mma=tuple(sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync)", ptx)))),
        seconds=round(seconds, 2),
    )


def cases(files: Iterable[str | Path]) -> dict[str, Callable[[], object]]:
    """The cases of files that define ``cases() -> [(name, call), ...]``, by ``"<family>: <name>"``."""
    found: dict[str, Callable[[], object]] = {}
    for file in map(Path, files):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, call in module.cases():
            found[f"{file.stem.removeprefix('cases_')}: {name}"] = call
    return found


def compiled(
    calls: dict[str, Callable[[], object]], target: GPUTarget, largest: bool = False
) -> Iterator[tuple[str, list[Compiled]]]:
    """Run cases in a dry run; for each its name and what it compiled, or the error that ended it."""
    for name, call in calls.items():
        with dry_run(target, largest) as log:
            try:
                call()
            except Exception as error:
                log.append(Compiled("launcher", None, f"sm_{target.arch}", error=f"{type(error).__name__}: {error}"))
            if not log:
                log.append(Compiled("launcher", None, f"sm_{target.arch}", error="launched no kernel"))
        yield name, log


def main() -> int:
    """Print what the cases of some files compile to; exit status 1 if something spills, does not fit, or fails."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("files", nargs="+", metavar="CASES.py", help="files with a function cases()")
    parser.add_argument("--target", choices=sorted(TARGETS), default="sm_90")
    parser.add_argument("--largest", action="store_true", help="only each kernel's configuration of the largest blocks")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    faults = 0
    for case, log in compiled(cases(options.files), TARGETS[options.target], options.largest):
        for one in log:
            faults += bool(one.faults())
            if options.json:
                print(json.dumps({"case": case, **dataclasses.asdict(one), "faults": one.faults()}), flush=True)
                continue
            sizes = (
                f"{one.registers:4} registers {one.shared:7} shared {one.spill_stores:6} spilled {one.seconds:6.2f} s"
            )
            print(f"{sizes}  {case}  {one.kernel} {one.config or ''} {' '.join(one.mma)}", flush=True)
            for fault in one.faults():
                print(f"    {fault}", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
