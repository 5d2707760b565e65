"""Reports: what was matched and refused, and what each layer costs before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from vlmrewrite import hf
from vlmrewrite.capture import CAPTURES, limit
from vlmrewrite.markup import Shown, document, html_of
from vlmrewrite.ops import Run
from vlmrewrite.plan import Call, Pass, describe
from vlmrewrite.report.memory import peak_memory
from vlmrewrite.report.picture import KeptTokens, kept_picture
from vlmrewrite.report.summary import by_processor, compared, dropping_nothing, other_layers, saving_nothing, verdicts
from vlmrewrite.report.words import lines_of
from vlmrewrite.rewrite import Program
from vlmrewrite.runtime import Session


@dataclass(frozen=True)
class Report(Shown):
    """What a recipe did to a model: ``str`` for a terminal, ``to_dict`` for JSON, HTML in a notebook or a browser.

    Costs are those of the last call with an image: matmul FLOPs of the decoder layers' prefill and bytes of K/V added
    to the cache, all rows together. Before the first such call they are missing. On a kept cache, those before are with
    all earlier tokens in it. Scoring vision tokens by attention is counted; what a policy's or an edit's operator does
    inside (distances between features, say) is not.

    ``memory``, if it was asked for: the bytes that the decoder's graph of that call holds at most, K/V and logits
    included, weights and what it was given not. Without a compiler's fusion, and without the workspace of libraries.
    """

    recipe: str
    backend: str
    plan: str | None
    passes: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, Any], ...] = ()
    totals: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] | None = None
    kernels: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    graphs: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    memory: dict[str, int] = field(default_factory=dict)
    kept: KeptTokens | None = field(default=None, repr=False)

    def picture(self) -> str:
        """Which vision tokens each run of layers worked on in that call, as SVG: of a video a strip of frames.

        Raises:
            ValueError: there was no call with an image.
        """
        if self.kept is None:
            raise ValueError("no call with an image was made since the recipe was applied: there is nothing to draw")
        return self.kept.svg()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings."""
        return {
            "recipe": self.recipe,
            "backend": self.backend,
            "plan": self.plan,
            "passes": list(self.passes),
            "layers": list(self.layers),
            "totals": self.totals,
            "call": self.call,
            "kernels": self.kernels,
            "graphs": self.graphs,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "memory": self.memory,
        }

    def __str__(self) -> str:
        return "\n".join(lines_of(self, detailed=False))

    def detail(self) -> str:
        """The same text with each choice of a kernel: for which operators it was made, and why."""
        return "\n".join(lines_of(self, detailed=True))

    def to_html(self) -> str:
        """A page for a browser, dark or light as the reader likes: what a notebook shows, in a document of its own."""
        return document(f"Report on recipe {self.recipe}", html_of(self))


def report_on(model: nn.Module, session: Session, memory: bool) -> Report:
    """What a recipe at work on a model did so far; see :func:`vlmrewrite.report`."""
    inner, latest = _captured_inside(model, session), session.latest
    captures = CAPTURES.get(model if inner is None else hf.decoder_of(model))
    one = None if captures is None else captures.call if inner is None else captures.inner
    made = make_report(
        session.recipe.name,
        session.backend if latest is None else latest.executable.backend,
        session.recipe.passes,
        program=None if latest is None else latest.program,
        call=None if latest is None else latest.call,
        held=() if latest is None else latest.given.held,
        runs=() if latest is None else latest.result.runs,
        dispatch=None if latest is None or not latest.result.runs else latest.executable.program,
        kernels={} if latest is None else latest.executable.choices,
        graphs={} if one is None else {"captured": len(one.graphs), "limit": limit(), "copied_layers": one.copied},
        seconds={} if one is None else {"capture": sum(one.seconds)},
        plain_calls=session.text.calls.total(),
        continued_calls=sum(n for (_, continued), n in session.text.calls.items() if continued),
        compiled_calls=session.text.compiled.total(),
        memory=peak_memory(session) if memory else {},
        inner=inner,
        uncompiled=[*dict.fromkeys(session.text.why.values())],
    )
    return made if latest is None else replace(made, kept=kept_picture(model, latest))


def _captured_inside(model: nn.Module, session: Session) -> str | None:
    """Why a part of a model is captured and rewritten alone, None where it is the whole forward."""
    part = hf.decoder_of(model)
    alone = f"{type(part).__name__} is captured and rewritten alone, and the rest of {type(model).__name__} runs around"
    if hf.language_model(model) is not None:
        return f"{alone} it as it is, which leaves generating, or merging the features, to it"
    return session.untraced and f"{alone} it as it is: {session.untraced}"


