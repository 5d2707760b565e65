"""How much of a prefill the selection of tokens takes, which the native loop is given.

    python -m benchmarks.selection --rows 4 --recipe sts-64 --recipe sts-half
    python -m benchmarks.selection --image-tokens 2880 --recipe sts-visor

A LLaVA with random weights and made-up features, nearly equally far from one another: the worst case for STS. One
thread, medians of some calls: process time of the whole, and what PyTorch's profiler says of the operators.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import vlmrewrite as vr
from benchmarks.run import one_setting


def selecting(model: Any, inputs: dict[str, Any]) -> float:
    """Milliseconds of a prefill in operators that select by what tokens hold."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(**inputs, logits_to_keep=1)
    of = {event.key: event.cpu_time_total / 1e3 for event in found.key_averages() if event.key.startswith("vlm::")}
    return float(sum(x for name, x in of.items() if "_sample" in name or "top_" in name))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one recipe after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="one of them; may be given several times")
    options, setting = one_setting(parser, arguments, layers=16, rows=1, image_tokens=576, hidden=1024, calls=3)
    model, inputs = setting.made()
    print(f"{setting.model()}, {options.rows} x {options.image_tokens}\nrecipe           prefill   selection    share")
    with torch.inference_mode():
        for recipe in options.recipe or ["sts-64"]:
            found = []
            with vr.applied(model, recipe, backend="eager"):
                model(**inputs, logits_to_keep=1)
                for _ in range(options.calls):
                    begun = time.process_time()
                    model(**inputs, logits_to_keep=1)
                    whole = time.process_time() - begun
                    found.append((whole * 1e3, selecting(model, inputs)))
            whole, part = (median(x) for x in zip(*found, strict=True))
            print(f"{recipe:16} {whole:4.0f} ms {part:8.1f} ms {part / whole:8.1%}", flush=True)


if __name__ == "__main__":
    main()
