"""Where a host's time goes in prefill and in a decode step, without and with recipes.

python -m tests.gpu.profile [--layers 32] [--batch 8] [--recipes sts-64 visor-cross] [--backend eager] [--dry]
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import vlmrewrite as vr
from vlmrewrite.cli.config import read_config
from vlmrewrite.cli.loading import with_random_weights
from vlmrewrite.cli.prompt import Shape, captured_prompt

CONFIG = Path("examples/configs/llava-1.5-7b.json")
SHOWN = 28


def main() -> int:
    """Seconds, then what Python functions and what operators took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--recipes", nargs="+", default=["sts-64", "visor-cross"])
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry else "cuda")
    config, _ = read_config(CONFIG)
    text = config.text_config
    text.num_hidden_layers = options.layers
    text.hidden_size, text.intermediate_size = 512, 1024  # the host's work is that of any width
    text.num_attention_heads = text.num_key_value_heads = 4
    model = with_random_weights(config, CONFIG, torch.bfloat16, device)
    _, inputs = captured_prompt(model, Shape(576, text=64, rows=options.batch))
    for recipe in [None, *options.recipes]:
        with torch.no_grad(), vr.applied(model, recipe, backend=options.backend) if recipe else nullcontext():
            _measure(recipe or "unmodified", model, inputs, device)
    return 0


def _measure(name: str, model: Any, inputs: dict[str, Any], device: torch.device) -> None:
    def prefill() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    def steps(cache: Any, n: int) -> None:
        token = torch.full((len(inputs["input_ids"]), 1), 9, device=device)
        for _ in range(n):
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def seconds(run: Any) -> float:
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        return time.perf_counter() - begun

    for _ in range(3):
        steps(prefill().past_key_values, 3)
    took = [seconds(prefill) for _ in range(10)]
    cache = prefill().past_key_values
    each = [seconds(lambda: steps(cache, 5)) / 5 for _ in range(8)]
    print(
        f"\n=== {name}: prefill {statistics.median(took) * 1e3:.2f} ms, a step {statistics.median(each) * 1e3:.2f} ms"
    )
    for what, run in (("decode", lambda: steps(cache, 5)), ("prefill", prefill)):
        profiler = cProfile.Profile()
        profiler.enable()
        run()
        _wait(device)
        profiler.disable()
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(SHOWN)
        print(f"--- {name}, {what}: functions")
        print("\n".join(line[:150] for line in text.getvalue().splitlines() if line.strip())[:6000])
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=kinds) as seen:
            run()
            _wait(device)
        print(f"--- {name}, {what}: operators")
        print(
            seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=SHOWN, max_name_column_width=48)[:9000]
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
