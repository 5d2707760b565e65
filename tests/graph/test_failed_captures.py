"""What is said of a forward that cannot be captured."""

from __future__ import annotations

import numpy
import pytest
import torch

import vlmrewrite as vr
from tests.small import family
from vlmrewrite.errors import CaptureError
from vlmrewrite.passes import Stride
from vlmrewrite.testing.models import Row

pytestmark = pytest.mark.usefixtures("unshared")


def branches(_, __, out):
    return out * 2 if out.sum() > 0 else out


def prints(_, __, out):
    print(out.mean())


def opens(_, __, out):
    return torch.from_numpy(numpy.frombuffer(open("scale").read())) * out


def counts(_, __, out):
    for _ in range(out.argmax().item() % 3):
        out = out + 1
    return out


def finds(_, __, out):
    return out + 1 if len((out > 0).nonzero()) > 3 else out


def draws(_, __, out):
    return out + numpy.random.default_rng(0).standard_normal()


def fails(_, __, out):
    raise KeyError("nothing there")


def mismatches(_, __, out):
    return out @ torch.ones(3, 3)


def breaks(_, __, out):
    torch._dynamo.graph_break()
    return out


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize(
    ("hook", "why"),
    [
        (branches, "Python branches on a tensor's value; expected torch.where or the like there"),
        (prints, r"Python's print\(\) is called; expected tensor operations alone"),
        (opens, r"Python's open\(\) is called; expected tensor operations alone"),
        (counts, r"Python needs a number that depends on a tensor's values \(.*u0.*\); expected sizes, indices and"),
        (finds, r"Python needs a number that depends on a tensor's values \(u0 > 3\); expected sizes, indices and"),
        (draws, r"Dynamo cannot trace it \(.+\); expected code that torch.compile\(fullgraph=True\) takes"),
        (fails, r"KeyError\('nothing there'\) is raised; expected a call that the unmodified model can run"),
        (mismatches, r"RuntimeError\('a and b must have same .* is raised; expected a call that the unmodified model"),
        (breaks, r"torch._dynamo.graph_break\(\) is called; expected no such call"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@torch.no_grad()
def test_why_a_forward_cannot_be_captured_stands_in_one_line(hook, why):
    tiny = family("llava", layers=2)
    model, inputs = tiny.model, tiny.inputs([Row(1), Row(2)])
    handle = model.model.language_model.layers[1].mlp.register_forward_hook(hook)
    try:
        with vr.applied(model, [Stride(0.5)]), pytest.raises(CaptureError, match=why) as raised:
            model(**inputs)
    finally:
        handle.remove()
    said = str(raised.value)
    assert said.count("\n") == 0 and len(said) < 500
    assert "the forward of LlavaForConditionalGeneration could not be captured as one graph: in " in said
    if hook is not draws:  # which fails in numpy's own code
        assert f"in {hook.__name__}, graph/test_failed_captures.py, line {hook.__code__.co_firstlineno + 1}" in said
    assert raised.value.details.count("\n") > 5 and raised.value.__suppress_context__
