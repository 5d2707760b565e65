"""What may run on a subset of the tokens: refused where tokens mix, and equal to the full run where it is said to."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from vlmrewrite import compat
from vlmrewrite.analysis.functional import functional
from vlmrewrite.analysis.graph import needed, reachable, same, value
from vlmrewrite.analysis.operators import writes
from vlmrewrite.analysis.tokenwise import not_token_wise
from vlmrewrite.ops.selection import select

B, T, H = 3, 6, 8
KEPT = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5], [0, 1, 2, 3]])  # each row keeps its own tokens
G = torch.Generator().manual_seed(1)
W, GAIN = torch.randn(H, H, generator=G), torch.randn(H, generator=G)
MIX, PAST = torch.randn(3, T, generator=G), torch.randn(B, 5, generator=G)


def captured(f: Any, *inputs: Tensor, static: tuple[int, ...] = (2,)) -> GraphModule:
    """The graph of f(x [B, T, H], y [1, T, H])."""
    graphs = []

    def backend(gm: GraphModule, _: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    for x in (W, GAIN):
        torch._dynamo.mark_static(x)  # as parameters are
    torch._dynamo.mark_static(MIX, 0)
    torch._dynamo.mark_static(PAST, 1)
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 1)
        for d in static:
            torch._dynamo.mark_static(x, d)
    with compat.tracing_options():
        torch.compile(f, backend=backend, fullgraph=True, dynamic=True)(*inputs)
    functional(graphs[0].graph)
    graphs[0].recompile()
    return graphs[0]


def example() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, T, H, generator=g), torch.randn(1, T, H, generator=g)


def inputs_of(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def stream(gm: GraphModule) -> tuple[Node, Any, list[Node]]:
    """The input x, its length, and the nodes that depend on it."""
    x = next(n for n in inputs_of(gm) if n.name == "l_x_")
    inside = reachable([x])
    return x, value(x).shape[1], [n for n in gm.graph.nodes if n in inside and n.op.startswith("call")]  # type: ignore[attr-defined]


def arity(f: Any) -> int:
    return f.__code__.co_argcount


def flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def rotate(x: Tensor) -> Tensor:
    return torch.cat((-x[..., H // 2 :], x[..., : H // 2]), dim=-1)


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, 2, H // 2).transpose(1, 2)


def routed(x: Tensor) -> Tensor:
    """A router's weights, normalised in place."""
    weights, experts = torch.topk(F.linear(flat(x), W).softmax(-1), 2, dim=-1)
    weights /= weights.sum(-1, keepdim=True)
    return torch.zeros_like(flat(x)).scatter_(1, experts, weights).view(x.shape)


def grown(x: Tensor) -> Tensor:
    h = x * 2
    h += F.linear(x, W)
    return F.relu(h.mul_(3), inplace=True)


