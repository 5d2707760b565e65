"""Seconds to the first token and behind it, by what runs the graph: as it is, Inductor in pieces, Inductor whole.

    export TORCHINDUCTOR_COMPILE_THREADS=1 TORCHINDUCTOR_CACHE_DIR=/tmp/empty
    python -m benchmarks.startup --layers 32 --hidden 256 --image-tokens 64

One thread. First calls are told in seconds of the clock and of all processes' CPU time, the C++ compiler's included,
which other load on the machine moves less; what follows takes turns, in CPU time. A folder that holds what an earlier
run compiled shows a warm start.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.run import CONFIG, Setting
from vlmrewrite.api import applied, resumed
from vlmrewrite.cli.loading import with_random_weights
from vlmrewrite.cli.prompt import Shape, captured_prompt
from vlmrewrite.hf import encode_images
from vlmrewrite.runtime import session_of

WAYS = ("eager", "inductor", "inductor-whole")


def cpu() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


@contextmanager
def told(what: str) -> Iterator[None]:
    """Print what a block took."""
    begun = time.perf_counter(), cpu()
    yield
    print(f"{what:40} {time.perf_counter() - begun[0]:7.1f} s, CPU {cpu() - begun[1]:7.1f} s", flush=True)


def forward(model: Any, inputs: dict[str, Any], tokens: int) -> tuple[list[float], Tensor]:
    """CPU seconds of a prefill and of a decode step, and the logits of the last token."""
    begun = time.process_time()
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    seconds = [time.process_time() - begun]
    begun = time.process_time()
    for _ in range(tokens):
        step = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return [*seconds, (time.process_time() - begun) / max(tokens, 1)], out.logits


def main() -> None:
    """Measure all ways, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--recipe", default="sts-64")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--way", action="append", choices=WAYS, help="measure these alone; may be given several times")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(options.layers, 1, 1, options.image_tokens, 1, hidden=options.hidden)
    model = with_random_weights(setting.config(), CONFIG, torch.float32, torch.device("cpu"))
    _, inputs = captured_prompt(model, Shape(options.image_tokens, setting.text, 1, 1))
    sessions, found, logits = {}, dict[str, list[list[float]]](), dict[str, Tensor]()
    with torch.no_grad():
        inputs = encode_images(model, dict(inputs))
        for way in options.way or WAYS:
            with applied(model, options.recipe, backend=way):
                sessions[way], found[way] = session_of(model), []
                with told(f"{way}: first prefill"):
                    forward(model, inputs, 0)
                with told(f"{way}: first decode step, and a prefill"):
                    logits[way] = forward(model, inputs, 1)[1]
        for _ in range(options.repeat):
            for way, session in sessions.items():
                with resumed(model, session):
                    forward(model, inputs, 1)
                    found[way].append(forward(model, inputs, 8)[0])
    for way, seconds in found.items():
        prefill, decode = (1e3 * median(column) for column in zip(*seconds, strict=True))
        error = (logits[way] - next(iter(logits.values()))).abs().max()
        print(f"{way:16} prefill {prefill:8.1f} ms, decode {decode:7.2f} ms a token; logits differ by {error:.2g}")


if __name__ == "__main__":
    main()
