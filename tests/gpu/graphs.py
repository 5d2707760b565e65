"""Decode steps one by one, compiled, on a static cache, and as CUDA graphs; the tokens are those of eager steps.

python -m tests.gpu.graphs --json graphs.json [--layers 32] [--batch 1] [--recipe sts-64] [--dry]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

import vlmrewrite as vr
from vlmrewrite.cli.config import read_config
from vlmrewrite.cli.loading import with_random_weights
from vlmrewrite.cli.prompt import Shape, captured_prompt

CONFIG = Path("examples/configs/llava-1.5-7b.json")
STATIC = {"cache_implementation": "static"}
WAYS: dict[str, tuple[str | None, dict[str, Any], bool]] = {
    "unmodified": (None, {}, False),
    "unmodified, static": (None, STATIC, False),  # which transformers compiles, on a GPU
    "eager": ("eager", {}, False),
    "inductor": ("inductor", {}, False),
    "inductor, static": ("inductor", STATIC, False),
    "inductor, static, CUDA graphs": ("inductor", STATIC, True),
}


def main() -> int:
    """The exit status is 1 if a way gives other tokens than eager steps do, or fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--recipe", default="sts-64")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.dry else "cpu")
    config, _ = read_config(CONFIG)
    text = config.text_config
    text.num_hidden_layers, width = (3, 256) if options.dry else (options.layers, options.width)
    text.hidden_size, text.intermediate_size = width, width * 43 // 16
    text.num_attention_heads = text.num_key_value_heads = width // 128
    model = with_random_weights(config, CONFIG, getattr(torch, options.dtype), device)
    _, inputs = captured_prompt(model, Shape(576, text=64, rows=options.batch))
    found, tokens = list[dict[str, Any]](), dict[str, torch.Tensor]()
    for name, (backend, how, graphs) in WAYS.items():
        with ExitStack() as stack:
            stack.enter_context(vr.applied(model, options.recipe, backend=backend) if backend else nullcontext())  # type: ignore[arg-type]
            stack.enter_context(torch._inductor.config.patch({"triton.cudagraphs": graphs}))
            how, one = how | ({"logits_processor": [_step]} if graphs else {}), dict[str, Any]({"way": name})
            try:
                tokens[name], seconds = _generated(model, inputs, how, 8 if options.dry else options.tokens, device)
                one |= {"ms": seconds * 1e3}
                one |= {"same": bool((tokens[name] == tokens["eager"]).all())} if backend else {}
            except Exception as e:
                one |= {"failed": f"{type(e).__name__}: {str(e)[:400]}"}
        found.append(one)
        print(one, flush=True)
    options.json.write_text(json.dumps({"device": device.type, "batch": options.batch, "ways": found}, indent=1) + "\n")
    bad = [one["way"] for one in found if "failed" in one or one.get("same") is False]
    print(f"decode steps in {len(found)} ways; failed or other tokens: {', '.join(bad) or 'none'}")
    return int(bool(bad))


def _generated(
    model: Any, inputs: dict[str, Any], how: dict[str, Any], n: int, device: torch.device
) -> tuple[torch.Tensor, float]:
    """The tokens, and the seconds of a decode step: of a long answer, less a short one."""

    def run(n: int) -> tuple[torch.Tensor, float]:
        _wait(device)
        begun = time.perf_counter()
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, **how)
        _wait(device)
        return out, time.perf_counter() - begun

    for _ in range(2):
        out, _ = run(n + 1)
    return out, statistics.median((run(n + 1)[1] - run(1)[1]) / n for _ in range(5))


def _step(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor of logits that tells CUDA graphs where a step ends: what it gave may be written over from here on."""
    scores = scores.clone()
    torch.compiler.cudagraph_mark_step_begin()
    return scores


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
