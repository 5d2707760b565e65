"""Where a chain of plans begins when earlier calls say so: what was seen of their rows, kept by the session."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from vlmrewrite.ops import Run
from vlmrewrite.plan import Begin

WINDOW, ENOUGH = 16, 8
"""Rows that a running share is of, the last ones that a plan ran for; and how many it takes to go by it."""

AGAIN = 48
"""One call in so many begins with the cheapest plan, whatever was seen: prompts may have become other ones."""


class RunningShare:
    """The running share of rows that each plan did not do for; the same calls in the same order make the same of it.

    A plan behind the first is tried on rows that the one before did not do for. What it shows of them stands for all
    rows, which makes beginning with it look dearer than it is.
    """

    def __init__(self) -> None:
        self._done: dict[int, deque[bool]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._calls, self._lock = 0, threading.Lock()

    @property
    def unlearned(self) -> int:
        """How many more rows it takes to go by them."""
        with self._lock:
            return max(0, ENOUGH - len(self._done[0]))

    def begin(self, plans: int, costs: Callable[[], Sequence[float]]) -> Begin:
        """With which plan a call had best begin.

        Args:
            plans: how many there are.
            costs: of each plan, cheapest first, of what they do not share, in any unit; asked where that matters.
        """
        with self._lock:
            self._calls += 1
            again, seen = self._calls % AGAIN == 0, [[*self._done[i]] for i in range(plans - 1)]
        if len(seen[0]) < ENOUGH:
            return Begin(0, f"began with variant 0: of {ENOUGH} rows that it takes to choose, {len(seen[0])} were seen")
        unsure = [1 - sum(done) / len(done) if done else 1.0 for done in seen]
        told = ", ".join(f"{x:.0%} after variant {i}" for i, x in enumerate(unsure) if seen[i])
        if again:
            return Begin(0, f"began with variant 0 to look again, as one in {AGAIN} does; unsure were {told}")
        *each, last = costs()
        expected = [last]
        for cost, share in zip(reversed(each), reversed(unsure), strict=True):
            expected.insert(0, cost + share * expected[0])
        best = expected.index(min(expected))
        share = expected[best] / last
        return Begin(
            best,
            f"began with variant {best}, expected at {share:.2f} of the last one's cost where they differ; unsure were"
            f" {told}",
        )

    def add(self, runs: Sequence[Run], images: Sequence[bool], plans: int) -> None:
        """What a call's runs say.

        Args:
            runs: of all plans that ran.
            images: which rows of the call have an image; others ask for no further plan.
            plans: how many there are.
        """
        with self._lock:
            for run in (run for run in runs if run.variant + 1 < plans):
                kept = {*run.kept}
                self._done[run.variant].extend(row in kept for row in run.rows if images[row])
