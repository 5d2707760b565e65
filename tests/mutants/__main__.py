"""Apply faults, one at a time, to copies of the checkout, and say which the tests find, and which survive.

Tests are run in tiers, each until the first one fails: those that a fault names, then all of the quick tier (units and
graphs), all properties, and, for faults in kernels, the kernels' tests. Tests of the house (files, packages, this list)
are left out: what they find is not how the code behaves. A test counts only if it passes without the fault.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.mutants.faults import Fault, faults
from tests.mutants.trial import FORKS, QUICKLY, TOO_LATE, copied, run

QUICK, PROPERTY, KERNELS = ("tests/unit", "tests/graph"), ("tests/property",), ("tests/kernels",)

ENOUGH = 0.95
"""Share of the faults that must be found."""


@dataclass(frozen=True)
class Verdict:
    """What became of a fault: ``found`` is the test that failed, ``"timed out"``, or None if it survived."""

    fault: Fault
    found: str | None
    seconds: float

    @property
    def tier(self) -> str:
        """The folder of the test that found it."""
        parts = (self.found or "").split("/")
        return "quick" if parts[:2] in (["tests", "unit"], ["tests", "graph"]) else "".join(parts[1:2])

    def __str__(self) -> str:
        how = self.found or "SURVIVED"
        return f"{self.fault.name:<38} {self.fault.kind:<30} {self.tier or '-':<9} {self.seconds:>6.0f} s  {how}"


def judge(fault: Fault, timeout: float) -> Verdict:
    """Run the tests against one fault, until one finds it."""
    begun, found = time.monotonic(), None
    kernels = "/kernels/" in fault.file or any(test.startswith(KERNELS) for test in fault.near)
    with copied(fault) as copy:
        for tests in (fault.near, *[KERNELS] * kernels, QUICK, PROPERTY):
            options = [] if tests is fault.near else QUICKLY
            found = found or run(copy, tests, timeout - (time.monotonic() - begun), options)
    return Verdict(fault, found, time.monotonic() - begun)


def chosen(names: Sequence[str], sample: int | None, seed: str) -> list[Fault]:
    """The faults that are meant.

    Raises:
        ValueError: there is no fault of that name, or the sample is empty.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"expected a sample of at least 1 fault, got {sample}")
    every = {fault.name: fault for fault in faults()}
    if unknown := [name for name in names if name not in every]:
        raise ValueError(f"there is no fault {unknown[0]!r}; expected one of {', '.join(every)}")
    some = [every[name] for name in names] or list(every.values())
    return some if sample is None else random.Random(seed).sample(some, min(sample, len(some)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status is 1 if too many faults survive, and 2 if tests fail without a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="seeded faults, and who finds them")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this fault (again for more)")
    parser.add_argument("--sample", type=int, metavar="N", help="N faults drawn at random")
    parser.add_argument("--seed", default="0", help="of the sample; any text")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time (default: 1)")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="for one fault (default: 3600)")
    args = parser.parse_args(arguments)
    FORKS.set_forkserver_preload(["tests.mutants.preload"])
    try:
        some = chosen(args.only, args.sample, args.seed)
    except ValueError as e:
        parser.error(str(e))
    verdicts = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for verdict in pool.map(lambda fault: judge(fault, args.timeout), some):
            print(verdict, flush=True)
            verdicts.append(verdict)
    found = {v.found for v in verdicts if v.found and v.found != TOO_LATE}
    with copied(None) as copy:  # a case whose name has spaces: all cases
        tests = sorted({test.partition("[")[0] if " " in test else test for test in found})
        failed = run(copy, tests, args.timeout * len(tests)) if tests else None
    if failed is not None:
        print(f"{failed} fails without a fault too; expected a test that passes")
        return 2
    return told(verdicts)


def told(verdicts: Sequence[Verdict]) -> int:
    """Print the sums, and say whether they are enough."""
    survived = [v for v in verdicts if v.found is None]
    late = sum(v.found == TOO_LATE for v in verdicts)
    found = len(verdicts) - len(survived)
    tiers = {tier: sum(v.tier == tier for v in verdicts) for tier in dict.fromkeys(v.tier for v in verdicts)}
    by_tier = ", ".join(f"{n} by {tier}" for tier, n in tiers.items() if tier)
    print(f"{found} of {len(verdicts)} found: {by_tier}" + (f"; {late} only by their time-out" if late else ""))
    for v in survived:
        print(f"survived: {v.fault.name} ({v.fault.file}): {v.fault.wrong}")
    return int(found < ENOUGH * len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
