"""Prompts that candidates are run on: captured once, images encoded, with what the unmodified model says to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmrewrite.plan import Pass, Plan, Text, frozen_pass, run_passes
from vlmrewrite.report import LayerProfile, captured, first_token_kl, measure, next_token, under
from vlmrewrite.rewrite import Program

_LOOKED_AT = 8
"""Batches by whose costs an amount is looked for; all of them judge what is found."""


@frozen_pass
class _TextOnly:
    """No vision tokens at all: what a recipe costs at least."""

    name: ClassVar[str] = "textonly"

    def refuse(self, plan: Plan) -> str | None:
        """Never."""
        return None

    def change(self, plan: Plan) -> None:
        """Text alone in all layers."""
        for entry in plan.layers:
            entry.run_on(Text)


class Prompts:
    """Batches of prompts with images.

    What a candidate costs follows from the plan; what it changes takes a rewrite of each graph, and a prefill of the
    decoder for each batch. Nothing is captured or encoded again.

    Attributes:
        sizes: prompts of each batch.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Mapping[str, Any]], progress: Callable[[int], None] = lambda _: None
    ) -> None:
        """Capture the batches and run the unmodified model on them.

        Args:
            model: unmodified, in eval mode.
            batches: what its forward takes, on its device.
            progress: called with the number of batches that are done.

        Raises:
            ValueError: a batch has no image, or a prompt ends in one; or the model cannot be rewritten.
        """
        self.programs, self.first = list[Program](), list[Tensor]()
        with torch.no_grad():
            for i, batch in enumerate(batches):
                progress(i)
                found = captured(model, batch)
                if not found:
                    raise ValueError(f"calibration[{i}]: expected inputs with an image, got {', '.join(batch)}")
                self.programs += found
                self.first += [next_token(program, program.run()[0]) for program in found]
        self.sizes = [len(x) for x in self.first]

    def profile(self, batches: int) -> LayerProfile:
        """The profile of the layers on the first batches."""
        with torch.no_grad():
            return measure(self.programs[:batches], lambda *_: None)

    def shares(self, passes: Sequence[Pass], all_of_them: bool = True) -> dict[str, float] | None:
        """FLOPs and K/V bytes of the prefills under some passes, as shares; None if a pass is refused.

        Raises:
            ValueError: a pass fails.
        """
        plans, after, before = dict[frozenset[str], Plan](), [0, 0], [0, 0]
        for program in self.programs if all_of_them else self.programs[:_LOOKED_AT]:
            known = frozenset(program.plan.features)
            if known not in plans:
                plans[known], outcomes = run_passes(program.plan, passes)
                if any(o.reason is not None for o in outcomes):
                    return None
            assert program.call is not None
            for plan, total in ((plans[known], after), (program.plan, before)):
                for cost in replace(program, plan=plan).costs(program.call.counts):
                    total[0] += cost.flops
                    total[1] += cost.kv_bytes
        return {"flops": after[0] / before[0], "kv": after[1] / before[1]}

    def floor(self) -> dict[str, float]:
        """What the prompts cost without any vision tokens, as shares."""
        found = self.shares([_TextOnly()])
        assert found is not None
        return found

    def effective(self, passes: Sequence[Pass]) -> tuple[Pass, ...]:
        """Those that change something, or are refused."""
        _, outcomes = run_passes(self.programs[0].plan, passes)
        return tuple(p for p, o in zip(passes, outcomes, strict=True) if o.changed or o.reason is not None)

    def runner(self, passes: Sequence[Pass]) -> Callable[[int, int], list[float]]:
        """A function that runs batches from one to before another under some passes.

        It gives for each prompt KL(unmodified || rewritten) of the first token, in nats; not finite: infinite.
        """
        run = self.next_tokens(passes)

        def kl(start: int, stop: int) -> list[float]:
            found = list[float]()
            for p, q in zip(self.first[start:stop], run(start, stop), strict=True):
                away = first_token_kl(p, q)
                found += torch.where(away.isfinite(), away, torch.inf).tolist()
            return found

        return kl

    def next_tokens(self, passes: Sequence[Pass]) -> Callable[[int, int], list[Tensor]]:
        """A function that runs batches under some passes: log-probabilities of the first token, [B, V] of each."""
        changed = under(passes)

        @torch.no_grad()
        def run(start: int, stop: int) -> list[Tensor]:
            found = list[Tensor]()
            for program in self.programs[start:stop]:
                found.append(next_token(program, changed(program).run(*program.inputs, call=program.call)[0]))
            return found

        return run
