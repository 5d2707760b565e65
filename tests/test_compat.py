"""Private interfaces: each is there and does what is expected."""

from __future__ import annotations

import ast
import importlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import LlamaConfig, LlavaConfig

from vlmrewrite import compat
from vlmrewrite.testing.models import TinyVLM

ROOT = Path(__file__).parents[1]

ELSEWHERE = {
    "vlmrewrite/analysis/aliasing.py": {"torch._ops", "_schema"},
    "vlmrewrite/analysis/memory.py": {
        "torch._subclasses.fake_tensor",
        "torch.utils._python_dispatch",
        "torch.utils._pytree",
    },
    "vlmrewrite/analysis/op_classes.py": {"torch._C"},
    "vlmrewrite/analysis/tokenwise.py": {"torch.utils._pytree"},
    "vlmrewrite/plan/blocks.py": {"_init_weights"},
    "vlmrewrite/rewrite/legalize.py": {"torch.ops.aten._assert_scalar"},
    "vlmrewrite/rewrite/verifier.py": {"torch._subclasses.fake_tensor"},
}
"""Private interfaces that are used without :mod:`vlmrewrite.compat`. It can only shrink."""


def private_names(path: Path, own: set[str]) -> set[str]:
    """Private interfaces of others that a file uses: modules, and attributes whose names are not our own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            private = [f"{node.module}.{a.name}" for a in node.names if re.match("_[^_]", a.name)]
            modules = private or [str(node.module)]
        elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and node.attr not in own:
            whole = ast.unparse(node)
            found.add(whole if re.match(r"(torch|transformers|triton)\.", whole) else node.attr)
        found |= {m for m in modules if re.match(r"(torch|transformers|triton)\b.*(\._|\.experimental)", m)}
    return {name for name in found if not any(name.startswith(f"{other}.") for other in found)}


def test_private_interfaces_are_used_in_one_place() -> None:
    files = [p for folder in ("vlmrewrite", "passes") for p in (ROOT / folder).rglob("*.py") if p.resolve() == p]
    own = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                at_home = isinstance(node, ast.Name) or ast.unparse(node.value) == "self"
                own |= {node.id if isinstance(node, ast.Name) else node.attr} if at_home else set()
    found = {path.relative_to(ROOT).as_posix(): private_names(path, own) for path in files}
    assert len(found) > 150
    exempt = "vlmrewrite/testing/triton/", "vlmrewrite/compat.py"  # the former is about Triton's inside
    assert {name: x for name, x in found.items() if x and not name.startswith(exempt)} == ELSEWHERE


def test_memory_that_is_shared() -> None:
    x = torch.ones(3)
    assert not compat.memory_is_shared(x, 1)
    y = x[1:]
    assert compat.memory_is_shared(x, 1) and not compat.memory_is_shared(x, 2)
    del y
    assert not compat.memory_is_shared(x, 1)


def test_trees() -> None:
    tree = {"a": (1, [2, None]), "b": 3}
    leaves, spec = compat.tree_flatten(tree)
    assert compat.tree_unflatten([2 * x if x else x for x in leaves], spec) == {"a": (2, [4, None]), "b": 6}
    assert compat.tree_leaves(tree, is_leaf=lambda x: isinstance(x, list)) == [1, [2, None], 3]
    assert len(compat.tree_leaves((None, 1), is_leaf=lambda x: x is None)) == 2


def test_hooks() -> None:
    module = nn.Linear(2, 2)
    assert compat.hooks_of(module) == []
    module.register_forward_pre_hook(before := lambda *_: None)
    module.register_forward_hook(after := lambda *_: None)
    module.register_full_backward_hook(back := lambda *_: None)
    assert compat.hooks_of(module) == [after, before, back]


def test_hooks_on_all_modules_are_a_guard() -> None:
    graphs: list[int] = []

    def count(x):
        return x + compat.hooks_on_all_modules()

    def backend(gm, _):
        graphs.append(1)
        return gm.forward

    call = torch.compile(count, backend=backend, fullgraph=True)
    assert call(torch.zeros(1)).item() == compat.hooks_on_all_modules() == 0 and len(graphs) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert compat.hooks_on_all_modules() == 1
        assert call(torch.zeros(1)).item() == 1 and len(graphs) == 2
    finally:
        handle.remove()


def test_models_that_are_compiled() -> None:
    module = nn.Linear(2, 2)
    assert not compat.is_compiled(module) and not compat.is_compiled("nothing of the kind")
    assert compat.is_compiled(torch.compile(module, backend="eager"))
    module.compile(backend="eager")
    assert compat.is_compiled(module)


def test_sleep() -> None:
    assert callable(torch.cuda._sleep)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sleep_and_architecture_of_a_gpu() -> None:
    compat.gpu_sleep(1000)
    torch.cuda.synchronize()
    major, minor = torch.cuda.get_device_capability()
    assert compat.gpu_architecture() == 10 * major + minor


def test_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    assert hasattr(type(triton.runtime.driver), "active")
    assert hasattr(importlib.import_module("triton.backends.nvidia.driver").CudaDriver, "get_current_target")
    active = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=90))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    assert compat.gpu_architecture() == 90


def test_attention_implementation_is_that_of_one_config() -> None:
    config = LlavaConfig(text_config=LlamaConfig(attn_implementation="eager"), attn_implementation="sdpa")
    inside = compat.attention_implementation(config.text_config)
    compat.set_attention_implementation(config, "vlmrewrite")
    assert compat.attention_implementation(config) == "vlmrewrite"
    assert compat.attention_implementation(config.text_config) == inside != "vlmrewrite"


def test_positions_of_generation(llava: TinyVLM) -> None:
    ids = torch.full((2, 3), 5)
    given = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    positions = compat.generation_positions(llava.model, ids, given)
    assert positions.shape == (2, 3)
    assert positions[0].tolist() == [0, 1, 2] and positions[1, 1:].tolist() == [0, 1]


def test_inside_torch_compile() -> None:
    seen = []

    def backend(gm, _):
        return lambda *args: (seen.append(compat.inside_torch_compile()), gm(*args))[1]

    assert not compat.inside_torch_compile()
    assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).tolist() == [2, 2]
    assert len(seen) == 1


def test_a_capture_and_code_that_is_forgotten() -> None:
    graphs, seconds, limits = [], [], []

    def double(x):
        return x * 2

    def backend(gm, _):
        graphs.append(gm)
        limits.append((compat.graph_limit(), torch._dynamo.config.specialize_float))
        return gm

    before = compat.graph_limit(), torch._dynamo.config.specialize_float
    call = compat.captured(double, backend, lambda: 5, seconds.append)
    assert call(torch.ones(3)).tolist() == [2, 2, 2] and len(graphs) == len(seconds) == 1
    assert call(torch.ones(4)).tolist() == [2, 2, 2, 2] and len(graphs) == 1, "sizes are symbols from the start"
    compat.forget_code(double.__code__)
    call(torch.ones(3))
    assert len(graphs) == len(seconds) == 2 and all(s > 0 for s in seconds)
    assert set(limits) == {(5, True)}
    assert (compat.graph_limit(), torch._dynamo.config.specialize_float) == before


def test_what_dynamo_raises() -> None:
    def branches(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(compat.untraceable()):
        torch.compile(branches, backend="eager", fullgraph=True)(torch.ones(2))

    def plain(x, n):
        return x + n.value

    call = torch.compile(plain, backend="eager", fullgraph=True, dynamic=False)
    with compat.graphs_allowed(1):
        call(torch.ones(2), SimpleNamespace(value=1))
        with pytest.raises(compat.at_graph_limit()):
            call(torch.ones(2), SimpleNamespace(value=2))


def test_more_graphs_for_a_while() -> None:
    before = compat.graph_limit()
    with compat.graphs_allowed(before + 3):
        assert compat.graph_limit() == before + 3
    assert compat.graph_limit() == before


def test_while_one_thread_traces_others_do_not() -> None:
    with compat.tracing_options(), ThreadPoolExecutor(1) as other:
        call = torch.compile(lambda x: x + 1, backend=lambda gm, _: gm)
        assert call(torch.ones(1)).item() == 2
        assert not other.submit(torch.compiler.is_compiling).result()
    if hasattr(torch.compiler, "_compile_session_context"):  # torch 2.11 has none
        assert not torch.compiler.is_compiling()


def test_messages_show_symbols() -> None:
    from torch._dynamo.variables import lazy

    kind = lazy.LazySymNodeFormatString
    before = kind.__repr__
    with compat.tracing_options():
        shown = kind.__new__(kind)
        shown.sym_node_var = SimpleNamespace(sym_num=SimpleNamespace(node=SimpleNamespace(expr="s7")))
        assert repr(shown) == "s7"
    assert kind.__repr__ is before
