"""Lowering: every dialect operator becomes its reference or a kernel, chosen once, and said so.

Operators that are opaque to tracing (the policies, whose loops depend on values) stay operators, so that a compiler
does not look into them either.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx

from vlmrewrite import dialect
from vlmrewrite.legalize import with_blocks
from vlmrewrite.tokenwise import writes

Kernels = Literal["auto", "reference", "triton"]
_SPECIAL = {dialect.ATTENTION, dialect.KV_APPEND}
_WHY = "plain PyTorch: this version has no other kernels"
_WHY_OPAQUE = "plain PyTorch, behind an operator that compilers do not look into"


@dataclass(frozen=True)
class Lowered:
    """A graph that can be run or compiled, and what each kind of dialect operator became."""

    graph_module: torch.fx.GraphModule
    choices: dict[str, dict[str, Any]]


def check_kernels(kernels: str) -> None:
    """Raise if kernels asked for by name cannot run here.

    Raises:
        ValueError: not a known choice.
        RuntimeError: ``"triton"``; there are no Triton kernels yet.
    """
    if kernels not in ("auto", "reference", "triton"):
        raise ValueError(f"kernels={kernels!r}; expected 'auto', 'reference' or 'triton'")
    if kernels == "triton":
        raise RuntimeError("kernels='triton' was asked for, and this version has none; use 'auto' or 'reference'")


def lower(gm: torch.fx.GraphModule, kernels: Kernels = "auto") -> Lowered:
    """Replace every dialect operator that tracing may see through in a copy of the graph.

    The mask of an attention node is computed once for all layers that run on the same sets.

    Raises:
        RuntimeError: see :func:`check_kernels`.
    """
    check_kernels(kernels)
    graph = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, env))
    masks: dict[tuple[object, ...], torch.fx.Node] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for node in list(graph.nodes):
        reference = dialect.REFERENCES.get(node.target)
        if reference is None:
            continue
        opaque = node.target in dialect.OPAQUE - _SPECIAL
        counts[reference.__name__, _WHY_OPAQUE if opaque else _WHY] += 1
        if reference is dialect.kv_append and node.args[0] is None:
            _fold_first_append(graph, node)
        elif reference is dialect.attention:
            _split_attention(graph, node, masks)
        elif not opaque:
            node.target = reference
    graph.eliminate_dead_code(is_impure_node=writes)
    return Lowered(
        with_blocks(gm, graph),
        {name: {"nodes": n, "kernel": "reference", "why": why} for (name, why), n in sorted(counts.items())},
    )


def positioned(gm: torch.fx.GraphModule, plain: bool) -> torch.fx.GraphModule:
    """A copy of a graph captured from a call without images, with each attention's positions taken from the cache.

    Args:
        gm: the captured graph, with a cache.
        plain: no key of the cache is hidden from a query, except by causality.

    Raises:
        RuntimeError: an attention's keys do not come from the cache.
    """
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.find_nodes(op="call_function", target=dialect.ATTENTION):
        append: Any = getattr(node.args[1], "args", (None,))[0]
        if getattr(append, "target", None) is not dialect.KV_APPEND:
            raise RuntimeError(
                f"the keys of {node.name} did not come from vlmrewrite's cache: this model transforms its keys after"
                " the cache, which is not supported"
            )
        with graph.inserting_before(node):
            k_pos = graph.call_function(operator.getitem, (append, 2))
        q, k, v, mask, _, _, scale, _, *rest = node.args
        node.args = (q, k, v, mask, append.args[5], k_pos, scale, plain and mask is None, *rest)
    return torch.fx.GraphModule(gm, graph)


def compiled(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """A graph behind Inductor, as one piece: it runs or it raises."""
    run: Callable[..., Any] = torch.compile(gm, backend="inductor", dynamic=True, fullgraph=True)
    return run


def _fold_first_append(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    for user in list(node.users):
        user.replace_all_uses_with(node.args[3 + int(user.args[1])])  # type: ignore[arg-type]
        graph.erase_node(user)


def _split_attention(
    graph: torch.fx.Graph, node: torch.fx.Node, masks: dict[tuple[object, ...], torch.fx.Node]
) -> None:
    q, k, v, mask, q_pos, k_pos, scale, plain, softcap, dropout = _padded(node.args, 10)
    if q_pos is None or k_pos is None:
        node.target = dialect.attention
        return
    key = (mask, q_pos, k_pos, plain)
    with graph.inserting_before(node):
        if key not in masks:
            masks[key] = graph.call_function(dialect.visible, (mask, q_pos, k_pos, plain))
        new = graph.call_function(dialect.attend, (q, k, v, masks[key], scale, softcap, dropout or 0.0))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _padded(args: tuple[Any, ...], n: int) -> list[Any]:
    return [*args, *[None] * (n - len(args))]
