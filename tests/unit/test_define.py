"""Defining an operator, and defining it again, as a notebook does whose cell is run again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmrewrite import ops
from vlmrewrite.ops import define, library

ROOT = Path(__file__).parents[2]
VLM = torch.ops.vlm
X = torch.arange(4.0)


def cell(name, body, fake="lambda x: torch.empty_like(x)", module=__name__, schema="(Tensor x) -> Tensor", more=""):
    """A notebook's cell, with functions of its own each time it runs."""
    code = f"def reference(x):\n    return {body}\ndefine({name + schema!r}, reference, {fake}{more})"
    exec(code, {"__name__": module, "torch": torch, "define": define})


@pytest.mark.parametrize("fake", ["lambda x: torch.empty_like(x)", None], ids=["opaque", "seen through"])
def test_a_cell_runs_again_and_the_changed_body_counts(fake):
    name = f"again_{fake is None}"
    for body, expected in (("x + 1", X + 1), ("x + 1", X + 1), ("x * 3", X * 3)):
        before = ops.replaced()
        cell(name, body, fake)
        operator = getattr(VLM, name).default
        assert torch.equal(operator(X), expected)
        assert torch.equal(library.REFERENCES[operator](X), expected)
        assert torch.equal(torch.func.functionalize(operator)(X), expected)
    assert ops.replaced() == before + 1
    torch.library.opcheck(operator, (X,))


def test_the_very_same_definition_replaces_nothing():
    def reference(x):
        return x.clone()

    for _ in range(2):
        define("very_same(Tensor x) -> Tensor", reference)
        before = ops.replaced()
    define("very_same( Tensor x )->Tensor", reference)
    assert ops.replaced() == before


def test_a_changed_fake_counts_too():
    cell("wider", "torch.cat([x, x])", "lambda x: x.new_empty(2 * x.shape[0])")
    cell("wider", "torch.cat([x, x, x])", "lambda x: x.new_empty(3 * x.shape[0])")
    assert VLM.wider(X).shape == VLM.wider(X.to("meta")).shape == (12,)


def test_a_changed_formula_of_flops_counts():
    for n in (5, 7):
        cell("costly", "x + 0", more=f", flops=lambda x, **_: {n}")
        with FlopCounterMode(display=False) as counter:
            VLM.costly(X)
        assert counter.get_total_flops() == n
    cell("costly", "x + 0")
    with FlopCounterMode(display=False) as counter:
        VLM.costly(X)
    assert counter.get_total_flops() == 0


def test_a_kernel_is_replaced_with_its_fake():
    for n in (2, 3):
        cell("with_kernel", f"x * {n}", more=f", kernel='nowhere:launch{n}', kernel_fake=lambda x: x.new_empty({n})")
        assert torch.ops.vlm_triton.with_kernel(X.to("meta")).shape == (n,)
    assert library.KERNELS[VLM.with_kernel.default] is torch.ops.vlm_triton.with_kernel.default


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema": "(Tensor x, int k=1) -> Tensor"},
            r"as 'kept\(Tensor x\) -> Tensor'; expected the same",
        ),
        ({"schema": "(Tensor y) -> Tensor"}, r"expected the same schema, or another name, got 'kept\(Tensor y\) -> "),
        (
            {"module": "elsewhere"},
            f"by {re.escape(__name__)}, got another definition by elsewhere: choose ",
        ),
        ({"fake": "None"}, "with a fake; expected a definition with a fake, or another name, got one without a fake"),
        ({"more": ", kernel='nowhere:launch'"}, "without a kernel; expected a definition without a kernel"),
        ({"more": ", backward=True"}, "without a backward; expected"),
    ],
    ids=str,
)
def test_what_cannot_be_replaced_stays(change, message):
    cell("kept", "x + 1")
    before = ops.replaced(), library.REFERENCES[VLM.kept.default]
    with pytest.raises(ValueError, match=f"^vlm::kept is defined already.*(?:{message})"):
        cell(**{"name": "kept", "body": "x + 2"} | change)
    assert torch.equal(VLM.kept(X), X + 1)
    assert before == (ops.replaced(), library.REFERENCES[VLM.kept.default])


@pytest.mark.parametrize("name", ["stride_sample", "attention", "dape_cover", "top_attention"])
def test_the_operators_that_are_shipped_cannot_be_replaced(name):
    import vlmrewrite.passes  # noqa: F401 (it defines some of them)

    assert hasattr(VLM, name), "a shipped operator"
    operator = getattr(VLM, name).default
    schema, reference = str(operator._schema).removeprefix(f"vlm::{name}"), library.REFERENCES[operator]
    with pytest.raises(ValueError, match=rf"^vlm::{name} is defined already, by vlmrewrite\.[\w.]+, got "):
        cell(name, "x", schema=schema)
    assert library.REFERENCES[operator] is reference


@pytest.mark.slow
def test_nor_can_they_be_forestalled():
    code = (
        "import sys\n"
        "from vlmrewrite.ops import define\n"
        "assert 'vlmrewrite.passes' not in sys.modules\n"
        "try:\n"
        "    define('stride_sample(Tensor member, Tensor lengths, Tensor keep) -> Tensor', lambda *x: x[0])\n"
        "except ValueError as e:\n"
        "    print(e)\n"
        "from vlmrewrite.passes import Stride"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("vlm::stride_sample is defined already, by vlmrewrite.passes.stride, got another")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("", "expected a schema such as 'name(Tensor x, int k) -> Tensor', got ''"),
        ("nothing", "got 'nothing'"),
        ("one.out(Tensor x) -> Tensor", "got 'one.out(Tensor x) -> Tensor'"),
        ("vlm::one(Tensor x) -> Tensor", "got 'vlm::one(Tensor x) -> Tensor'"),
        ("one(Tensr x) -> Tensor", "the schema 'one(Tensr x) -> Tensor' cannot be used: unknown type specifier"),
        ("one(Tensor x) -> ", "the schema 'one(Tensor x) -> ' cannot be used: "),
    ],
)
def test_schemas_that_are_wrong(schema, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        define(schema, torch.clone, torch.empty_like)
    assert not hasattr(VLM, "one")
