"""Private interfaces: each is there and does what is expected, and where one is gone the error names the version."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import transformers
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlavaConfig, PreTrainedConfig

from vlmrewrite import compat
from vlmrewrite.compat import dynamo, private
from vlmrewrite.testing.models import TinyVLM

ROOT = Path(__file__).parents[2]


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


@pytest.mark.slow
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
    assert len(found) > 120
    exempt = "vlmrewrite/testing/triton/", "vlmrewrite/compat/"  # the former is about Triton's inside
    assert not {name: x for name, x in found.items() if x and not name.startswith(exempt)}


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
    assert compat.hooks_of(module) == [after, before]


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


def test_memory_of_views() -> None:
    with compat.fake_mode():
        x = torch.empty(3, 4)
        assert compat.memory_of(x) == compat.memory_of(x[1:].t()) != compat.memory_of(x + 1)
        n = x[torch.empty(3) > 0].shape[0]
        assert isinstance(n, torch.SymInt)
        assert (compat.at_most(n), compat.at_most(4 * n), compat.at_most(5)) == (3, 12, 5)


def test_inputs_of_generation(llava: TinyVLM) -> None:
    given = {"token_type_ids": torch.tensor([[0, 1]]), "mm_token_type_ids": torch.tensor([[0, 1]])}
    longer = compat.generation_inputs(llava.model, given)
    assert longer["token_type_ids"].tolist() == [[0, 1, 1]] and longer["mm_token_type_ids"].tolist() == [[0, 1, 0]]
    assert given["token_type_ids"].shape == (1, 2)


def test_positions_of_generation(llava: TinyVLM) -> None:
    ids = torch.full((2, 3), 5)
    given = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    positions = compat.generation_positions(llava.model, ids, given)
    assert positions.shape == (2, 3)
    assert positions[0].tolist() == [0, 1, 2] and positions[1, 1:].tolist() == [0, 1]


def test_inside_torch_compile() -> None:
    def traced(x):
        return x + int(compat.inside_torch_compile())

    assert traced(torch.ones(2)).tolist() == [1, 1]
    assert torch.compile(traced, backend="eager")(torch.ones(2)).tolist() == [2, 2]


def test_a_capture_and_code_that_is_forgotten() -> None:
    graphs, seconds, limits = [], [], []

    def double(x):
        return x * 2

    def backend(gm, _):
        graphs.append(gm)
        limits.append((compat.graph_limit(), torch._dynamo.config.specialize_float))
        return gm

    before = compat.graph_limit(), torch._dynamo.config.specialize_float
    call = compat.captured(double, backend, lambda: 5, bool, seconds.append, "neither")
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


def test_messages_show_symbols() -> None:
    from torch._dynamo.variables import lazy

    kind = lazy.LazySymNodeFormatString
    before = kind.__repr__
    with compat.tracing_options():
        shown = kind.__new__(kind)
        shown.sym_node_var = SimpleNamespace(sym_num=SimpleNamespace(node=SimpleNamespace(expr="s7")))
        assert repr(shown) == "s7"
    assert kind.__repr__ is before


GONE = [
    ("torch._C", "_storage_Use_Count", lambda: compat.memory_is_shared(torch.ones(1), 1)),
    ("torch.utils._pytree", "tree_flatten", lambda: compat.tree_flatten([1])),
    ("torch.utils._pytree", "tree_unflatten", lambda: compat.tree_unflatten([1], None)),
    ("torch.utils._pytree", "tree_leaves", lambda: compat.tree_leaves([1])),
    ("torch._dynamo", "OptimizedModule", lambda: compat.is_compiled(nn.Linear(1, 1))),
    ("torch.cuda", "_sleep", lambda: compat.gpu_sleep(1)),
    ("torch._C._dynamo.eval_frame", "get_eval_frame_callback", compat.inside_torch_compile),
    ("torch._C._dynamo.eval_frame", "reset_code", lambda: compat.forget_code((lambda: 1).__code__)),
    ("torch._dynamo.exc", "FailOnRecompileLimitHit", compat.at_graph_limit),
    ("torch._dynamo.exc", "Unsupported", compat.untraceable),
    ("torch._dynamo.exc", "UserError", compat.untraceable),
    ("torch._dynamo", "optimize", lambda: compat.captured(len, len, lambda: 1, bool, print, "x")),
    ("torch._dynamo.convert_frame", "compile_lock", lambda: compat.tracing_options().__enter__()),
]


@pytest.mark.parametrize(("module", "name", "use"), GONE, ids=[f"{m}.{n}" for m, n, _ in GONE])
def test_a_name_that_is_gone(monkeypatch: pytest.MonkeyPatch, module: str, name: str, use) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    version = re.escape(torch.__version__)
    message = rf"^torch {version} has no {re.escape(module)}\.{name} .* install torch>=2\.11,<2\.14$"
    with pytest.raises(compat.VersionError, match=message):
        use()


@pytest.mark.parametrize("module", ["torch._dynamo.config", "torch.fx.experimental._config"])
def test_an_option_that_is_gone(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    found = dynamo.find
    for part in (dynamo, private):
        monkeypatch.setattr(part, "find", lambda where, name: found(where, "no_option" if where == module else name))
    with pytest.raises(compat.VersionError, match=rf"^torch .* has no {re.escape(module)}\.no_option "):
        compat.tracing_options().__enter__()
    if module == "torch._dynamo.config":
        with pytest.raises(compat.VersionError, match=r"no torch\._dynamo\.config\.no_option"):
            compat.graph_limit()


def test_attributes_that_are_gone(monkeypatch: pytest.MonkeyPatch, llava: TinyVLM) -> None:
    with pytest.raises(compat.VersionError, match=r"^torch .* has no object\._cdata "):
        compat.memory_is_shared(SimpleNamespace(untyped_storage=object), 1)  # type: ignore[arg-type]
    module = nn.Linear(1, 1)
    del module._forward_hooks
    with pytest.raises(compat.VersionError, match=r"^torch .* has no Linear\._forward_hooks "):
        compat.hooks_of(module)
    monkeypatch.setattr(torch._dynamo, "optimize", lambda *_, **__: object())
    with pytest.raises(compat.VersionError, match=r"^torch .* has no object\.callback "):
        compat.captured(len, len, lambda: 1, bool, print, "x")
    with monkeypatch.context() as gone:
        gone.delattr(nn.Module, "_compiled_call_impl")
        with pytest.raises(compat.VersionError, match=r"^torch .* has no Module\._compiled_call_impl "):
            compat.is_compiled(module)


def test_what_transformers_no_longer_has(monkeypatch: pytest.MonkeyPatch, llava: TinyVLM) -> None:
    version = re.escape(transformers.__version__)

    class Renamed:
        _attn_implementation = "sdpa"

    with pytest.raises(compat.VersionError, match=rf"^transformers {version} has no Renamed\._attn_implementation_int"):
        compat.set_attention_implementation(Renamed(), "vlmrewrite")
    with monkeypatch.context() as gone:
        gone.delattr(PreTrainedConfig, "_attn_implementation")
        with pytest.raises(compat.VersionError, match=rf"^transformers {version} has no LlamaConfig\._attn_impl"):
            compat.attention_implementation(llava.model.config.text_config)
    name = "_prepare_position_ids_for_generation"
    monkeypatch.delattr(GenerationMixin, name)
    with pytest.raises(compat.VersionError, match=rf"^transformers {version} has no Llava\w+\.{name} .*<5\.24$"):
        compat.generation_positions(llava.model, torch.ones(1, 1), {})


def test_triton_that_is_another_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    with monkeypatch.context() as gone:
        gone.setattr(triton.runtime, "driver", SimpleNamespace(active=object()))
        message = rf"^triton {re.escape(triton.__version__)} has no SimpleNamespace\.active\.get_current_target "
        with pytest.raises(compat.VersionError, match=message):
            compat.gpu_architecture()
    for name in ("triton", "triton.runtime"):
        monkeypatch.setitem(importlib.import_module("sys").modules, name, None)
    with pytest.raises(compat.VersionError, match=r"^triton is not installed, and .* install triton>=3\.6,<3\.10$"):
        compat.gpu_architecture()
