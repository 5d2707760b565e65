"""A user's file, typed as strictly as mypy can: it uses every public name, and must check without an ignored line.

``make typecheck`` checks it; ``tests/unit/test_typing.py`` runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, assert_type

from torch import Tensor, nn

import vlmrewrite as vr
from vlmrewrite import passes
from vlmrewrite.evaluate import Sample
from vlmrewrite.plan import Text, frozen_pass


@frozen_pass
class Blind:
    """Vision tokens leave the decoder at one layer; text sees none of them there, nor behind."""

    name: ClassVar[str] = "blind"

    at: vr.Depth
    least: vr.Budget = 1

    def refuse(self, plan: vr.Plan) -> str | None:
        """No vision tokens are left."""
        return plan.exhausted(self.at)

    def change(self, plan: vr.Plan) -> None:
        """Text alone from that layer on."""
        for layer in plan.layers[plan.layer(self.at).index :]:
            layer.run_on(Text)


def every_pass() -> list[vr.Pass]:
    """One of each technique."""
    given: list[vr.Pass] = [passes.DAPE(budget=0.5), passes.DPVR(at=2), passes.STS(keep=4, refine=None)]
    given += [passes.VISOR(self_layers=[0], cross_layers=[2]), passes.VTW(at=0.5), passes.DivPrune(keep=4)]
    given += [passes.FastV(keep=4, at=1), passes.FrameStride(keep=2), passes.Random(keep=4, seed=1)]
    given += [passes.ShortV(layers=[1]), passes.Stride(keep=4), passes.ViCA(), passes.VidCom2(keep=0.5), Blind(at=2)]
    return [*given, passes.Downsample(keep=0.5)]


def share(model: nn.Module, repository: str) -> Any:
    """Put a recipe and its blocks on the Hub, and get the model that they are for, with them."""
    assert_type(vr.push_to_hub(model, repository, private=True), str)
    return vr.from_pretrained(repository, backend="eager", strict=True)


def length(output: str, sample: Sample) -> float:
    """A metric of one's own."""
    return min(1.0, len(output) / max(map(len, sample.answers), default=1))


def compare(model: nn.Module, processor: Any, data: Path) -> float:
    """What a recipe changes on samples of one's own."""
    done = vr.evaluate(
        model, processor, data, ["stride-half", passes.Stride(keep=4)], metric=length, output=data.parent
    )
    assert_type(done.rows[0].difference, float)
    return done.rows[1].difference


def learn(model: nn.Module, processor: Any, data: Path) -> str:
    """Train a branch on samples of one's own, and by a loop of one's own."""
    done = vr.train(model, processor, data, passes.DPVR(at=2), output=data.parent / "blocks", steps=2)
    with vr.applied(model, done.folder):
        blocks = vr.trainable_blocks(model)
        assert_type(blocks, nn.ModuleDict)
    return f"{done.parameters} of {sum(p.numel() for p in blocks.parameters())}, {done.log[-1]['loss']}"


def search(model: nn.Module, processor: Any, data: Path) -> vr.Recipe | None:
    """The recipe that a budget buys on samples of one's own."""
    found = vr.tune(model, processor, data, {"flops": 0.3}, 0.01, metric=length, output=data.with_suffix(".yaml"))
    assert_type(found, vr.Tuned)
    if found.recipe is not None:
        vr.apply(model, found.recipe)
        assert_type(found.recipe.processor(processor), Any)
        assert_type(found.recipe.sets_processor, bool)
    vr.apply(model, "auto", calibration=(processor, data), budget="kv=0.5")
    return found.recipe


def carry(model: nn.Module, inputs: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Export a model under a recipe, and find what it takes."""
    exported: vr.Exported = vr.export(model, inputs, passes.Stride(keep=4), strict=True)
    exported.save(folder)
    assert_type(vr.load_export(folder), vr.Exported)
    return exported.arguments(inputs)


def use(model: nn.Module, inputs: dict[str, Any], folder: Path) -> list[str]:
    """Do with a model all that can be done; returns what was told on the way."""
    vr.disable_progress_bars()
    recipe = vr.Recipe(name="mine", passes=(passes.DPVR(at=2), passes.VTW(at=3)))
    told = [recipe.name, recipe.description, recipe.source, *(p.name for p in recipe.passes)]
    by_name = vr.Recipe.load("sts-half")
    assert_type(by_name, vr.Recipe)
    by_name.to_yaml(folder / "recipe.yaml")

    program = vr.trace(model, inputs)
    assert_type(program, vr.Program)
    planned = vr.rewrite(program, [passes.Stride(keep=4), Blind(at=2)], strict=True)
    plan: vr.Plan = planned.plan
    assert_type(vr.verify(model, inputs, passes.Stride(keep=4)), float)
    told += [str(planned), str(plan)]

    assert_type(vr.calibrate(model, "stride-half", inputs), vr.Recipe)
    vr.apply(model, recipe, backend="eager", kernels="auto", strict=True)
    model(**inputs)
    report: vr.Report = vr.report(model, memory=True)
    told += [str(report), report.detail(), report.to_html(), report.picture(), *report.notes]
    stages: list[vr.Stage] = vr.kept_tokens(model)
    kept: list[Tensor] = [stage.vision for stage in stages]
    told += [f"{stage.layers}: {int(x.sum())}" for stage, x in zip(stages, kept, strict=True)]
    vr.save_blocks(model, folder / "blocks")
    vr.load_blocks(model, folder / "blocks")
    assert_type(vr.restore(model), nn.Module)

    with vr.applied(model, [passes.Stride(keep=4)]) as rewritten:
        assert_type(rewritten, nn.Module)
    vr.enable_progress_bars()
    return told
