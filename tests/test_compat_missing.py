"""Where a private interface is gone, the error names it, the installed version and the versions that have it."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig

from vlmrewrite import compat
from vlmrewrite.testing.models import TinyVLM

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
    ("torch._dynamo", "optimize", lambda: compat.captured(len, len, lambda: 1, print)),
    ("torch._dynamo", "optimize", lambda: compat.inductor(torch.fx.symbolic_trace(nn.Identity()))),
    ("torch.nn.modules.module", "_global_forward_hooks", lambda: compat.captured(len, len, lambda: 1, print)),
    ("torch.nn.modules.module", "_global_forward_pre_hooks", lambda: compat.captured(len, len, lambda: 1, print)),
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
    found = compat._find
    monkeypatch.setattr(compat, "_find", lambda where, name: found(where, "no_option" if where == module else name))
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
        compat.captured(len, len, lambda: 1, print)
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
