"""What of Dynamo's and of modules' insides a capture relies on, beside what is in test_compat.py."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.fx
from torch import nn

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

    call = compat.captured(lambda x: x + 1, backend, lambda: 5, lambda _: None)
    assert call(torch.ones(1)).item() == 2
    assert compiling == [False] and not torch.compiler.is_compiling()


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
        compat.captured(len, len, lambda: 1, print)
    if name == "optimize":
        with pytest.raises(compat.VersionError, match=r"no torch\._dynamo\.optimize "):
            compat.inductor(torch.fx.symbolic_trace(nn.Identity()))