FINE: dict[str, Any] = {
    "norm of hidden": lambda x: torch.norm(x, 2, -1),
    "norm of hidden, method": lambda x: x.norm(2, -1, keepdim=True),
    "vector norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "topk": lambda x: x.topk(1),
    "looked up in a list of numbers": lambda x: W[0][x.topk(2).indices],
    "looked up in a table": lambda x: W[flat(x).argmax(-1)],
    "topk, last": lambda x: torch.topk(x, 2, dim=-1).values,
    "kthvalue": lambda x: x.kthvalue(2).values,
    "sort": lambda x: x.sort().values,
    "argsort": lambda x: x.argsort(descending=True),
    "cumsum of hidden": lambda x: x.cumsum(-1),
    "glu": lambda x: F.glu(x),
    "softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "mean of several": lambda x: heads(x).mean((1, 3)),
    "var": lambda x: torch.var(x, -1, unbiased=False),
    "max of hidden": lambda x: x.max(-1).values,
    "max of two": lambda x: torch.max(x, x * 2),
    "amax": lambda x: x.amax(dim=2),
    "rms norm by hand": lambda x: GAIN * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "layer norm": lambda x: F.layer_norm(x, (H,), GAIN),
    "rms norm": lambda x: F.rms_norm(x, (H,)),
    "merged and parted": lambda x: F.silu(F.linear(flat(x), W)).view(x.shape[0], x.shape[1], H),
    "merged": lambda x: flat(x).softmax(-1).chunk(2, -1)[1],
    "flatten the front": lambda x: x.flatten(0, 1) * 2,
    "heads repeated": lambda x: heads(x)[:, :, None].expand(-1, -1, 3, -1, -1).reshape(x.shape[0], 6, -1, H // 2),
    "heads and back": lambda x: rotate(heads(x)).transpose(1, 2).reshape(x.shape[0], -1, H),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)).permute(0, 2, 1, 3),
    "stack": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2),
    "stack in front": lambda x: torch.stack([x, x * 2]).sum(0),
    "stack before the tokens": lambda x: torch.stack([x, x * 2], dim=-3),
    "cat of lists": lambda x: torch.cat([x, x * 2, x], -1),
    "concat of lists": lambda x: torch.concat([x, x * 2], -1),
    "rows copied and parted": lambda x: flat(x).repeat(3, 1).view(3, -1, H).sum(0),
    "split": lambda x: torch.split(x, [2, 6], dim=-1)[1],
    "pieces in place": lambda x: (x * 1).chunk(2, -1)[0].add_(1),
    "unbind": lambda x: heads(x).unbind(1)[1],
    "slices of hidden": lambda x: x[..., 2:5] + x[:, :, 5:],
    "all tokens": lambda x: x[:, : x.shape[1], None, :3],
    "side table": lambda x, y: heads(x) * y[:, None, :, : H // 2] + rotate(heads(x)) * y[:, None, :, H // 2 :],
    "where": lambda x, y: torch.where(x > y, x, 0.0),
    "masked fill": lambda x, y: x.masked_fill(y.sum(-1, keepdim=True) > 0, 0.0),
    "expand": lambda x: x.mean(-1, keepdim=True).expand(-1, -1, H),
    "tokens first": lambda x: x.transpose(0, 1).softmax(-1).reshape(-1, x.shape[0], 2, 4).permute(1, 0, 2, 3),
    "repeat of hidden": lambda x: x.repeat(1, 1, 2).repeat_interleave(2, dim=-1),
    "zeros": lambda x: x + x.new_zeros(x.shape[0], x.shape[1], 1) + x.new_ones(H),
    "matmul": lambda x: x @ W,
    "matmul with a vector": lambda x: x @ GAIN,
    "matmul on the left": lambda x: torch.matmul(W, x.transpose(1, 2)),
    "matmul by head": lambda x: heads(x) @ W[: H // 2].view(2, H // 2, H // 2),
    "matmul by token": lambda x: flat(x)[:, None, :] @ flat(x)[:, :, None],
    "dropout": lambda x: F.dropout(x, 0.0, True) + F.dropout(x, 0.5, False),
    "casts": lambda x: x.to(torch.float64).float().type_as(x).contiguous(),
    "cast like another": lambda x: x.type_as(x.transpose(1, 2)),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(heads(x).reshape(*heads(x).shape[:-1], -1, 2))),
    "gather": lambda x: x.gather(-1, x.argsort(-1)),
    "bools": lambda x: (x > 0) & (x < 1) | (x > 2),
    "squeeze": lambda x: x[:, None].squeeze(1),
    "router": routed,
    "in place": grown,
}

