"""Side-by-side measurements of a model with and without recipes, interleaved in one run."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.api import applied, processor_set, report, resumed
from vlmrewrite.bench.clock import peak_of, set_apart, uncollected
from vlmrewrite.bench.native import NativeLoop
from vlmrewrite.bench.rows import UNMODIFIED, Row, summary
from vlmrewrite.capture import LIMIT
from vlmrewrite.clock import Clock, clock_of, now
from vlmrewrite.compat import graphs_allowed
from vlmrewrite.hf import encode_images, refuse_smaller
from vlmrewrite.ops import Backend, resolve
from vlmrewrite.recipe import Recipe
from vlmrewrite.report import captured
from vlmrewrite.runtime import Session, session_of

__all__ = ["UNMODIFIED", "Row", "bench", "device_name"]


def bench(
    model: nn.Module,
    inputs: dict[str, Any],
    recipes: Sequence[Recipe],
    *,
    backend: Backend = "auto",
    repeat: int = 7,
    new_tokens: int = 16,
    native: bool = False,
    others: Mapping[str, dict[str, Any]] = MappingProxyType({}),
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
        native: also measure, behind each recipe, a hand-written eager loop over the model's own layers on the tokens
            that the recipe kept: see :class:`vlmrewrite.bench.native.NativeLoop`. Its logits are held against the
            recipe's, in the round that is not counted.
        others: for each recipe that sets the processor, by its name, what stands for ``inputs``: the same prompt and
            images, by the processor that ``recipe.processor`` gives.
        progress: called before each measurement with a description.

    Returns:
        device, settings, and for each row medians, all samples, and ratios, each the median over the rounds. Speed-ups
        are against the unmodified model (above 1 is faster or smaller than unmodified); a row's ``"native"`` holds
        the loop's samples and ``prefill_efficiency`` and ``decode_efficiency``, its time by that of the recipe, or
        ``"refused"``, the reason why there is none. ``"clock"`` says by which seconds the ratios go.

    Raises:
        ValueError: fewer than one round or fewer than two tokens; a native loop beside a compiled model; or a recipe
            that sets the processor has no inputs in ``others``, or has some that the model does not take.
    """
    if repeat < 1 or new_tokens < 2:
        raise ValueError(f"expected repeat >= 1 and new_tokens >= 2, got {repeat} and {new_tokens}")
    device = next(model.parameters()).device
    chosen = resolve(backend, device)
    if native and chosen != "eager":
        raise ValueError(f"native=True measures an eager loop; expected backend='eager', got {chosen!r}")
    if lacking := [r.name for r in recipes if r.sets_processor and r.name not in others]:
        raise ValueError(
            f"recipe {lacking[0]!r} makes pictures smaller: expected others={{{lacking[0]!r}: its inputs}}"
        )
    for smaller in others.values():
        refuse_smaller(model, smaller)
    with torch.no_grad():
        encoded, *rest = (encode_images(model, dict(x)) for x in (inputs, *others.values()))
    apart = dict(zip(others, rest, strict=True))
    subjects = [_Subject(model, encoded, Row(UNMODIFIED), chosen)]
    for recipe in recipes:
        with processor_set(), applied(model, recipe, backend=chosen):
            session = session_of(model)
        given = apart.get(recipe.name, encoded)
        subjects.append(_Subject(model, given, Row(recipe.name), chosen, session, native=native))
    # Inductor gives up on a model that has had too many graphs, without a word; that would be no comparison.
    with torch.no_grad(), graphs_allowed(LIMIT):
        for subject in subjects:
            progress(f"round 0 of {repeat}: {subject.row.name}")
            subject.first()
        with set_apart():
            for i in range(1, repeat + 1):
                for subject in subjects:
                    progress(f"round {i} of {repeat}: {subject.row.name}")
                    subject.measure(new_tokens)
    clock, plain = clock_of(device), subjects[0].row
    plain.flops = next((s.row.flops_before for s in subjects if s.row.flops_before and s.inputs is encoded), None)
    if apart and plain.flops is None:
        plain.flops = _flops(model, inputs)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backend": chosen,
        "repeat": repeat,
        "new_tokens": new_tokens,
        "clock": clock,
        "rows": [s.summary(plain, clock) for s in subjects],
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or what the platform calls its processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _flops(model: Any, inputs: dict[str, Any]) -> int:
    """Matmul FLOPs of the unmodified decoder layers' prefill."""
    with torch.no_grad():
        [program] = captured(model, dict(inputs))
    assert program.call is not None
    return sum(c.flops for c in program.costs(program.call.counts))


