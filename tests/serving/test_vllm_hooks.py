"""What vLLM has that the plug-in needs, what is said where it lacks it, and what an engine refuses as it starts."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from examples.digits.model import CHECKPOINT
from examples.digits.scenes import held_out_questions
from tests.serving.engine import ROOT, ask
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
    (
        "vllm.v1.worker.gpu.model_states.default",
        "maybe_create_mm_pruner",
        "vllm.v1.worker.gpu.model_states.default.maybe_create_mm_pruner",
    ),
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


PATCHED = [
    ("vllm.model_executor.models.registry", "ModelRegistry", "resolve_model_cls"),
    ("vllm.config", "ModelConfig", "uses_mrope"),
    ("vllm.config", "ModelConfig", "mrope_num_dims"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "load_model"),
    ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner", "load_model"),
    ("vllm.v1.worker.gpu.model_states.default", None, "maybe_create_mm_pruner"),
]


@pytest.mark.parametrize("gone", [None, *(f"{module}:{path}" for module, path, _ in LACKS[1:])])
def test_what_is_changed_in_vllm(gone: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All, or, where something is gone, nothing but what refuses recipes."""
    said: list[str] = []
    monkeypatch.setattr(vllm, "warn", said.append)
    modules = [(importlib.import_module(module), owner, name) for module, owner, name in PATCHED]
    places = [(of if owner is None else getattr(of, owner), name) for of, owner, name in modules]
    for of, name in places:
        monkeypatch.setattr(of, name, vars(of).get(name, getattr(of, name)))
    registry, _ = places[0]
    monkeypatch.setattr(registry, "_vlmrewrite", True, raising=False)
    monkeypatch.delattr(registry, "_vlmrewrite")
    if gone is not None:
        module, path = gone.split(":")
        *outer, name = path.split(".")
        of: Any = importlib.import_module(module)
        for part in outer:
            of = getattr(of, part)
        monkeypatch.delattr(of, name)
    before = [getattr(of, name, None) for of, name in places]
    register()
    changed = [getattr(of, name, None) != was for (of, name), was in zip(places, before, strict=True)]
    assert changed == [True, *[gone is None] * (len(places) - 1)]
    after = [getattr(of, name, None) for of, name in places]
    register()
    assert after == [getattr(of, name, None) for of, name in places]
    assert vllm.versions() in vllm.TESTED_PAIRS and len(said) == (gone is not None)


def state(process: int) -> str:
    """Of a process, a letter; of one that is gone, Z."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked at in /proc")
def test_engines_end_with_who_asks_them(tmp_path: Path) -> None:
    """Also if that is killed, while engines start."""
    asking = (
        "import sys, time; from pathlib import Path; from tests.serving.engine import started\n"
        "with started(Path(sys.argv[1]), [dict(model='x', args={}, batches=[])], apart=False) as process:\n"
        "    print(process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", asking, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as who:
        assert who.stdout is not None
        engine = int(who.stdout.readline())
        assert state(engine) != "Z"
        who.kill()
    for _ in range(600):
        if state(engine) == "Z":
            break
        time.sleep(0.1)
    assert state(engine) == "Z" and not (tmp_path / "answered.pickle").exists()


def test_classes_of_the_registry() -> None:
    """Each is changed, or is itself: drafts that take images have no processor, some classes make others."""
    from vllm.model_executor.models.registry import ModelRegistry

    from tests.unit.test_served_recipes import config
    from vlmrewrite.serving.vllm import plugin

    same, changed, missing = set[str](), set[str](), dict[str, str]()
    for name, known in ModelRegistry.models.items():
        try:
            chosen = known.load_model_cls()
        except (ImportError, RuntimeError, AttributeError) as e:  # of kernels that this machine has not
            missing[name] = f"{type(e).__name__}: {e}"
            continue
        if hasattr(chosen, "embed_multimodal"):
            made = plugin._changed(chosen, config(None))
            (same if made is chosen else changed).add(name)
            assert (made is chosen) == (not hasattr(chosen, "_processor_factory") or "__new__" in vars(chosen)), name
    assert len(missing) < 20, missing
    assert same and len(changed) > 50


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
    wrong = {"mm_processor_cache_type": "shm", "enable_prompt_embeds": True}
    engines += [{"model": CHECKPOINT, "args": engines[-1]["args"] | wrong, "batches": []}]
    inside_refused, row_refused, first, few, wrong_refused = ask(tmp_path, engines)
    assert 'mm_processor_cache_type: expected "lru", got "shm"' in wrong_refused["error"]
    assert "enable_prompt_embeds: expected False" in wrong_refused["error"]
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
