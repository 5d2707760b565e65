"""What vLLM has that the plug-in needs, what is said where it lacks it, and what an engine refuses as it starts."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from examples.digits.model import CHECKPOINT
from examples.digits.scenes import held_out_questions
from tests.serving.engine import ask
from vlmrewrite import compat
from vlmrewrite.compat import vllm
from vlmrewrite.passes import STS, DivPrune, FastV
from vlmrewrite.recipe import Recipe
from vlmrewrite.serving.vllm import overrides, register

ARGS = {"model_impl": "transformers", "max_model_len": 256}
LACKS = [
    ("vllm.model_executor.models.registry", "_ModelRegistry.resolve_model_cls", "_ModelRegistry.resolve_model_cls"),
    ("vllm.config", "ModelConfig.uses_mrope", None),
    ("vllm.config", "ModelConfig.mrope_num_dims", None),
    ("vllm.multimodal.processing", "BaseMultiModalProcessor._get_mm_prompt_updates", None),
    ("vllm.multimodal.processing", "BaseMultiModalProcessor._get_mm_hashes", None),
    ("vllm.multimodal.processing", "BaseMultiModalProcessor._maybe_apply_prompt_updates", None),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.load_model", None),
    ("vllm.model_executor.models.interfaces", "SupportsMRoPE.get_mrope_input_positions", None),
    ("vllm.multimodal.inputs", "PlaceholderRange", "vllm.multimodal.inputs.PlaceholderRange"),
    ("vllm.multimodal.registry", "_ProcessorFactories", "vllm.multimodal.registry._ProcessorFactories"),
]


def test_everything_is_there() -> None:
    assert set(vllm.hooks()) >= {
        "ModelRegistry.resolve_model_cls",
        "ModelConfig.uses_mrope",
        "CPUModelRunner.load_model",
    }


@pytest.mark.parametrize(("module", "path", "named"), LACKS, ids=[path for _, path, _ in LACKS])
def test_a_name_that_is_gone(module: str, path: str, named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    of: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        of = getattr(of, part)
    monkeypatch.delattr(of, name)
    version = re.escape(vllm.versions()[0])
    with pytest.raises(
        compat.VersionError, match=rf"^vllm {version} has no {re.escape(named or path)} as vlmrewrite needs"
    ):
        vllm.hooks()


def test_a_method_that_takes_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = importlib.import_module("vllm.model_executor.models.interfaces")
    monkeypatch.setattr(interfaces.SupportsMultiModalPruning, "recompute_mrope_positions", lambda self, ids: None)
    with pytest.raises(
        compat.VersionError, match=r"has no recompute_mrope_positions\(input_ids, .*\), but one of \(ids\)"
    ):
        vllm.hooks()


def test_versions_that_were_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(vllm, "install", lambda *_: None)
    monkeypatch.setattr(vllm, "warn", said.append)
    register()
    assert vllm.versions() in vllm.TESTED_PAIRS and not said
    monkeypatch.setattr(vllm, "versions", lambda: ("0.99.0", "5.19.0"))
    register()
    tested = "; ".join(f"vLLM {a} with transformers {b}" for a, b in vllm.TESTED_PAIRS)
    assert said == [f"vlmrewrite was tested with {tested}; these are vLLM 0.99.0 and transformers 5.19.0"]


def test_what_an_engine_refuses_and_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes and prompts; a pass of another package runs."""
    own = tmp_path / "own"
    (own / "vlmrewrite_first-1.dist-info").mkdir(parents=True)
    (own / "vlmrewrite_first-1.dist-info" / "METADATA").write_text("Name: vlmrewrite_first\nVersion: 1\n")
    (own / "vlmrewrite_first-1.dist-info" / "entry_points.txt").write_text(
        "[vlmrewrite.passes]\nfirst = vlmrewrite_first:First\n"
    )
    (own / "vlmrewrite_first.py").write_text(FIRST)
    monkeypatch.setenv("PYTHONPATH", str(own))
    scene = held_out_questions(1)[0]
    image, words = {"multi_modal_data": {"image": scene.image}}, f"<image> {scene.question}"
    row = Recipe(name="row", passes=(DivPrune(9, per="row"),))
    inside = Recipe(name="inside", passes=(FastV(at=2), STS(keep=0.5, refine=None)))
    given = [
        overrides(inside),
        overrides(row),
        {"vlmrewrite": {"name": "first", "passes": [{"first": {"keep": 0.25}}]}},
        overrides(Recipe(name="few", passes=(DivPrune(1),))),
    ]
    long = [{"prompt": " ".join([words] * 3), "multi_modal_data": {"image": [scene.image] * 3}}]
    batches = [[{"prompt": words} | image], long]
    engines = [
        {"model": CHECKPOINT, "args": ARGS | {"hf_overrides": o}, "batches": batches, "tokens": 2} for o in given
    ]
    inside_refused, row_refused, first, few = ask(tmp_path, engines)
    assert "FastV: policy 'fastv' at layer 2 chooses inside the decoder" in inside_refused["error"]
    assert 'set limit_mm_per_prompt={"image": 1}' in row_refused["error"]
    assert first["kept"][0] == list(range(36))
    assert "vlmrewrite leaves 324 tokens out of the prompt" in first["batches"][1]
    assert "expected at most 256: give fewer or smaller images" in first["batches"][1]
    assert few["batches"][0][0]["prompt"] == 6 and len(few["kept"][0]) == 1


FIRST = '''
from typing import ClassVar

import torch

from vlmrewrite.plan import Budget, Plan, Policy, frozen_pass


def foremost(features, member, lengths, keep):
    """The first tokens of each image."""
    parts = member.split(lengths.tolist())
    return torch.cat([x & (x.cumsum(0) <= k) for x, k in zip(parts, keep.tolist())])


@frozen_pass
class First:
    """Keeps the first tokens."""

    name: ClassVar[str] = "first"
    keep: Budget = 0.5

    def refuse(self, plan: Plan) -> None:
        return None

    def change(self, plan: Plan) -> None:
        plan.narrow(Policy("first", foremost, ("features",)), self.keep)
'''
