"""Where the names of version 0.1 have gone: they can be imported for one release more, with a warning."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from functools import partial
from types import ModuleType
from typing import Any

MOVED = {
    "admission": "hf.support",
    "anatomy": "analysis.anatomy analysis.graph",
    "attend": "ops.positional",
    "bench.cases": "bench.kernels.cases",
    "bench.choosers": "bench.kernels.selection",
    "bench.contenders": "bench.kernels.attention",
    "blocks": "plan.blocks hf.decoder",
    "budget": "plan.budget plan.pipeline",
    "cache": "kvcache.cache kvcache.layer kvcache.buffer kvcache.adopt",
    "call": "plan.call",
    "catalogue": "cli.catalogue",
    "census": "plan.call",
    "choice": "ops.choice",
    "complaints": "errors",
    "costs": "analysis.costs",
    "decoding": "ops.positional",
    "dialect": "ops.attention ops.selection ops.scoring ops.library",
    "dispatch": "rewrite.dispatch",
    "emit": "rewrite.sets plan.call",
    "encode": "hf.vision",
    "formatting": "text plan.counts",
    "gathering": "ops.selection",
    "grid": "hf.grid",
    "inplace": "lower.decode_step",
    "inspection": "cli.config cli.prompt cli.profile report.summary",
    "install": "api runtime.install runtime.told runtime.facts oracle.verify",
    "installed": "lower.lowering rewrite.program",
    "kernels.detail": "passes.dape.kernels.detail",
    "kernels.first_pick": "kernels.greedy.start",
    "kernels.lookahead": "kernels.greedy.lookahead",
    "kernels.matching": "passes.dape.kernels.matching",
    "kernels.messages": "kernels.greedy.messages",
    "kernels.quadtree": "passes.dape.kernels.quadtree",
    "kernels.regions": "passes.dape.kernels.regions",
    "kernels.sample": "kernels.greedy.sample",
    "layerwise": "report.layer_profile report.plot",
    "legalize": "rewrite.legalize rewrite.sets",
    "loading": "cli.loading",
    "memory": "report.memory runtime.facts",
    "observer": "report.observe",
    "operators": "ops.library",
    "passes.dape_losses": "passes.dape.losses",
    "passes.dape_ops": "passes.dape.ops passes.dape.blocks passes.dape.matching",
    "positional": "ops.positional",
    "program": "compiler rewrite.program plan.pipeline",
    "regions": "passes.dape.regions passes.dape.matching",
    "room": "kvcache.buffer kvcache.layer",
    "session": "runtime.session runtime.facts ops.choice",
    "stream": "rewrite.sets",
    "terminal": "cli.terminal",
    "testing.aot": "testing.triton.aot",
    "testing.edited": "oracle.edits oracle.masks",
    "testing.interleaving": "testing.triton.interleaving",
    "testing.interpreter": "testing.triton.interpreter",
    "testing.oracle": "oracle.hooks oracle.masks testing.agreement",
    "tokens": "plan.tokens plan.needs plan.vocabulary plan.substitution",
    "tokenwise": "analysis.operators analysis.tokenwise",
    "traced": "runtime.session runtime.tracing capture.dynamo hf.inputs",
    "wellformed": "rewrite.verifier",
    "words": "plan.vocabulary",
}
"""Modules that are gone -> the modules that hold their names now, all without ``vlmrewrite.``."""

LEFT = {
    "bench.kernels": "bench.kernels.harness",
    "capture": "capture.hooks hf.decoder compat.dynamo",
    "bench.models": "bench.clock",
    "cli": "cli.app cli.options cli.listing",
    "kernels": "ops.device",
    "kernels.decode": "kernels.launch",
    "lower": "lower.lowering",
    "passes.dape": "passes.dape.technique",
    "passes.divprune": "ops.greedy",
    "passes.visor": "passes.visor.dispatch passes.visor.allocate",
    "recipe": "registry",
}
"""The same of modules that are there, for names that have left them."""

RENAMED = {
    "admission.admit": "hf.support.check_support",
    "attend.Seen": "ops.positional.KernelMask",
    "attend.attend": "ops.positional.kernel_attention",
    "attend.seen": "ops.positional.kernel_mask",
    "attend.seen_everywhere": "ops.positional.kernel_mask_everywhere",
    "attend.seen_masked": "ops.positional.kernel_mask_softcapped",
    "census.Census": "plan.call.TokenCounts",
    "complaints.choice": "errors.one_of",
    "complaints.complaints": "errors.explain",
    "inspection.traced_prompt": "cli.prompt.captured_prompt",
    "kernels.missing": "ops.device.kernels_missing",
    "kernels.sample.divprune_sample": "kernels.greedy.sample.cosine",
    "kernels.sample.sts_sample": "kernels.greedy.sample.repulsion",
    "lower.compiled": "compat.dynamo.inductor",
    "lower.told": "lower.lowering.by_kind",
    "passes.divprune.BLOCK": "ops.greedy.SIDE",
    "program.say": "plan.pipeline.run_passes",
    "session.Last": "runtime.facts.LastCall",
    "terminal.Complaints": "cli.terminal.Errors",
    "tokens.difference": "plan.TokenSet.__sub__",
    "tokens.intersection": "plan.TokenSet.__and__",
    "tokens.text_part": "plan.TokenSet.text_part",
    "tokens.union": "plan.TokenSet.__or__",
    "tokens.vision_part": "plan.TokenSet.vision_part",
    "tokenwise.refuse": "analysis.tokenwise.not_token_wise",
    "traced.TRACED": "capture.dynamo.CAPTURES",
    "traced.Traced": "capture.dynamo.Captures",
    "traced.traced": "capture.dynamo.captures_of",
    "wellformed.check": "rewrite.verifier.check_sets",
    "wellformed.propagate": "rewrite.verifier.propagate_fakes",
}
"""Names that are others now."""

GONE = {
    "cli.AsJson": "vlmrewrite.cli.options.Json is the option that says where JSON goes",
    "capture.TracedCall": "vlmrewrite.trace(model, inputs) captures a forward",
    "bench.models.memory_peak": "vlmrewrite.bench.clock.peak_of says what a function needs at most",
    "bench.models.memory_reset": "vlmrewrite.bench.clock.peak_of says what a function needs at most",
    "capture.with_images": "vlmrewrite.trace(model, inputs) captures a forward",
    "capture.without_images": "a call of text is captured when it is made",
    "dispatch.Parted": "vlmrewrite.Program.dispatch holds the graphs of a plan's variants, cut",
    "dispatch.part": "vlmrewrite.rewrite.dispatch cuts the graphs of a plan's variants",
    "emit.SetEmitter": "vlmrewrite.rewrite.legalize makes the nodes of a plan's sets",
    "encode.EncoderFeatures": "vlmrewrite.hf.watched tells what the projector takes",
    "inplace.InPlace": "vlmrewrite.lower.DecodeStep runs a graph of text on a cache",
    "inplace.Write": "vlmrewrite.lower.DecodeStep runs a graph of text on a cache",
    "install.planned_lengths": "vlmrewrite.report(model).layers says the keys of each layer",
    "installed.Installed": "vlmrewrite.lower.Executable is a graph that is ready to run",
    "installed.Ran": "vlmrewrite.Program.execute returns what came out of a run",
    "lower.positioned": "vlmrewrite.lower.DecodeStep.of makes a graph of text ready to run on a cache",
    "terminal.print_json": "vlmrewrite.cli.terminal.as_json does what --json asks for",
    "tokens.check_needs": "vlmrewrite.plan.Policy and Edit check what they need when they are made",
    "memory.fake": "vlmrewrite.report(model, memory=True) predicts the peak memory",
    "room.Room": "vlmrewrite.kvcache.PositionCache grows in place by itself",
    "room.alike": "vlmrewrite.kvcache.PositionCache grows in place by itself",
    "stream.StreamEmitter": "vlmrewrite.rewrite.legalize makes the nodes of a plan's sets",
}
"""Names that are nowhere -> what there is in their place."""


def register(package: str) -> None:
    """Let the old names be imported that stood in a package or, as modules, directly below it."""
    for old in (*MOVED, *LEFT):
        name = f"vlmrewrite.{old}"
        parent, _, last = name.rpartition(".")
        if old in MOVED and parent == package:
            sys.modules[name] = ModuleType(name, "See `vlmrewrite.moved`.")
            setattr(sys.modules[parent], last, sys.modules[name])
        if name in sys.modules and package in (name, parent):
            setattr(sys.modules[name], "__getattr__", partial(_find, old))  # noqa: B010


def _find(old: str, name: str) -> Any:
    if name == "__all__" and old in MOVED:
        return _public(old)
    homes = () if name.startswith("_") else [(new, name) for new in (MOVED | LEFT)[old].split()]
    renamed, _, under = RENAMED.get(f"{old}.{name}", "").rpartition(".")
    for new, now in [(renamed, under)] if renamed else homes:
        module = pkgutil.resolve_name(f"vlmrewrite.{new}")
        if f"{old}.{name}" not in GONE and hasattr(module, now):
            warnings.warn(
                f"vlmrewrite.{old}.{name} is now vlmrewrite.{new}.{now}; the old name goes with the next release",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(module, now)
    instead = f"; it is gone: {GONE[f'{old}.{name}']}" if f"{old}.{name}" in GONE else ""
    raise AttributeError(f"module 'vlmrewrite.{old}' has no attribute {name!r}{instead}")


def _imported(name: str, x: object, module: ModuleType) -> bool:
    home = sys.modules.get(getattr(x, "__module__", ""), module)
    return isinstance(x, ModuleType) or (home is not module and getattr(home, name, None) is x)


def _public(old: str) -> list[str]:
    """What ``from`` an old module ``import *`` takes: what its homes define."""
    found = {name.rpartition(".")[2] for name in RENAMED if name.rpartition(".")[0] == old}
    for new in MOVED[old].split():
        module = importlib.import_module(f"vlmrewrite.{new}")
        found |= set(getattr(module, "__all__", [n for n, x in vars(module).items() if not _imported(n, x, module)]))
    return sorted(n for n in found if not n.startswith("_") and f"{old}.{n}" not in GONE)
