"""Each kernel against its reference, the same compiled by Inductor, and PyTorch's own alternatives, in one run."""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmrewrite import ops
from vlmrewrite.bench.kernels.attention import attention, decode, gather, restore
from vlmrewrite.bench.kernels.cases import SAMPLED, SIZES, Case, Setting
from vlmrewrite.bench.kernels.selection import regions, sample, score
from vlmrewrite.bench.models import device_name
from vlmrewrite.compat import gpu_sleep, graphs_allowed, tree_leaves

FAMILIES: dict[str, tuple[Callable[[Setting], Iterator[Case]], ...]] = {
    "gather": (gather, restore),
    "attention": (attention,),
    "decode": (decode,),
    "score": (score,),
    "sample": (sample,),
    "regions": (regions,),
}
"""What makes the cases of each family of kernels."""

KINDS = ("reference", "inductor", "library")
"""What a kernel can be compared with."""

PATIENCE = 20.0
"""Seconds that the counted rounds of one case may take; at least one is made."""

FLUSHED = 2**28
"""Bytes written before each measurement on a GPU, so that nothing is found in its caches."""


def bench_kernels(
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    sizes: Sequence[str] = (),
    batches: Sequence[int] = (1, 8),
    families: Sequence[str] = (),
    against: Sequence[str] = KINDS,
    repeat: int = 7,
    sampled: int = SAMPLED,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure kernels and their alternatives, taking turns.

    Args:
        device: where; on a CPU there are no Triton kernels, and alternatives are compared with the reference.
        dtype: of the inputs; by default bf16 on a GPU, fp32 elsewhere.
        sizes: names in :data:`.cases.SIZES`; by default all real ones on a GPU, ``"tiny"`` elsewhere.
        batches: rows.
        families: names in :data:`FAMILIES`; by default all.
        against: of :data:`KINDS`.
        repeat: counted rounds, after one that is not counted; fewer for what takes longer than :data:`PATIENCE`.
        sampled: vision tokens that sampling chooses of an image, at most a third of them.
        progress: called with a description before each step: preparing a contender of a case (which compiles it), and
            measuring all that could be prepared.

    Returns:
        device, versions, settings, the ceilings of the device, and a row for each case: median milliseconds and the
        samples of each contender, ratios of their times to the base's (above 1: slower than the base, which is the
        Triton kernel where it runs), error against the reference, the base's rates, and what was skipped and why.

    Raises:
        ValueError: an unknown name, or no round.
    """
    on_gpu = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    real = [name for name in SIZES if name != "tiny"]
    chosen = list(sizes) or (real if on_gpu else ["tiny"])
    kinds = list(families) or list(FAMILIES)
    _known("size", chosen, SIZES)
    _known("kernel", kinds, FAMILIES)
    _known("against", against, KINDS)
    if repeat < 1 or sampled < 1 or not all(b > 0 for b in batches):
        raise ValueError(
            f"expected repeat, sampled and batches of 1 or more, got {repeat}, {sampled} and {list(batches)}"
        )
    missing = _missing(device)
    progress("ceilings of the device")
    ceiling = _ceilings(device, dtype)
    rows = []
    for name in chosen:
        for batch in batches:
            for family in kinds:
                setting = Setting(SIZES[name], batch, device, dtype, sampled)
                rows += _family(family, setting, missing, against, repeat, ceiling, progress)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": None if missing == "triton is not installed" else importlib.import_module("triton").__version__,
        "no_triton": missing,
        "dtype": str(dtype).removeprefix("torch."),
        "repeat": repeat,
        "ceiling": ceiling,
        "rows": rows,
    }


def _missing(device: torch.device) -> str | None:
    """Why there are no Triton kernels to measure, or None."""
    if ops.interpreted():
        return "TRITON_INTERPRET=1 is set, and the interpreter's time says nothing"
    return ops.kernels_missing(device)


def _known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{what}: expected some of {', '.join(known)}, got {', '.join(unknown)}")


def _family(
    family: str,
    setting: Setting,
    missing: str | None,
    against: Sequence[str],
    repeat: int,
    ceiling: dict[str, float],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    where = {"kernel": family, "size": setting.size.name, "tokens": setting.size.tokens, "batch": setting.batch}
    rows: list[dict[str, Any]] = []
    try:
        for make in FAMILIES[family]:
            for case in make(setting):
                about = f"{family}: {case.name}, {setting.size.name}, batch {setting.batch}: "
                told = functools.partial(_told, progress, about)
                rows.append(where | _case(case, setting.device, missing, against, repeat, ceiling, told))
                del case  # its inputs, before the next one's are made
    except RuntimeError as e:
        rows.append(where | {"case": None, "skipped": {"all": _line(e)}})
    return rows


def _told(progress: Callable[[str], None], about: str, step: str) -> None:
    progress(about + step)


def _case(
    case: Case,
    device: torch.device,
    missing: str | None,
    against: Sequence[str],
    repeat: int,
    ceiling: dict[str, float],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "skipped": {}}
    free = _free(device)
    if case.memory > free:
        row["skipped"]["all"] = f"takes about {case.memory / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"
        return row
    if missing is None and "triton" not in case.contenders:
        row["skipped"]["triton"] = "has no kernel"
    torch.compiler.reset()
    with torch.no_grad(), graphs_allowed(64):
        calls, row["error"] = _prepare(case, missing, against, row["skipped"], progress)
        progress(f"measuring {', '.join(calls) or 'nothing'}")
        samples = _rounds(calls, device, repeat, row["skipped"])
    if not samples:
        return row
    base = "triton" if "triton" in samples else next(iter(samples))
    seconds = {name: statistics.median(times) for name, times in samples.items()}
    pairs = {name: [t / b for t, b in zip(times, samples[base], strict=True)] for name, times in samples.items()}
    row |= {
        "milliseconds": {name: 1e3 * t for name, t in seconds.items()},
        "base": base,
        "ratios": {name: statistics.median(x) for name, x in pairs.items() if name != base},
        "samples": samples,
    }
    for what, done, most in (("bytes", case.bytes, "copy"), ("flops", case.flops, "matmul")):
        if done:
            row[what] = done
            row[f"{what}_per_second"] = done / seconds[base]
            row[f"of_{most}"] = done / seconds[base] / ceiling[most]
    return row


def _prepare(
    case: Case, missing: str | None, against: Sequence[str], skipped: dict[str, str], progress: Callable[[str], None]
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """The calls that work, each made once, and how far their results are from the reference's."""
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    expected: Any = None
    for name in sorted(case.contenders, key=lambda n: n != "reference"):
        kind = name if name in ("triton", "reference", "inductor") else "library"
        if (missing is not None) if kind == "triton" else (kind not in against and kind != "reference"):
            continue
        progress(f"preparing {name}")
        try:
            calls[name] = case.contenders[name]()
            out = calls[name]()
            if name == "reference":
                expected = out
            elif expected is not None:
                errors[name] = _error(out, expected)
        except Exception as e:  # whatever a library raises for a size or device that it does not take
            calls.pop(name, None)
            skipped[name] = _line(e)
    if "reference" not in against and len(calls) > 1:
        calls.pop("reference", None)
    return calls, errors


