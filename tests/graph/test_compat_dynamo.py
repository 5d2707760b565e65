"""What of Dynamo's and of modules' insides a capture relies on, beside what is in test_compat.py."""

from __future__ import annotations

import importlib
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.eval_frame
import torch.fx
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from vlmrewrite import compat


def test_hooks_on_all_modules_are_a_guard() -> None:
    graphs: list[int] = []

    def count(x):
        return x + compat.global_hooks()

    def backend(gm, _):
        graphs.append(1)
        return gm.forward

    call = torch.compile(count, backend=backend, fullgraph=True)
    assert call(torch.zeros(1)).item() == compat.global_hooks() == 0 and len(graphs) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert compat.global_hooks() == 1
        assert call(torch.zeros(1)).item() == 1 and len(graphs) == 2
    finally:
        handle.remove()


def test_hooks_around_the_backward_are_seen() -> None:
    module = nn.Linear(2, 2)
    module.register_full_backward_hook(hook := lambda *_: None)
    assert compat.hooks_of(module) == [hook]


def test_while_one_thread_traces_others_do_not() -> None:
    compiling = []

    def backend(gm, _):
        with ThreadPoolExecutor(1) as other:
            compiling.append(other.submit(torch.compiler.is_compiling).result())
        return gm.forward

    call = compat.captured(lambda x: x + 1, backend, lambda: 5, bool, lambda _: None, "model")
    assert call(torch.ones(1)).item() == 2
    assert compiling == [False] and not torch.compiler.is_compiling()


def test_a_graph_runs_while_another_thread_is_in_a_tracer_of_fx() -> None:
    ran: list[int] = []

    def backend(gm, _):
        def run(*inputs):
            ran.append(1)
            return gm.forward(*inputs)

        return run

    def traced(x):
        with ThreadPoolExecutor(1) as other:
            assert other.submit(call, torch.ones(1)).result().item() == 2
        return x

    call = compat.captured(lambda x: x + 1, backend, lambda: 5, bool, lambda _: None, "model")
    make_fx(traced)(torch.ones(1))
    assert ran == [1]


def test_no_count_of_frames_that_threads_share(monkeypatch) -> None:
    name = "set_fullgraph_compiled_frame_count"
    if not hasattr(torch._dynamo.eval_frame, name):
        pytest.skip("this torch counts no frames")
    counted: list[int] = []
    monkeypatch.setattr(torch._dynamo.eval_frame, name, lambda n: counted.append(n) or 0)
    call = compat.captured(lambda x: x + 1, lambda gm, _: gm.forward, lambda: 5, bool, lambda _: None, "model")
    assert call(torch.ones(1)).item() == 2 and not counted


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.nn.modules.module", "_global_forward_hooks"),
        ("torch.nn.modules.module", "_global_forward_pre_hooks"),
        ("torch._dynamo", "optimize"),
    ],
)
def test_what_a_capture_needs_is_gone(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(compat.VersionError, match=rf"^torch .* has no {module}\.{name} "):
        compat.captured(len, len, lambda: 1, bool, print, "model")
    if name == "optimize":
        with pytest.raises(compat.VersionError, match=r"no torch\._dynamo\.optimize "):
            compat.inductor(torch.fx.symbolic_trace(nn.Identity()))


def test_what_hangs_on_the_fixed_argument_has_one_size():
    """Dynamo lets tensors that a model keeps beside its parameters vary: they would look like a batch's."""

    class Kept:
        def __init__(self, size):
            self.left = torch.ones(2, size)

    def add(model, other):
        return other @ model.left

    made = []
    for fixed in ("model", "neither"):
        own, graphs = types.FunctionType(add.__code__.replace(), globals()), []
        call = compat.captured(own, lambda gm, _, g=graphs: g.append(gm) or gm.forward, lambda: 5, bool, print, fixed)
        for size, rows in ((3, 4), (3, 5), (6, 4)):
            assert call(Kept(size), torch.ones(rows, 2)).shape == (rows, size)
        made.append(len(graphs))
    assert made == [2, 1]


def test_a_tensor_that_stays_where_it_is_is_told_to_backends_and_no_guard() -> None:
    told: list[object] = []

    def backend(gm, _):
        told.append(
            [n.meta["tensor_dict"].get("_dynamo_static_input_type") for n in gm.graph.find_nodes(op="placeholder")]
        )
        return gm.forward

    call = torch.compile(torch.add, backend=backend, fullgraph=True)
    for _ in range(2):
        call(compat.stays_where_it_is(torch.zeros(3)), torch.ones(3))
    assert told == [["unguarded", None]]
