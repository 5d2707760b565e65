"""What ``start: running`` makes of ``visor-policy`` over many calls, on rows that are never sure.

    python -m benchmarks.running --layers 8 --rows 4 --calls 72

A LLaVA with random weights, of whose tokens none is ever likely enough. Each call of the rewritten model takes turns
with one of the unmodified model, on one thread; told is the ratio of what all of them took, process time.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import vlmrewrite as vr
from benchmarks.run import one_setting
from vlmrewrite.recipe import shipped_recipes
from vlmrewrite.runtime import following


def seconds(model: Any, inputs: dict[str, Any]) -> float:
    """Of a prefill."""
    begun = time.process_time()
    model(**inputs, use_cache=True, logits_to_keep=1)
    return time.process_time() - begun


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both ways to start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options, setting = one_setting(parser, arguments, layers=8, rows=4, image_tokens=576, hidden=1024, calls=72)
    plain, inputs = setting.made()
    policy: Any = shipped_recipes()["visor-policy"].passes[0]
    print(f"{setting.model()}, {options.rows} rows, {options.calls} calls: x unmodified")
    print("start           of all    of the last third")
    with torch.inference_mode():
        for start in (0, "running"):
            model = copy.deepcopy(plain)
            vr.apply(model, [replace(policy, start=start)], backend="eager")
            for variant in range(len(policy.chain)):
                with following(model, variant):  # so that nothing is seen of the rows yet
                    seconds(model, inputs)
            times = [(seconds(plain, inputs), seconds(model, inputs)) for _ in range(options.calls)]
            whole, last = (
                sum(x for x, _ in part) / sum(y for _, y in part) for part in (times, times[-options.calls // 3 :])
            )
            print(f"{start!s:9} {whole:12.2f} {last:20.2f}", flush=True)


if __name__ == "__main__":
    main()
