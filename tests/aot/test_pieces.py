"""The graph that Inductor gets in pieces: each kind of layer once, and the whole does what the graph does."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

import vlmrewrite as vr
from tests.small import long
from vlmrewrite.lower import behind, pieces
from vlmrewrite.ops import attend
from vlmrewrite.passes import DPVR, STS, VISOR, Stride
from vlmrewrite.testing.models import FAMILIES, ZOO, Row

GREEDY = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}

ROWS = [Row(1, 2, 3), Row(1, 4, 1)]

RECIPES = {
    "sts": [STS(keep=6, refine=3, at=0.5)],
    "stride": [Stride(0.5, at=2)],
    "dpvr": [DPVR()],
    "visor": [VISOR(cross=[0, 4])],
    "both": [STS(keep=6, refine=3, at=0.5), VISOR(cross=[0, 4])],
}


@pytest.fixture
def given(monkeypatch):
    """The graphs that Inductor is given; each runs as it is."""
    graphs = []
    monkeypatch.setattr("vlmrewrite.lower.pieces.inductor", lambda gm: graphs.append(gm) or gm)
    return graphs


def mixers(graphs):
    """How many attentions there are in each graph that has any."""
    counts = [sum(n.target in pieces.MIXERS for n in gm.graph.nodes) for gm in graphs]
    return [n for n in counts if n]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kinds"), [("sts", 1), ("stride", 2), ("dpvr", 3)])
def test_a_kind_of_layer_is_compiled_once_whatever_the_depth(given, name, kinds):
    counts = []
    for depth in (8, 16):
        tiny = FAMILIES["llava"](layers=depth)
        with vr.applied(tiny.model, RECIPES[name], backend="inductor"), torch.no_grad():
            out = tiny.model(**tiny.inputs([Row(1, 2, 3)]))
            prefill = len(given)
            assert len(mixers(given)) == kinds
            tiny.model(input_ids=torch.tensor([[9]]), past_key_values=out.past_key_values)
            assert len(mixers(given[prefill:])) == 1
        counts.append((prefill, len(given) - prefill))
        given.clear()
    assert counts[0] == counts[1]


def results(tiny, recipe, backend, rows=ROWS):
    """Logits of a padded batch's tokens, the loss with labels, and gradients of it."""
    inputs = tiny.inputs(rows, side="left")
    with warnings.catch_warnings(), vr.applied(tiny.model, recipe, backend=backend):
        warnings.simplefilter("ignore")
        weights = [x for x in tiny.model.parameters() if x.dim() == 2 and x.requires_grad]
        out = tiny.model.generate(**inputs, **GREEDY)
        loss = tiny.model(**inputs, labels=inputs["input_ids"]).loss
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.stack(out.logits), loss.detach(), *(x for x in grads if x is not None)]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("recipe", RECIPES)
def test_pieces_do_what_the_graph_does(given, recipe):
    tiny = FAMILIES["llava"](layers=6)
    expected = results(tiny, RECIPES[recipe], "eager")
    assert not given
    got = results(tiny, RECIPES[recipe], "inductor")
    assert max(mixers(given)) < 6
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("name", sorted(ZOO) if long() else ("gemma3", "gemma3n", "qwen2_5_vl", "qwen3_vl", "smolvlm"))
def test_pieces_of_any_family_do_what_its_graph_does(given, name):
    tiny = ZOO[name](layers=6)
    expected, got = (results(tiny, RECIPES["stride"], backend) for backend in ("eager", "inductor"))
    assert given
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_inductor_agrees_in_pieces_and_whole():
    tiny = FAMILIES["llava"](layers=4)
    expected = results(tiny, RECIPES["sts"], "eager", [Row(1, 2, 3)])
    made = []
    for backend in ("inductor", "inductor-whole")[: 1 + long()]:
        counters.clear()
        got = results(tiny, RECIPES["sts"], backend, [Row(1, 2, 3)])
        made.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def repeated(layers, last=None):
    """A graph of layers that attend, with a mask for all, and something of its own in the last."""
    graph = torch.fx.Graph()
    x, mask, *weights = (graph.placeholder(f"x{i}") for i in range(2 + layers))
    seen = graph.call_method("logical_not", (mask,))
    outputs = []
    for i, weight in enumerate(weights):
        q = graph.call_function(torch.matmul, (x, weight))
        y = graph.call_method("transpose", (graph.call_function(attend, (q, q, q, seen, None, None, 0.0)), 1, 2))
        x = graph.call_function(torch.add, (x, last(graph, y) if last and i == layers - 1 else y))
        outputs.append(q)
    graph.output((x, outputs))
    return torch.fx.GraphModule({}, graph)


def tensors(layers, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 5, 4, generator=draw)
    return x, torch.zeros(2, 1, 5, 5, dtype=torch.bool), *(torch.randn(4, 4, generator=draw) for _ in range(layers))


@pytest.mark.parametrize(("layers", "at_once"), [(2, [2]), (3, [3]), (6, [3]), (7, [1]), (8, [4])])
def test_layers_that_follow_one_another_are_called_together_without_a_rest(given, layers, at_once):
    gm, inputs = repeated(layers), tensors(layers)
    made = behind(gm, "inductor")
    assert mixers(given) == at_once
    torch.testing.assert_close(made(*inputs), gm(*inputs), atol=0, rtol=0)


def test_a_layer_that_does_something_else_is_a_piece_of_its_own(given):
    gm, inputs = repeated(5, lambda graph, y: graph.call_function(torch.mul, (y, 2))), tensors(5)
    made = behind(gm, "inductor")
    assert sorted(mixers(given)) == [1, 4]
    torch.testing.assert_close(made(*inputs), gm(*inputs), atol=0, rtol=0)


def test_what_is_written_in_place_keeps_its_order(given, caplog):
    gm = repeated(5, lambda graph, y: graph.call_method("mul_", (y, 2)))
    with caplog.at_level("INFO", "vlmrewrite"):
        assert behind(gm, "inductor") is gm
    assert caplog.messages == ["Inductor is given one piece: something is written in place"]
