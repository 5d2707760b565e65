"""What of operators, and of tensors without memory, is relied on."""

from __future__ import annotations

import importlib
import operator
import re

import pytest
import torch
from torch import nn

from vlmrewrite import compat


def test_functions_that_come_from_c() -> None:
    assert compat.nn_functions().gelu is torch.nn.functional.gelu


def test_schemas_say_what_is_written_and_what_is_shared() -> None:
    written, viewed, fresh = (
        compat.schema_of(op.default) for op in (torch.ops.aten.relu_, torch.ops.aten.t, torch.ops.aten.relu)
    )
    assert (written.is_mutable, viewed.is_mutable, fresh.is_mutable) == (True, False, False)
    shared = [any(r.alias_info for r in schema.returns) for schema in (written, viewed, fresh)]
    assert shared == [True, True, False]
    assert all(compat.schema_of(x) is None for x in (torch.relu, operator.add, "relu", torch.ops.aten.relu))


def test_the_check_of_a_number() -> None:
    graph = torch.fx.Graph()
    graph.call_function(compat.assert_scalar(), (True, "it is so"))
    graph.output(())
    assert torch.fx.GraphModule(nn.Module(), graph)() == ()
    assert graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default)


def test_tensors_without_memory() -> None:
    with compat.fake_mode() as mode:
        x = mode.from_tensor(torch.ones(3, 4), static_shapes=True)
        assert tuple((x @ torch.ones(4, 10**12)).shape) == (3, 10**12)


def test_operators_are_told_to_a_mode() -> None:
    class Told(compat.dispatch_mode()):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            told.append(func)
            return func(*args, **(kwargs or {}))

    told: list[object] = []
    with Told():
        torch.ones(2).relu()
    assert torch.ops.aten.relu.default in told


def test_values_as_the_class_gives_them() -> None:
    class Model(nn.Module):
        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 0.5)

    block = nn.Sequential(nn.Linear(2, 2))
    compat.initialise(block, Model())
    assert bool((block[0].weight == 0.5).all())
    with pytest.raises(compat.VersionError, match=r"^transformers .* has no Linear\._init_weights "):
        compat.initialise(block, nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("module", "name", "use"),
    [
        ("torch._C", "_nn", compat.nn_functions),
        ("torch._ops", "OpOverload", lambda: compat.schema_of(operator.add)),
        ("torch._subclasses.fake_tensor", "FakeTensorMode", compat.fake_mode),
        ("torch.utils._python_dispatch", "TorchDispatchMode", compat.dispatch_mode),
    ],
)
def test_a_name_that_is_gone(monkeypatch: pytest.MonkeyPatch, module: str, name: str, use) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(compat.VersionError, match=rf"^torch {re.escape(torch.__version__)} has no .*{name} "):
        use()


def test_an_operator_without_a_schema_or_of_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overload:
        """An operator of another torch."""

    monkeypatch.setattr("torch._ops.OpOverload", Overload)
    with pytest.raises(compat.VersionError, match=r"^torch .* has no Overload\._schema "):
        compat.schema_of(Overload())
    monkeypatch.setattr(torch, "ops", object())
    with pytest.raises(compat.VersionError, match=r"^torch .* has no object\.aten\._assert_scalar\.default "):
        compat.assert_scalar()


def test_a_tensor_is_checked_as_it_is_computed() -> None:
    compat.assert_tensor(torch.tensor(True), "told")
    with pytest.raises(RuntimeError, match="told"):
        compat.assert_tensor(torch.tensor(False), "told")