def make_report(
    recipe: str,
    backend: str,
    passes: Sequence[Pass],
    *,
    program: Program | None,
    call: Call | None,
    kernels: dict[str, list[dict[str, Any]]],
    graphs: dict[str, int],
    seconds: dict[str, float],
    plain_calls: int,
    continued_calls: int = 0,
    held: Sequence[int] = (),
    runs: Sequence[Run] = (),
    dispatch: Program | None = None,
    compiled_calls: int = 0,
    memory: dict[str, int] | None = None,
    inner: str | None = None,
    uncompiled: Sequence[str] = (),
) -> Report:
    """The report of a recipe at work.

    Args:
        recipe, backend, passes: what was applied; the backend is the one that was chosen for the last call.
        program, call, held: of the last call with an image, if any; ``held`` as for
            :func:`vlmrewrite.analysis.costs`.
        runs: of a dispatch, the variants that ran in that call, for which rows, and which of these kept the result.
        dispatch: the whole program, of which ``program`` is the most demanding variant that a row followed.
        kernels: what each kind of operator became.
        graphs, seconds: of capturing.
        plain_calls: calls without an image; ``continued_calls`` of them went on from a cache, and ``compiled_calls``
            went through Inductor.
        memory: peak bytes before and after, if known.
        inner: what is captured of the model and why, if it is not the whole.
        uncompiled: why Inductor does not run decode steps, or not as it was asked to.
    """
    notes = [inner] if inner else []
    if continued_calls:
        notes.append(
            f"{_calls(continued_calls)} on from a cache with no new image (decode steps, further turns) and ran all"
            " layers, which is right: what was dropped is not in the cache, and there is nothing else to drop"
        )
    if text_calls := plain_calls - continued_calls:
        notes.append(
            f"{_calls(text_calls)} through the model as it is, prompts of text alone, which is right: they hold no"
            " vision tokens to drop"
        )
    if compiled_calls:
        notes.append(f"Inductor compiled {compiled_calls} of the {plain_calls} calls without a new image")
    notes += uncompiled
    if program is None or call is None:
        untried: dict[str, Any] = {"matched": None, "changed": None, "reason": None}
        listed = tuple(
            {"name": p.name, "configuration": repr(p), **untried, "by_processor": hasattr(p, "processor")}
            for p in passes
        )
        return Report(recipe, backend, None, listed, graphs=graphs, notes=tuple(notes))
    variants = () if dispatch is None else dispatch.plan.variants
    followed = [(variants[run.variant], len(run.kept)) for run in runs if run.kept]
    layers, totals = compared(program, call.counts, call.past, held, followed)
    if given_up := [run for run in runs if len(run.kept) < len(run.rows)]:
        wasted = sum(_given_up(replace(program, plan=variants[run.variant]), run, call, held) for run in given_up)
        totals["after"]["flops"] += wasted
        told = "; ".join(f"variant {x.variant}: {len(x.rows) - len(x.kept)} of {len(x.rows)}" for x in given_up)
        notes.append(
            f"{len(given_up)} cheaper plan{'s' * (len(given_up) > 1)} ran in the last call and did not do for some rows"
            f" ({told}): totals hold their {wasted / 1e9:.4g} GFLOP"
        )
    notes += other_layers(program.plan) + dropping_nothing(program.plan, call.counts)
    notes += by_processor(passes) + saving_nothing(totals, "the last call", passes)
    summary = {
        "summary": describe(call.counts),
        "rows": len(call.counts.text),
        "length": call.length,
        "images": [n for n, video in zip(call.counts.images, call.counts.are_videos, strict=True) if not video],
        "videos": [list(x) for x, video in zip(call.counts.each, call.counts.are_videos, strict=True) if video],
        "past": call.past,
    }
    seconds = {**seconds, **program.seconds}
    if dispatch is not None:
        kept = [f"variant {run.variant}: {n} row{'s' * (n != 1)}" for run in runs if (n := len(run.kept))]
        kept = [x.partition(":")[0] for x in kept] if len(kept) == 1 else kept
        notes.append(f"layers and totals are those of {', '.join(kept)} of the plan, which the last call kept")
        if call.begins is not None:
            notes.append(f"the last call {call.begins.why}")
        assert dispatch.dispatch is not None
        if (reason := dispatch.dispatch.together) is not None and len(call.counts.text) > 1:
            notes.append(f"all rows of a call follow the plan of the most demanding one: {reason}")
    plan = str((program if dispatch is None else dispatch).plan)
    return Report(
        recipe,
        backend,
        plan,
        tuple(verdicts(program.outcomes, passes)),
        tuple(layers),
        totals,
        summary,
        kernels,
        graphs,
        seconds,
        tuple(notes),
        memory or {},
    )


def _calls(n: int) -> str:
    return f"{n} call{'s' * (n != 1)} went"


def _given_up(program: Program, run: Run, call: Call, held: Sequence[int]) -> int:
    """FLOPs of a variant behind the point where the variants part, for the rows that did not keep its result."""
    layers = program.costs(call.counts, call.past, held)[program.plan.parts_at :]
    return sum(c.flops for c in layers) * (len(run.rows) - len(run.kept)) // len(call.counts.text)
