"""Writes in place, through views too, become new tensors: same numbers, and fine where whole tokens are written."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node

from tests.graph.test_tokenwise import KEPT, H, captured, chosen, example, fed, refusals
from vlmrewrite.analysis.functional import functional
from vlmrewrite.analysis.graph import value
from vlmrewrite.analysis.operators import hidden_write, writes

W = torch.randn(H, H, generator=torch.Generator().manual_seed(1))


def add_to_part(x: Tensor) -> Tensor:
    h = x * 2
    h[..., :4].add_(1)
    return h + 1


def add_before_a_reader(x: Tensor) -> Tensor:
    h = x * 2
    old = h
    h += 1
    return h * old


def read_before_and_behind(x: Tensor) -> Tensor:
    h = x * 2
    before, part = h * 3, h[..., 2:6]
    h *= 5
    return before + h + torch.cat([part, part], -1)


def item(x: Tensor) -> Tensor:
    h = x.clone()
    h[..., 0] = 1
    h[:, :, 3:5] = x[:, :, :2]
    return h * 2


def relu_under_a_view(x: Tensor) -> Tensor:
    h = x * 2
    F.relu(h.transpose(1, 2).unsqueeze(0), True)
    return h


def under_a_permutation(x: Tensor) -> Tensor:
    h = (x * 2).permute(2, 0, 1)
    h += 1
    return h.permute([1, 2, 0]) * x


def copied(x: Tensor) -> Tensor:
    h = torch.zeros_like(x)
    h.copy_(x)
    return h


def pieces(x: Tensor) -> Tensor:
    h = x * 2
    gate, up = h.chunk(2, -1)
    F.silu(gate, inplace=True)
    up += gate
    return h + torch.cat([up, gate], -1)


def one_of_several(x: Tensor) -> Tensor:
    h = x.view(x.shape[0], x.shape[1], 2, H // 2) * 2
    first, second = h.unbind(2)
    first.zero_()
    second.fill_(3)
    return h.flatten(2) * x


def mask_of_groups(x: Tensor) -> Tensor:
    scores = F.linear(x.view(-1, H), W).sigmoid()
    groups = scores.view(-1, 2, H // 2)
    best = groups.topk(2, dim=-1)[0].sum(-1).topk(1, dim=-1)[1]
    mask = torch.zeros_like(groups[..., 0])
    mask.scatter_(1, best, 1)
    seen = mask.unsqueeze(-1).expand(-1, 2, H // 2).reshape(-1, H)
    return scores.masked_fill(~seen.bool(), 0.0).view(x.shape)


def keeps_its_dtype(x: Tensor) -> Tensor:
    h = (x * 2).half()
    h += x
    h.gt_(0.5)
    return h * 3


FINE = [add_to_part, add_before_a_reader, read_before_and_behind, item, relu_under_a_view, copied, pieces]
FINE += [under_a_permutation, one_of_several, mask_of_groups, keeps_its_dtype]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """All captures here are of one code object, and Dynamo makes no more than eight of one."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("f", FINE, ids=lambda f: f.__name__)
def test_a_write_becomes_a_new_tensor(f: Callable[[Tensor], Tensor]) -> None:
    (x, _) = example()
    gm = captured(lambda x: f(x) * 1, x)
    assert not any(writes(n) for n in gm.graph.nodes if n.op.startswith("call"))
    assert refusals(gm) == []
    out = next(iter(reversed(gm.graph.nodes))).args[0][0]
    full, part = gm(*fed(gm, (x,), None))[0], gm(*fed(gm, (x,), KEPT))[0]
    torch.testing.assert_close(full, f(x), rtol=0, atol=0)
    length = next(value(n).shape[1] for n in gm.graph.nodes if n.name == "l_x_")
    torch.testing.assert_close(part, chosen(full, value(out), length))
    assert value(out).dtype == full.dtype


def first_token(x: Tensor) -> Tensor:
    h = x * 2
    h[:, 0] = 0
    return h


def by_mask(x: Tensor) -> Tensor:
    h = x * 2
    h[x > 0] += 1
    return h


@pytest.mark.parametrize("f", [first_token, by_mask], ids=lambda f: f.__name__)
def test_what_writes_to_some_tokens_mixes_them(f: Callable[[Tensor], Tensor]) -> None:
    (x, _) = example()
    gm = captured(lambda x: f(x) * 1, x)
    assert any("part of the token axis" in r or "by another tensor" in r for r in refusals(gm))
    torch.testing.assert_close(gm(*fed(gm, (x,), None))[0], f(x))


def added_out(x: Tensor) -> Tensor:
    h = x * 2
    torch.add(x, 1, out=h)
    return h + 1


def under_an_unknown_view(x: Tensor) -> Tensor:
    h = x * 2
    h.narrow(2, 0, 2).mul_(3)
    return h + 1


