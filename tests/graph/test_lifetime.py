"""How long things live: captures die with their model, a failed call leaves a cache as it was, auto is decided late."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import vlmrewrite as vr
from vlmrewrite.capture import CAPTURES, traces
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.lower import by_kind, lower
from vlmrewrite.ops import choice
from vlmrewrite.ops.choice import Kernels
from vlmrewrite.passes import STS, Stride
from vlmrewrite.runtime import SESSIONS, executables, session, text
from vlmrewrite.testing.models import FAMILIES, Row

pytestmark = pytest.mark.usefixtures("unshared")

SOME = [STS(keep=6, refine=3, at=2)]


def collect() -> None:
    """Twice: the captures stand in a dictionary under the model, and are found to be garbage after it."""
    gc.collect()
    gc.collect()


def used(recipe, restore: bool) -> list[weakref.ref]:
    tiny = FAMILIES["llava"]()
    model, inputs = tiny.model, tiny.inputs([Row(1)])
    vr.apply(model, recipe)
    cache = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    graph = next(iter(SESSIONS[model].executables))
    seen = [model, next(model.parameters()), CAPTURES[model], graph, graph.gm, SESSIONS[model], cache]
    if restore:
        vr.restore(model)
    return [weakref.ref(x) for x in seen]


@pytest.mark.slow
@pytest.mark.parametrize(("features", "restore"), [("projected", False), ("encoder", True)])
def test_captures_die_with_their_model(restore, features):
    collect()
    before = {name for name in vars(traces) if "compiled_fn" in name}
    refs = used([STS(keep=6, refine=3, at=2, features=features)], restore)
    collect()
    assert [type(r()).__name__ for r in refs if r() is not None] == []
    assert {name for name in vars(traces) if "compiled_fn" in name} <= before


@pytest.mark.slow
def test_captures_of_text_die_with_their_model(monkeypatch):
    monkeypatch.setattr(text, "resolve", lambda *_: "inductor")
    monkeypatch.setattr("vlmrewrite.lower.pieces.inductor", lambda gm: gm)
    refs = used(SOME, True)
    collect()
    assert [type(r()).__name__ for r in refs if r() is not None] == []


@pytest.mark.slow
def test_a_traced_program_needs_no_capture_to_live_on():
    tiny = FAMILIES["llava"]()
    program = vr.trace(tiny.model, tiny.inputs([Row(1)]))
    with torch.no_grad():
        expected = program.run()[0]
        del tiny
        gc.collect()
        again = program.run()[0]
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True) if isinstance(a, torch.Tensor))


@pytest.mark.slow
def test_a_failed_call_gives_the_cache_back(llava):
    model, inputs = llava.model, llava.inputs([Row(1)])
    with vr.applied(model, SOME), torch.no_grad():
        expected = model(**inputs).logits
        for cache in (DynamicCache(), DynamicCache(config=model.config.text_config)):
            before = dict(cache.__dict__)
            with pytest.raises(IndexError):
                model(**{**inputs, "input_ids": inputs["input_ids"] + 1000 * (inputs["input_ids"] > 7)},
                      past_key_values=cache)  # fmt: skip
            assert type(cache) is DynamicCache
            assert cache.__dict__ == before
            assert cache.get_seq_length() == 0
            assert torch.equal(model(**inputs, past_key_values=cache).logits, expected)
            assert isinstance(cache, PositionCache)
    cache = DynamicCache()
    with vr.applied(model, SOME), pytest.raises(IndexError):
        model(input_ids=torch.tensor([[9999]]), past_key_values=cache)
    assert type(cache) is DynamicCache
    assert model(input_ids=torch.tensor([[9]]), past_key_values=cache).past_key_values is cache


@pytest.mark.slow
def test_auto_means_where_the_model_is_when_it_is_called(llava, monkeypatch):
    assert choice.resolve("auto", torch.device("cuda")) == "inductor"
    assert choice.resolve("auto", torch.device("cpu")) == "eager"
    assert choice.resolve("eager", torch.device("cuda")) == "eager"
    asked = []

    def watched(backend, device):
        asked.append((backend, device.type))
        return "eager"

    with vr.applied(llava.model, [Stride(keep=2)], backend="auto"):
        monkeypatch.setattr(text, "resolve", watched)
        monkeypatch.setattr(executables, "resolve", watched)
        assert vr.report(llava.model).backend == "auto"
        llava.model(**llava.inputs([Row(1)]))
        assert vr.report(llava.model).backend == "eager"
        llava.model(**llava.inputs([Row(0)]))
    assert asked == [("auto", "cpu")] * 2


def test_opaque_operators_stay_in_the_lowered_graph(llava):
    program = vr.rewrite(vr.trace(llava.model, llava.inputs([Row(1)])), SOME)
    kernels: Kernels = "auto"
    lowered = lower(program.graph_module, kernels)
    left = {n.target for n in lowered.graph_module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert {torch.ops.vlm.sts_sample.default, torch.ops.vlm.top_attention.default} <= left
    assert not left & {torch.ops.vlm.attention.default, torch.ops.vlm.kv_append.default, torch.ops.vlm.select.default}
    assert "compilers do not look into" in by_kind(lowered.counts)["sts_sample"][0]["why"]
    assert "compilers do not look into" not in by_kind(lowered.counts)["attention"][0]["why"]


@pytest.mark.slow
def test_where_torch_compile_does_nothing_the_model_says_so(llava):
    inputs = llava.inputs([Row(1)])
    with (
        vr.applied(llava.model, SOME),
        FlopCounterMode(display=False),
        pytest.raises(RuntimeError, match="FlopCounterMode is one"),
    ):
        llava.model(**inputs)
    with vr.applied(llava.model, SOME):
        llava.model(**inputs)


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize(
    "off", [lambda: FlopCounterMode(display=False), lambda: torch.compiler.set_stance("force_eager")]
)
def test_graphs_that_were_forgotten_are_not_counted_nor_kept(off):
    tiny = FAMILIES["llava"]()
    model, inputs = tiny.model, tiny.inputs([Row(1)])
    with vr.applied(model, SOME):
        expected = model(**inputs).logits
        for _ in range(3):
            made_of = SESSIONS[model].executables
            graph, made = next(iter(made_of.items()))
            seen = [weakref.ref(x) for x in (graph, graph.gm)]
            del graph, made
            with off(), pytest.raises(RuntimeError, match="torch.compile does nothing here"):
                model(**inputs)
            assert vr.report(model).graphs["captured"] == 0
            assert vr.report(model).seconds.get("capture", 0) == 0
            assert torch.equal(model(**inputs).logits, expected)
            gc.collect()
            gc.collect()  # what the first one ends refers to them
            assert [r() for r in seen] == [None, None]
            assert vr.report(model).graphs["captured"] == len(made_of) == 1


@pytest.mark.slow
@torch.no_grad()
def test_graphs_live_as_long_as_the_call_that_runs_them(monkeypatch):
    """Another thread has them forgotten meanwhile."""
    tiny = FAMILIES["llava"]()
    model, inputs = tiny.model, tiny.inputs([Row(1)])
    with vr.applied(model, SOME):
        expected, run = model(**inputs).logits, session.Session._run

        def forgetting(self, *args):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            return run(self, *args)

        def elsewhere():
            with FlopCounterMode(display=False), pytest.raises(RuntimeError, match="does nothing here"):
                model(**inputs)

        monkeypatch.setattr(session.Session, "_run", forgetting)
        assert torch.equal(model(**inputs).logits, expected)
        monkeypatch.undo()
        assert torch.equal(model(**inputs).logits, expected)
        assert vr.report(model).graphs["captured"] == 1