MIXED: dict[str, tuple[Any, str]] = {
    "norm of tokens": (lambda x: torch.norm(x, 2, 1), "along the token axis"),
    "norm of tokens, method": (lambda x: x.norm(2, 1), "along the token axis"),
    "norm of all": (lambda x: x.norm(), "all dimensions"),
    "normalize": (lambda x: F.normalize(x), "along the token axis"),
    "topk": (lambda x: x.topk(2, dim=1).values, "along the token axis"),
    "topk, positional": (lambda x: torch.topk(x, 2, -2).values, "along the token axis"),
    "kthvalue": (lambda x: x.kthvalue(2, 1).values, "along the token axis"),
    "sort": (lambda x: x.sort(1).values, "along the token axis"),
    "argsort": (lambda x: x.argsort(dim=-2), "along the token axis"),
    "cumsum": (lambda x: torch.cumsum(x, 1), "along the token axis"),
    "glu": (lambda x: F.glu(x.transpose(1, 2)), "along the token axis"),
    "softmax": (lambda x: x.softmax(-2), "along the token axis"),
    "max": (lambda x: x.max(1).values, "along the token axis"),
    "min of all": (lambda x: x.min(), "all dimensions"),
    "numpy's axis": (lambda x: x.mean(axis=1), "along the token axis"),
    "mean of several": (lambda x: x.mean((1, 2)), "along the token axis"),
    "mean of none": (lambda x: x.mean(()), "all dimensions"),
    "var of all": (lambda x: x.var(False), "all dimensions"),
    "roll": (lambda x: torch.roll(x, 1, 1), "along the token axis"),
    "flip": (lambda x: x.flip(1), "not known"),
    "mean of merged": (lambda x: flat(x).mean(0), "along the token axis"),
    "slice of merged": (lambda x: flat(x)[1:], "part of the token axis"),
    "softmax of merged": (lambda x: x.transpose(1, 2).flatten(1).softmax(-1), "along the token axis"),
    "softmax of scores by row": (lambda x: x.sum(-1).view(-1).softmax(0), "along the token axis"),
    "gram of merged": (lambda x: x @ flat(x).T, "not known"),
    "gram of merged, t": (lambda x: x @ flat(x).t(), "two activations"),
    "merged on the right": (lambda x: flat(x).t() @ flat(x), "two activations"),
    "scores": (lambda x: x @ x.transpose(1, 2), "two activations"),
    "bmm": (lambda x: torch.bmm(x.transpose(1, 2), x), "two activations"),
    "mixer": (lambda x: torch.matmul(MIX, x), "two activations"),
    "mixer, linear": (lambda x: F.linear(x.transpose(1, 2), MIX), "weight has a token axis"),
    "linear with tokens": (lambda x: F.linear(GAIN, flat(x)), "weight has a token axis"),
    "pairs of tokens": (lambda x: x.reshape(x.shape[0], -1, 2 * H), "takes tokens apart"),
    "halves": (lambda x: x.view(x.shape[0], x.shape[1] // 2, 2 * H), "takes tokens apart"),
    "half tokens": (lambda x: x.view(x.shape[0], x.shape[1] * 2, H // 2), "takes tokens apart"),
    "tokens into rows": (lambda x: x.view(x.shape[0] * 2, -1, H), "takes tokens apart"),
    "scrambled heads": (lambda x: heads(x).reshape(x.shape[0], -1, H), "takes tokens apart"),
    "heads merged into tokens": (lambda x: heads(x).reshape(-1, H // 2), "takes tokens apart"),
    "heads merged into rows": (lambda x: heads(x).flatten(0, 1), "takes tokens apart"),
    "rows reordered": (lambda x: x.transpose(0, 1).reshape(x.shape[1], H, -1), "takes tokens apart"),
    "first row": (lambda x: x[0], "part of the batch axis"),
    "row selected": (lambda x: x.select(0, 0), "along the batch axis"),
    "mean of rows": (lambda x: x.mean(0), "along the batch axis"),
    "mean of rows by numpy's axis": (lambda x: x.amax(dim=-3), "along the batch axis"),
    "cat of rows": (lambda x: torch.cat([x, x * 2]), "along the batch axis"),
    "chunks of rows": (lambda x: x.chunk(3)[0], "along the batch axis"),
    "pairs of rows": (lambda x: x[:, None] + x, "two batch axes meet"),
    "product over rows": (lambda x: x.transpose(0, 2) @ PAST, "sums over the batch axis"),
    "merged the other way": (lambda x: x.transpose(0, 1).reshape(-1, H), "takes tokens apart"),
    "flatten": (lambda x: x.flatten(1), "takes tokens apart"),
    "flatten all": (lambda x: x.flatten(), "takes tokens apart"),
    "layer norm": (lambda x: F.layer_norm(x, (x.shape[1], H)), "normalises over"),
    "rms norm": (lambda x: F.rms_norm(x.transpose(1, 2), (x.shape[1],)), "normalises over"),
    "first token": (lambda x: x[:, 0], "part of the token axis"),
    "last tokens": (lambda x: x[:, -2:], "part of the token axis"),
    "every other": (lambda x: x[:, ::2], "part of the token axis"),
    "after an ellipsis": (lambda x: x[..., :2, :], "part of the token axis"),
    "boolean mask": (lambda x: x[:, torch.arange(x.shape[1]) > 2], "indexed by another tensor"),
    "tokens looked up by number": (lambda x: x[x[:, 0].argmax(-1) % 2], "indexed by another tensor"),
    "list of tokens": (lambda x: x[:, [0, 1]], "indexed by another tensor"),
    "select": (lambda x: x.select(1, 0), "along the token axis"),
    "chunk": (lambda x: x.chunk(2, 1)[0], "along the token axis"),
    "split of merged": (lambda x: torch.split(flat(x), 2)[0], "along the token axis"),
    "concat of tokens": (lambda x: torch.concat([x, x * 2], 1), "along the token axis"),
    "cat of tokens": (lambda x: torch.cat([x, x * 2], 1), "along the token axis"),
    "cat of tokens, negative": (lambda x: torch.cat((x, x * 2), dim=-2), "along the token axis"),
    "repeat": (lambda x: x.repeat(1, 2, 1), "not the same"),
    "two token axes": (lambda x: x.sum(-1)[:, :, None] + x.sum(-1)[:, None, :], "two token axes meet"),
    "masked by the others": (lambda x: x.sum(-1)[:, None].masked_fill(x[..., :1] > 0, 0.0), "two token axes meet"),
    "expanded to pairs": (lambda x: x.sum(-1)[:, None].expand(-1, x.shape[1], -1), "two token axes meet"),
    "as many features as tokens": (lambda x: x[..., : x.shape[1] // 3], "number of tokens"),
    "halves of numbers": (lambda x: x.transpose(1, 2).contiguous().view(torch.int16), "takes tokens apart"),
    "mean by hand": (lambda x: x / x.shape[1], "number of tokens"),
    "root of the length": (lambda x: x * x.shape[1] ** 0.5, "number of tokens"),
    "gather of tokens": (lambda x: x.gather(1, x.argsort(-1) % 2), "along the token axis"),
    "scatter to the first token": (
        lambda x: x.scatter(-1, x.new_zeros(x.shape[0], 1, 1).long(), 1.0) * x,
        "axes of its inputs are not the same",
    ),
    "squeeze": (lambda x: x.squeeze(), "all dimensions"),
    "padded": (lambda x: F.pad(x, (0, 0, 1, -1)), "not known"),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), "not known"),
    "einsum": (lambda x: torch.einsum("bth,bsh->bts", x, x), "not known"),
}


@pytest.mark.parametrize("f", FINE.values(), ids=FINE)
def test_fine_on_a_subset(f: Any) -> None:
    given = example()[: arity(f)]
    gm = captured(f, *given)
    _, length, inside = stream(gm)
    assert [(n.name, not_token_wise(n, length)) for n in inside if not_token_wise(n, length) is not None] == []
    full, part = gm(*fed(gm, given, None)), gm(*fed(gm, given, KEPT))
    outputs = next(iter(reversed(gm.graph.nodes))).args[0]
    assert len(full) == len(part) == len(outputs) > 0
    for node, a, b in zip(outputs, full, part, strict=True):
        torch.testing.assert_close(b, chosen(a, value(node), length))


def fed(gm: GraphModule, given: tuple[Tensor, ...], kept: Tensor | None) -> list[Any]:
    """What to call the graph with, for all tokens or for those kept."""
    length, out = stream(gm)[1], []
    for n in inputs_of(gm):
        x = value(n)
        if isinstance(x, Tensor):
            real = next(
                t
                for t in (*given, W, GAIN)
                if t.shape == tuple(size.node.hint if hasattr(size, "node") else size for size in x.shape)
            )
            out.append(select(real, kept) if kept is not None and any(same(size, length) for size in x.shape) else real)
        else:
            out.append(len(KEPT[0]) if kept is not None and same(x, length) else x.node.hint)
    return out


def chosen(full: Tensor, like: Any, length: Any) -> Tensor:
    """The kept tokens of a full result, which may be merged with the rows."""
    symbolic = [d for d, n in enumerate(like.shape) if hasattr(n, "node") and n.node.expr.free_symbols]
    (d,) = (d for d in symbolic if length.node.expr in like.shape[d].node.expr.free_symbols)
    if len(symbolic) == 1:
        return select(full.unflatten(d, (B, T)).movedim((d, d + 1), (0, 1)), KEPT).flatten(0, 1).movedim(0, d)
    (r,) = (r for r in symbolic if r != d)
    return select(full.movedim((r, d), (0, 1)), KEPT).movedim((0, 1), (r, d))


@pytest.mark.parametrize(("f", "reason"), MIXED.values(), ids=MIXED)
def test_mixing_is_refused(f: Any, reason: str) -> None:
    gm = captured(f, *example()[: arity(f)])
    _, length, inside = stream(gm)
    reasons = [r for r in (not_token_wise(n, length) for n in inside) if r is not None]
    assert any(reason in r for r in reasons), reasons


@pytest.mark.parametrize(
    "f", [lambda x: x.view(2, -1, H), lambda x: x.view(1, -1, 2 * H), lambda x: x.view(x.shape[1], 2, -1)]
)
def test_one_row(f: Any) -> None:
    gm = captured(f, example()[1], static=(0, 2))
    assert [not_token_wise(n, stream(gm)[1]) is None for n in stream(gm)[2]] == [
        f(example()[1]).shape[1:] == (2, H // 2)
    ]


def test_groups_of_rows() -> None:
    gm = captured(lambda x: x.view(2, -1, x.shape[1], H).sum(0), torch.randn(4, T, H))
    assert "takes tokens apart" in str(not_token_wise(stream(gm)[2][0], stream(gm)[1]))


def refusals(gm: GraphModule) -> list[str]:
    """Those that the rewrite comes across."""
    _, length, inside = stream(gm)
    wanted = needed([next(iter(reversed(gm.graph.nodes)))])
    return [r for n in inside if n in wanted and (r := not_token_wise(n, length)) is not None]


def test_sizes_read_in_the_graph() -> None:
    def f(x: Tensor) -> Tensor:
        rows, tokens, hidden = x.shape
        x = F.linear(x, W)
        return x.view(-1, hidden).view(rows, tokens, hidden)

    gm = captured(f, example()[0], static=())
    assert "size" in {n.target for n in stream(gm)[2]}
    assert refusals(gm) == []


# ---- writes in place


def test_a_write_to_an_input_is_kept() -> None:
    gm = captured(lambda x: x.transpose(1, 2).mul_(2).shape[0], example()[0])
    nodes = {n.target: n for n in gm.graph.nodes}
    assert writes(nodes["mul_"])
    assert not writes(nodes["transpose"])
    assert "in place" in str(not_token_wise(nodes["mul_"], stream(gm)[1]))


def test_names_do_not_make_writes() -> None:
    gm = captured(lambda x: ((x > 0) & (x < 1) | (x > 2)).__and__(x > 0) ^ (x > 3), example()[0])
    assert not any(writes(n) for n in gm.graph.nodes if n.op.startswith("call"))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for target, expected in (
        ("__and__", False),
        ("__len__", False),
        ("__iadd__", True),
        ("add_", True),
        ("add", False),
    ):
        assert writes(graph.call_method(target, (x, x))) is expected, target
    for target, expected in ((operator.and_, False), (operator.is_, False), (operator.iadd, True), (torch.relu_, True),
                             (torch.ops.aten.add.Tensor, False), (torch.ops.aten.add_.Tensor, True)):  # fmt: skip
        assert writes(graph.call_function(target, (x, x))) is expected, target
    for kwargs, expected in (({"inplace": False}, False), ({"inplace": True}, True)):
        for function in (F.relu, F.silu, F.dropout, F.leaky_relu, F.threshold):
            assert writes(graph.call_function(function, (x,), kwargs)) is expected
    assert writes(graph.call_function(F.dropout, (x, 0.5, True, True)))
    assert not writes(graph.call_function(F.dropout, (x, 0.5, True)))
    assert writes(graph.call_function(F.leaky_relu, (x, 0.1, True)))


def test_arithmetic_on_sizes_is_no_write() -> None:
    def f(x: Tensor) -> Tensor:
        n = x.shape[1]
        n += 1
        return x.new_zeros(n - 1, 2 * n)

    assert not any(writes(n) for n in captured(f, example()[0]).graph.nodes if n.op.startswith("call"))