def random(x: Tensor) -> Tensor:
    h = x * 2
    h.bernoulli_(1.0)
    return h + 1


@pytest.mark.parametrize("f", [added_out, under_an_unknown_view, random], ids=lambda f: f.__name__)
def test_a_write_that_is_not_known_is_kept_and_refused(f: Callable[[Tensor], Tensor]) -> None:
    (x, _) = example()
    gm = captured(lambda x: f(x) * 1, x)
    assert any("in place" in r for r in refusals(gm))
    assert any(hidden_write(n) for n in gm.graph.nodes)
    gm.graph.eliminate_dead_code(is_impure_node=writes)
    gm.recompile()
    torch.testing.assert_close(gm(*fed(gm, (x,), None))[0], f(x))


def dead(x: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, W)
    h += x
    p = h.view(-1, H).t()
    p.mul_(2)
    g, u = (x * 2).chunk(2, -1)
    g = F.silu(g, inplace=True)
    g *= u
    weights, experts = torch.topk(x, 2)
    weights /= weights.sum(-1, keepdim=True)
    s = x.clone()
    s[..., 0] = 1
    return x * 5, h + p.sum() + g.sum() + weights.sum() + experts.sum() + s.sum()


def test_writes_that_nobody_reads_go() -> None:
    gm = captured(dead, example()[0])
    output = next(iter(reversed(gm.graph.nodes)))
    output.args = ((output.args[0][0],),)
    gm.graph.eliminate_dead_code(is_impure_node=writes)
    assert [n.target for n in gm.graph.nodes if n.op.startswith("call")] == [operator.mul]


VIEWS: dict[str, tuple[str, Any, tuple[Any, ...]]] = {
    "itself": ("call_method", "detach", ()),
    "part": ("call_function", operator.getitem, ((Ellipsis, slice(3)),)),
    "column": ("call_function", operator.getitem, ((Ellipsis, 1),)),
    "tokens": ("call_function", operator.getitem, ((slice(None), slice(1, 4)),)),
    "flat": ("call_method", "reshape", (-1, 2)),
    "turned": ("call_method", "transpose", (0, -1)),
    "rolled": ("call_method", "permute", ()),
    "thick": ("call_method", "unsqueeze", (1,)),
    "half": ("call_method", "chunk", (2, -1)),
    "rows": ("call_method", "unbind", (0,)),
}

WRITES: dict[str, tuple[str, Any, tuple[Any, ...]]] = {
    "add": ("call_method", "add_", (1,)),
    "mul": ("call_function", operator.imul, (2,)),
    "item": ("call_function", operator.setitem, ((Ellipsis, 0), 4)),
    "relu": ("call_function", F.relu, (True,)),
    "nothing": ("call_method", "neg", ()),
}

STEP = st.tuples(st.integers(0, 9), st.sampled_from(sorted(VIEWS)), st.sampled_from(sorted(WRITES)))


@given(st.lists(STEP, min_size=1, max_size=7))
def test_programs_of_views_and_writes(steps: list[tuple[int, str, str]]) -> None:
    graph, given_ = torch.fx.Graph(), torch.randint(-9, 10, (4, 6, 8)).float()
    x = graph.placeholder("x")
    held = [(graph.call_function(operator.add, (x, i)), given_ + i) for i in range(2)]
    nodes, read = [x, held[0][0], held[1][0]], []
    values: list[Any] = [given_, held[0][1], held[1][1]]

    def call(op: str, target: Any, args: tuple[Any, ...], of: tuple[Node, Tensor]) -> tuple[Node, Any]:
        nodes.append(graph.create_node(op, target, (of[0], *args)))
        values.append(getattr(of[1], target)(*args) if op == "call_method" else target(of[1], *args))
        return nodes[-1], values[-1]

    for of, view, write in steps:
        base = held[of % len(held)]
        if base[1].dim() < 2 or min(base[1].shape) < 2 or base[1].numel() % 2:
            continue
        op, target, args = VIEWS[view]
        part = call(op, target, (*range(1, base[1].dim()), 0) if view == "rolled" else args, base)
        if isinstance(part[1], tuple):
            part = call("call_function", operator.getitem, (1,), part)
        held.append(part)
        read.append(call("call_method", "sum", (), base))
        call(*WRITES[write], part)
    outputs = [call("call_method", "clone", (), h) for h in held] + read
    graph.output(tuple(n for n, _ in outputs))
    for node, x_ in zip(nodes, values, strict=True):
        node.meta["example_value"] = x_
    functional(graph)
    graph.lint()
    assert not any(writes(n) for n in graph.nodes if n.op.startswith("call"))
    for a, (_, b) in zip(torch.fx.GraphModule({}, graph)(given_), outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
