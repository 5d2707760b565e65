"""Thousands of examples of the property that holds for any family: python -m tests.property.many --examples 5000.

They are shared out evenly among the families, whose names need not be given. A family has a process of its own, which
keeps what was captured of its model from one example to the next.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from tests.property.test_any_family import DRAWN, NAMES, agrees
from vlmrewrite.capture import dynamo


def tried(examples: int, first: int, name: str) -> dict[str, object]:
    """How many examples of a family ran, how many of them have a meaning there, and the text of a disagreement."""
    torch.set_num_threads(1)
    dynamo.LIMIT = 1024
    torch._dynamo.config.run_gc_after_compile = False
    counts = {True: 0, False: 0}

    @seed(first)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(st.fixed_dictionaries(DRAWN))
    def property(drawn):
        if sum(counts.values()) % 20 == 0:
            gc.collect()
        meant = agrees(name, **drawn)
        counts[meant] += 1
        assume(meant)

    begun, wrong = time.process_time(), None
    try:
        property()
    except Exception as e:
        wrong = "\n".join([f"{type(e).__name__}: {e}", *getattr(e, "__notes__", ())])  # with the example
    seconds = round(time.process_time() - begun)
    return {"family": name, "ran": counts[True], "no meaning": counts[False], "seconds": seconds, "wrong": wrong}


def main() -> int:
    """The command; its exit status is 1 if a family disagrees with the oracle."""
    parser = argparse.ArgumentParser(prog="python -m tests.property.many", description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=5000, help="in all (default: 5000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time (default: 1)")
    parser.add_argument("--log", type=Path, help="a line of JSON a family; what is there does not run again")
    args = parser.parse_args()
    there = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log and args.log.exists() else []
    left = [name for name in NAMES if name not in {one["family"] for one in there}]
    each = -(-args.examples // len(NAMES))
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        for found in pool.imap(functools.partial(tried, each, args.seed), left, chunksize=1):
            there.append(found)
            print(*(f"{key}: {value}" for key, value in found.items()), sep=", ", flush=True)
            if args.log:
                with args.log.open("a") as file:
                    print(json.dumps(found), file=file)
    wrong = [one["family"] for one in there if one["wrong"]]
    ran = sum(one["ran"] for one in there)
    print(f"{ran} examples over {len(there)} families ran; disagreements: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
