"""Lowering: every dialect operator becomes its reference or a kernel, chosen once, and said so.

Operators that are opaque to tracing (the policies, whose loops depend on values) stay operators, so that a compiler
does not look into them either.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.fx

from vlmrewrite import ops
from vlmrewrite.analysis import cast, value, writes
from vlmrewrite.ops import Choice, Kernels, Running, choose, unfit
from vlmrewrite.plan import Call
from vlmrewrite.rewrite import Program, RunResult, with_blocks

_PLAIN = "plain causal attention, PyTorch's own flash attention does it"


class Executable(NamedTuple):
    """One captured graph with a recipe applied.

    Attributes:
        program: what was rewritten.
        backend: what runs it.
        choices: what each kind of dialect operator became, see :func:`by_kind`.
        graphs: the program's graphs, lowered.
        parts: what runs: these graphs, or what a compiler made of them.
    """

    program: Program
    backend: Running
    choices: dict[str, list[dict[str, Any]]]
    graphs: tuple[torch.fx.GraphModule, ...]
    parts: tuple[Callable[..., Any], ...]

    def run(self, inputs: Sequence[Any], call: Call) -> RunResult:
        """Run it on the captured graph's flat inputs."""
        return self.program.execute(self.parts, inputs, call)


class Lowered(NamedTuple):
    """A graph that can be run or compiled, and how many nodes of each kind of dialect operator became what."""

    graph_module: torch.fx.GraphModule
    counts: Counter[tuple[str, Choice]]


def by_kind(counts: Counter[tuple[str, Choice]]) -> dict[str, list[dict[str, Any]]]:
    """For each kind of operator, one entry of ``nodes``, ``kernel`` and ``why`` for each choice made."""
    choices: dict[str, list[dict[str, Any]]] = {}
    for (name, made), n in sorted(counts.items(), key=lambda x: (x[0][0], x[0][1].kernel, x[0][1].why)):
        choices.setdefault(name, []).append({"nodes": n, "kernel": made.kernel, "why": made.why})
    return choices


def lower(gm: torch.fx.GraphModule, kernels: Kernels = "auto", device: torch.device | None = None) -> Lowered:
    """Replace every dialect operator in a copy of the graph: by its kernel, or its reference.

    What an attention's queries see is computed once for all layers that run on the same sets.

    Args:
        gm: a rewritten graph.
        kernels: see :func:`vlmrewrite.ops.choice.choose`.
        device: where it will run; the CPU by default.

    Raises:
        RuntimeError: kernels asked for by name cannot run here, or not for one of the nodes.
    """
    choice = choose(kernels, device or torch.device("cpu"))
    graph = copy.deepcopy(gm.graph)
    counts: Counter[tuple[str, Choice]] = Counter()
    if choice.kernel == "triton":
        counts.update(_gathered(graph, choice))
    seen: dict[object, torch.fx.Node] = {}
    for node in list(graph.nodes):
        reference = ops.REFERENCES.get(node.target)
        if reference is None:
            continue
        made = Choice("reference", choice.why if node.target in ops.KERNELS else "plain PyTorch: it has no kernel")
        if reference is ops.attention:
            made = _attention(graph, node, seen, choice, kernels)
        elif reference is ops.kv_append and node.args[0] is None:
            for item in node.users:
                item.replace_all_uses_with(node.args[3 + item.args[1]])
        elif choice.kernel == "triton" and node.target in ops.KERNELS:
            node.target, made = ops.KERNELS[node.target], choice
        elif node.target in ops.OPAQUE and reference is not ops.kv_append:
            made = replace(made, why=f"{made.why}, behind an operator that compilers do not look into")
        else:
            node.target = reference
        counts[reference.__name__, made] += 1
    graph.eliminate_dead_code(is_impure_node=writes)
    cast(graph)
    return Lowered(with_blocks(gm, graph), counts)


def _attention(
    graph: torch.fx.Graph, node: torch.fx.Node, seen: dict[object, torch.fx.Node], choice: Choice, kernels: Kernels
) -> Choice:
    """Lower one attention node; ``kernels`` is what was asked for."""
    given: list[Any] = [*node.args, *[None] * (10 - len(node.args))]
    q, k, v, mask, q_pos, k_pos, scale, plain, softcap, dropout = given
    reason = unfit(value(q), value(v), dropout or 0.0, kernels, node.name)
    by_kernel, known = choice.kernel == "triton" and reason is None, q_pos is not None and k_pos is not None
    made = choice if by_kernel else Choice("reference", reason or choice.why)
    if not by_kernel and not known:
        node.target = ops.attention
        return made
    plain = plain if not by_kernel or softcap is None else False
    key = (mask, q_pos, k_pos, plain, by_kernel)
    if key not in seen:
        with graph.inserting_before(node):
            how: Any = (ops.kernel_mask if known else ops.kernel_mask_everywhere) if by_kernel else ops.visible
            seen[key] = graph.call_function(how, (mask, *((q_pos, k_pos) if known else (q, k)), plain))
    rest = () if by_kernel else (dropout or 0.0,)
    node.target = ops.kernel_attention if by_kernel else ops.attend
    node.args = (q, k, v, seen[key], scale, softcap, *rest)
    if not by_kernel or not plain:
        return made
    if plain is True:
        return Choice("sdpa", _PLAIN)
    return replace(made, why=f"{made.why}; in calls where it turns out {_PLAIN}")


def _gathered(graph: torch.fx.Graph, choice: Choice) -> Counter[tuple[str, Choice]]:
    """Make one launch of the selections of the same tokens from several tensors, where the first of them stands."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    groups: list[list[Any]] = []
    for node in graph.find_nodes(op="call_function", target=torch.ops.vlm.select.default):
        x, index, *_ = node.args
        group = next((g for g in groups if g[0].args[1] is index and order[x] < order[g[0]]), None)
        if group is None:
            groups.append(group := [])
        group.append(node)
    for nodes in groups:
        with graph.inserting_before(nodes[0]):
            dims = [n.args[2] if len(n.args) > 2 else 1 for n in nodes]
            given: Any = ([n.args[0] for n in nodes], dims, nodes[0].args[1])
            many = graph.call_function(ops.KERNELS[torch.ops.vlm.gather.default], given)
        for i, node in enumerate(nodes):
            node.target, node.args = operator.getitem, (many, i)
    return Counter({("select", replace(choice, why=f"{choice.why}; one launch for a set")): len(groups)})
