"""A lowered graph without operators of this package: policies by their references, told what the host knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from vlmrewrite import ops
from vlmrewrite.plan import Call, Selection
from vlmrewrite.rewrite import Program, with_blocks


class Told:
    """A policy's reference that is told how many tokens are left of each image, so that it can be traced.

    Args:
        reference: of the policy's operator.
        left: tokens that may be chosen of each image.
        name: of the policy.
    """

    def __init__(self, reference: Callable[..., Any], left: Sequence[int], name: str) -> None:
        self._reference, self._left, self.__name__ = reference, left, f"told_{name}"

    def __call__(self, *args: Any) -> Any:
        """What the policy chose, bool [F]."""
        with ops.counted(self._left):
            return self._reference(*args)


def without_operators(program: Program, gm: fx.GraphModule, call: Call) -> fx.GraphModule:
    """A copy of a lowered graph in which every operator of this package is the function that defines it.

    Args:
        program: what was lowered: one plan.
        gm: what it was lowered to, by references.
        call: an example of the calls that it is for.

    Raises:
        NotImplementedError: how many tokens a policy chooses from depends on which were chosen before.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    selections = program.variants[0].selections
    checks: Any = graph.output_node().args[0][1]  # type: ignore[index]
    for s, check in zip(selections, checks, strict=True):
        _told(s, check, call)
    for node in list(graph.nodes):
        if node.target is torch.ops.vlm.checked.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in ops.REFERENCES:
            node.target = ops.REFERENCES[node.target]
    return with_blocks(gm, graph)


def _told(s: Selection, check: fx.Node, call: Call) -> None:
    """Let the policy of a selection be told."""
    node = check.args[0]
    assert isinstance(node, fx.Node)
    left, exact = call.counts.per_group(s.source, s.per)
    if not exact:
        raise NotImplementedError(
            f"policy {s.policy.name!r} at layer {s.at} chooses among {s.source}, and how many of these an image has"
            " depends on which were chosen: expected a recipe whose sets have a fixed size to export"
        )
    node.target = Told(ops.REFERENCES[node.target], left, s.policy.name)
