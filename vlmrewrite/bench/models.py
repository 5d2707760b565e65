"""Side-by-side measurements of a model with and without recipes, interleaved in one run."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmrewrite.api import applied, report
from vlmrewrite.capture import LIMIT
from vlmrewrite.compat import graphs_allowed
from vlmrewrite.hf import encode_images
from vlmrewrite.ops import Backend, resolve
from vlmrewrite.recipe import Recipe

UNMODIFIED = "unmodified"


@dataclass
class Row:
    """What was measured for one recipe.

    Attributes:
        name: the recipe, or ``"unmodified"``.
        prefill: seconds of each prefill (images encoded before), in order.
        decode: seconds per token of each decoding run, in order.
        peak_bytes: largest memory in use during prefill, beyond what was in use before it; None where unknown.
        kv_bytes: keys and values in the cache after prefill.
        flops: matmul FLOPs of the decoder layers' prefill; None for the unmodified model without a recipe beside it.
    """

    name: str
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    kv_bytes: int = 0
    flops: int | None = None


def bench(
    model: nn.Module,
    inputs: dict[str, Any],
    recipes: Sequence[Recipe],
    *,
    backend: Backend = "auto",
    repeat: int = 7,
    new_tokens: int = 16,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure prefill, decoding, memory and K/V bytes of the model and of each recipe, taking turns.

    Args:
        model: an unmodified model.
        inputs: what its forward takes, with an image.
        recipes: what to compare.
        backend: for all of them, the unmodified model too: under ``"inductor"`` prefill and decode steps of each are
            compiled, under ``"eager"`` none.
        repeat: counted rounds, after one that is not counted.
        new_tokens: tokens decoded, greedily, in each round.
        progress: called before each measurement with a description.

    Returns:
        device, settings, and for each row medians, all samples, and ratios against the unmodified model (above 1 is
        faster or smaller than unmodified).

    Raises:
        ValueError: fewer than one round or fewer than two tokens.
    """
    if repeat < 1 or new_tokens < 2:
        raise ValueError(f"expected repeat >= 1 and new_tokens >= 2, got {repeat} and {new_tokens}")
    with torch.no_grad():
        encoded = encode_images(model, dict(inputs))
    device = next(model.parameters()).device
    chosen = resolve(backend, device)
    rows = {UNMODIFIED: Row(UNMODIFIED)} | {r.name: Row(r.name) for r in recipes}
    for i in range(repeat + 1):
        for recipe in (None, *recipes):
            row = rows[UNMODIFIED if recipe is None else recipe.name]
            progress(f"round {i} of {repeat}: {row.name}")
            _round(model, encoded, recipe, row, rows[UNMODIFIED], chosen, new_tokens, counted=i > 0)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backend": chosen,
        "repeat": repeat,
        "new_tokens": new_tokens,
        "rows": [_summary(row, rows[UNMODIFIED]) for row in rows.values()],
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or what the platform calls its processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _round(
    model: nn.Module,
    inputs: dict[str, Any],
    recipe: Recipe | None,
    row: Row,
    plain: Row,
    backend: Backend,
    new_tokens: int,
    counted: bool,
) -> None:
    chosen = contextlib.nullcontext(model) if recipe is None else applied(model, recipe, backend=backend)
    # Inductor gives up on a model that has had too many graphs, without a word; that would be no comparison.
    with chosen, torch.no_grad(), graphs_allowed(LIMIT):
        forward: Any = torch.compile(model, dynamic=True) if recipe is None and backend == "inductor" else model
        _steps(forward, inputs, 3)  # applying starts anew: rewrite and compile before timing
        before = memory_reset()
        begun = _now()
        out = forward(**inputs, use_cache=True, logits_to_keep=1)
        prefill = _now() - begun
        peak = memory_peak(before)
        cache = out.past_key_values
        row.kv_bytes = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        if recipe is not None:
            totals = report(model).totals
            row.flops, plain.flops = totals["after"]["flops"], totals["before"]["flops"]
        step = _next_inputs(inputs, out)
        begun = _now()
        _steps(forward, step, new_tokens, cache)
        decode = (_now() - begun) / new_tokens
    if counted:
        row.prefill.append(prefill)
        row.decode.append(decode)
        row.peak_bytes = peak if row.peak_bytes is None or peak is None else max(peak, row.peak_bytes)


def _steps(forward: Any, step: dict[str, Any], n: int, cache: Any = None) -> None:
    """Run ``n`` forwards, each of the greedy token of the last one, which the host looks at, as generate() does."""
    for _ in range(n):
        out = forward(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = out.past_key_values, _next_inputs(step, out)
        step["input_ids"].tolist()


def _next_inputs(inputs: dict[str, Any], out: Any) -> dict[str, Any]:
    """One greedy token more."""
    step: dict[str, Any] = {"input_ids": out.logits[:, -1].argmax(-1, keepdim=True)}
    if inputs.get("attention_mask") is not None:
        mask = inputs["attention_mask"]
        step["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    if inputs.get("position_ids") is not None:
        step["position_ids"] = inputs["position_ids"][..., -1:] + 1
    return step


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_reset() -> int | None:
    """Start to watch for the largest memory in use; returns what is in use now, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def memory_peak(before: int | None) -> int | None:
    """Bytes that were in use at most since :func:`memory_reset`, beyond what it returned; None where unknown."""
    if before is None:
        return None
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")) - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _summary(row: Row, plain: Row) -> dict[str, Any]:
    prefill, decode = statistics.median(row.prefill), statistics.median(row.decode)
    out: dict[str, Any] = asdict(row) | {
        "prefill_median": prefill,
        "decode_tokens_per_second": 1 / decode,
        "prefill_speedup": statistics.median(plain.prefill) / prefill,
        "decode_speedup": statistics.median(plain.decode) / decode,
        "kv_ratio": plain.kv_bytes / row.kv_bytes,
    }
    if row.flops and plain.flops:
        out["flop_ratio"] = plain.flops / row.flops
        out["prefill_speedup_of_flop_ratio"] = out["prefill_speedup"] / out["flop_ratio"]
    return out