def _line(e: Exception) -> str:
    return f"{type(e).__name__}: " + " ".join(str(e).split())[:300]


def _error(out: Any, expected: Any) -> float:
    """The largest difference in units of the largest number; of masks, the share that differs."""

    def one(a: Tensor, b: Tensor) -> float:
        if not b.numel():
            return 0.0
        if b.dtype == torch.bool:
            return float((a != b).float().mean())
        return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30))

    return max(one(a, b) for a, b in zip(tree_leaves(out), tree_leaves(expected), strict=True))


def _rounds(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeat: int, skipped: dict[str, str]
) -> dict[str, list[float]]:
    """Seconds of each call, taking turns; what fails in between is left out, and noted."""
    trash = torch.empty(FLUSHED, dtype=torch.int8, device=device) if device.type == "cuda" else None
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for i in range(repeat + 1):
        if i == 1:
            begun = time.perf_counter()
        elif i > 1 and time.perf_counter() - begun > PATIENCE:
            break
        for name in list(samples):
            try:
                seconds = _seconds(calls[name], trash)
            except Exception as e:  # as in _prepare; out of memory by then, say
                del samples[name]
                skipped[name] = _line(e)
                continue
            if i:
                samples[name].append(seconds)
    return samples


AHEAD = 4_000_000
"""Cycles for which the GPU does nothing, about 2 ms, while the host queues what is measured."""


def _seconds(call: Callable[[], Any], trash: Tensor | None) -> float:
    if trash is None:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    trash.zero_()
    gpu_sleep(AHEAD)
    start.record()
    call()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def _ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and FLOPs per second of a matrix product; the best of several."""
    big = device.type == "cuda"
    source = torch.ones(2**30 if big else 2**26, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    n = 8192 if big else 512
    a = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    found = _rounds({"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, a, out=out)}, device, 5, {})
    return {"copy": 2 * source.numel() / min(found["copy"]), "matmul": 2 * n**3 / min(found["matmul"])}


def _free(device: torch.device) -> float:
    """Bytes that may be taken."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(512.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