@dataclass
class _Subject:
    """What is measured: the model as it is, or under a recipe, with the native loop behind it."""

    model: Any
    inputs: dict[str, Any]
    row: Row
    backend: str
    session: Session | None = None
    native: bool = False
    loop: NativeLoop | None = None
    loop_row: Row | None = None
    compiled: Any = None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Any]:
        """While the block runs, the model does it; what it yields is its forward."""
        if self.session is None:
            if self.compiled is None and self.backend != "eager":
                self.compiled = torch.compile(self.model, dynamic=True)
            yield self.model if self.compiled is None else self.compiled
            return
        with resumed(self.model, self.session):
            yield self.model

    def first(self) -> None:
        """The round that is not counted: all is made that a call needs; the native loop is made and checked."""
        with self.at_work() as forward:
            begun = now()
            _logits(forward, self.inputs, 1)
            self.row.first = now().since(begun).wall
            for _ in range(0 if self.session is None else self.session.unlearned):
                _logits(forward, self.inputs, 1)  # calls that only learn where to start are no measure of others
            seen = _logits(forward, self.inputs, 3)
            self.row.peak_bytes = _peak(forward, self.inputs, self.model.device)
            if self.session is None:
                return
            said = report(self.model)
            self.row.passes_refused = [f"{x['configuration']}: {x['reason']}" for x in said.passes if x["reason"]]
            totals = said.totals
            self.row.flops, self.row.flops_before = totals["after"]["flops"], totals["before"]["flops"]
            if not self.native:
                return
            try:
                self.loop = NativeLoop(self.model)
            except ValueError as e:
                self.row.refused = str(e)
                return
        with self.loop.in_place() as forward:
            told = _logits(forward, self.inputs, len(seen), [x.argmax(-1, keepdim=True) for x in seen])
            peak = _peak(forward, self.inputs, self.model.device)
        error, most = max(map(_apart, seen, told)), max(float(x.abs().max()) for x in seen)
        self.loop_row, allowed = (
            Row(self.row.name, error=error, peak_bytes=peak),
            torch.finfo(seen[0].dtype).eps ** 0.5 * most,
        )
        if not error <= allowed:
            self.row.refused = (
                f"its logits are {error:.3g} away from the recipe's, {allowed:.3g} would be rounding: the loop does not"
                " do what this model's layers do"
            )
            self.loop = None

    def measure(self, new_tokens: int) -> None:
        """A counted round."""
        with self.at_work() as forward, uncollected():
            if self.backend != "eager":
                _logits(forward, self.inputs, 3)  # what another one compiled may have come in between
            _measured(forward, self.inputs, self.row, new_tokens)
        if self.loop is not None and self.loop_row is not None:
            with self.loop.in_place() as forward, uncollected():
                _measured(forward, self.inputs, self.loop_row, new_tokens)

    def summary(self, plain: Row, clock: Clock) -> dict[str, Any]:
        """What is told of it, see :func:`bench`."""
        told = summary(self.row, plain, clock)
        if self.row.refused is not None:
            return told | {"native": {"refused": self.row.refused}}
        if self.loop_row is None:
            return told
        loop = summary(self.loop_row, self.row, clock)
        for phase in ("prefill", "decode"):
            ratios = [1 / x for x in loop.pop(f"{phase}_ratios")]
            loop[f"{phase}_efficiency_ratios"], loop[f"{phase}_efficiency"] = ratios, median(ratios)
            del loop[f"{phase}_speedup"]
        return told | {"native": loop | {"max_logit_error": self.loop_row.error}}


def _measured(forward: Any, inputs: dict[str, Any], row: Row, new_tokens: int) -> None:
    begun = now()
    out = forward(**inputs, past_key_values=None, use_cache=True, logits_to_keep=1)
    prefill = now().since(begun)
    cache, step = out.past_key_values, _next_inputs(inputs, out)
    row.kv_bytes = _held(cache)
    begun = now()
    for _ in range(new_tokens):
        out = forward(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = out.past_key_values, _next_inputs(step, out)
        step["input_ids"].tolist()  # the host looks at each token, as generate() does
    decode = now().since(begun)
    row.prefill.append(prefill.wall)
    row.prefill_process.append(prefill.process)
    row.decode.append(decode.wall / new_tokens)
    row.decode_process.append(decode.process / new_tokens)


def _peak(forward: Any, inputs: dict[str, Any], device: torch.device) -> int:
    """Bytes that a prefill needs, in a run of its own: watching takes time."""
    return peak_of(lambda: _logits(forward, inputs, 1), device)[1]


def _logits(forward: Any, inputs: dict[str, Any], n: int, tokens: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Logits of the last token [B, V] of ``n`` forwards, greedily or with these tokens, int64 [B, 1] each."""
    found, cache, step = list[Tensor](), None, inputs
    for i in range(n):
        out = forward(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = out.past_key_values, _next_inputs(step, out)
        if tokens is not None:
            step["input_ids"] = tokens[i]
        found.append(out.logits[:, -1].clone())
    return found


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _held(cache: Any) -> int:
    """Bytes of the keys and values that a cache shows."""
    layers = [x for part in getattr(cache, "parts", [cache]) for x in part.layers]
    held = [x for layer in layers for x in (layer[:2] if isinstance(layer, tuple) else (layer.keys, layer.values))]
    return sum(x.numel() * x.element_size() for x in held)


def _next_inputs(inputs: dict[str, Any], out: Any) -> dict[str, Any]:
    """One greedy token more."""
    step: dict[str, Any] = {"input_ids": out.logits[:, -1].argmax(-1, keepdim=True)}
    if inputs.get("attention_mask") is not None:
        mask = inputs["attention_mask"]
        step["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    if inputs.get("position_ids") is not None:
        step["position_ids"] = inputs["position_ids"][..., -1:] + 1
    return step
