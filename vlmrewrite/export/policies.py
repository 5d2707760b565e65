"""A lowered graph without operators of this package: policies by their references, told what the host knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from vlmrewrite import ops
from vlmrewrite.plan import GROUPED, Call, Extra, Selection
from vlmrewrite.rewrite import Program, with_blocks

_OF_IMAGES = (*GROUPED, "keep", "vision_tokens", "image_of_token", "of_videos")
"""Kinds of inputs of a rewritten graph that are the same for all prompts with images of the same sizes."""


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

    What a policy chooses by the images' sizes alone is a constant in it.

    Args:
        program: what was lowered: one plan.
        gm: what it was lowered to, by references.
        call: an example of the calls that it is for.

    Raises:
        NotImplementedError: how many tokens a policy chooses from depends on which were chosen before.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    made = with_blocks(gm, graph)
    rewritten = program.variants[0] if program.variants else None
    checks: Any = made.graph.output_node().args[0][1] if rewritten else ()  # type: ignore[index]
    for s, check in zip(rewritten.selections if rewritten else (), checks, strict=True):
        assert rewritten is not None
        _told(made, s, check, call, rewritten.extras)
    for node in list(made.graph.nodes):
        if node.target is torch.ops.vlm.checked.default:
            node.replace_all_uses_with(node.args[0])
            made.graph.erase_node(node)
        elif node.target in ops.REFERENCES:
            node.target = ops.REFERENCES[node.target]
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def _told(gm: fx.GraphModule, s: Selection, check: fx.Node, call: Call, extras: Sequence[Extra]) -> None:
    """Let a policy be told what the images decide; or put what it chooses by these alone in its place."""
    node = check.args[0]
    assert isinstance(node, fx.Node)
    places = gm.graph.find_nodes(op="placeholder")
    known = {x: e for x, e in zip(places[len(places) - len(extras) :], extras, strict=True) if e.kind in _OF_IMAGES}
    reference = ops.REFERENCES[node.target]
    if all(x in known for x in node.all_input_nodes):
        given = fx.node.map_arg(node.args, lambda x: call.fill(known[x]))
        gm.register_buffer(name := f"chosen_{node.name}", reference(*given), persistent=False)
        with gm.graph.inserting_before(node):
            node.replace_all_uses_with(gm.graph.get_attr(name))
        gm.graph.erase_node(node)
        return
    left, exact = call.counts.per_group(s.source, s.per)
    if not exact:
        raise NotImplementedError(
            f"policy {s.policy.name!r} at layer {s.at} chooses among {s.source}, and how many of these an image has"
            " depends on which were chosen: expected a recipe whose sets have a fixed size to export"
        )
    node.target = Told(reference, left, s.policy.name)
