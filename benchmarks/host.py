"""What a recipe costs a call beside its arithmetic: milliseconds beyond the unmodified model, on a tiny one.

    python -m benchmarks.host --recipe stride-half --recipe sts-half

A tiny LLaVA of 8 layers, one row, one thread. Both models take turns; of each call, the least time of all rounds is
told, and the median. The tower runs in both. An operation that a recipe adds (a selection) is in it, and so are those
that it spares.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

import torch

import vlmrewrite as vr
from vlmrewrite.testing.models import ZOO, Row


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what came out."""
    begun = time.perf_counter()
    out = run()
    return (time.perf_counter() - begun) * 1e3, out


def calls(model: Any, inputs: dict[str, Any], steps: int) -> list[float]:
    """Milliseconds of a prefill, and of each decode step behind it."""
    found, out = timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    times, past, token = [found], out.past_key_values, torch.tensor([[5]])
    for _ in range(steps):
        times.append(timed(lambda: model(input_ids=token, past_key_values=past, use_cache=True))[0])
    return times


def beyond(ours: Sequence[Sequence[float]], plain: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of calls in rounds, the mean over the calls: least time beyond the other's least, and median beyond median."""
    of_call = list(zip(*ours, strict=True)), list(zip(*plain, strict=True))
    least, usual = ([mean(map(min, x)) for x in of_call], [mean(map(median, x)) for x in of_call])
    return least[0] - least[1], usual[0] - usual[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one recipe after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="one of them; may be given several times")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=16, help="decode steps a round")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tiny, other = (ZOO["llava"](layers=options.layers) for _ in range(2))
    inputs = tiny.inputs([Row(1, 3, 4)])
    print("milliseconds beyond the unmodified model\nrecipe           prefill: least   median   decode: least   median")
    with torch.inference_mode():
        for recipe in options.recipe or ["stride-half"]:
            with vr.applied(tiny.model, recipe):
                for model in (tiny.model, other.model) * 5:
                    calls(model, inputs, 2)
                gc.disable()
                found = [
                    [calls(m, inputs, options.steps) for m in (tiny.model, other.model)] for _ in range(options.rounds)
                ]
                gc.enable()
            ours, plain = zip(*found, strict=True)
            prefill = beyond([x[:1] for x in ours], [x[:1] for x in plain])
            decode = beyond([x[1:] for x in ours], [x[1:] for x in plain])
            print(f"{recipe:16} {prefill[0]:15.2f} {prefill[1]:8.2f} {decode[0]:15.2f} {decode[1]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
