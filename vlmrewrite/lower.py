"""Lowering: every dialect operator becomes its reference or a kernel, chosen once, and said so."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx

from vlmrewrite import dialect
from vlmrewrite.tokenwise import writes

Kernels = Literal["auto", "reference", "triton"]


@dataclass(frozen=True)
class Lowered:
    """A graph without dialect operators, and what each kind of operator became."""

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
    """Replace every dialect operator in a copy of the graph.

    The mask of an attention node is computed once for all layers that run on the same sets.

    Raises:
        RuntimeError: see :func:`check_kernels`.
    """
    check_kernels(kernels)
    graph = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, env))
    masks: dict[tuple[object, ...], torch.fx.Node] = {}
    counts: Counter[str] = Counter()
    for node in list(graph.nodes):
        reference = dialect.REFERENCES.get(node.target)
        if reference is None:
            continue
        counts[reference.__name__] += 1
        if reference is dialect.kv_append and node.args[0] is None:
            _fold_first_append(graph, node)
        elif reference is dialect.attention:
            _split_attention(graph, node, masks)
        else:
            node.target = reference
    graph.eliminate_dead_code(is_impure_node=writes)
    graph.lint()
    why = "plain PyTorch: this version has no other kernels"
    return Lowered(
        torch.fx.GraphModule(gm, graph),
        {name: {"nodes": n, "kernel": "reference", "why": why} for name, n in sorted(counts.items())},
    )


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
