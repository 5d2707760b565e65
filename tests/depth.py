"""Whether a graph, some of whose layers were not traced, is the one that a trace of all layers gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

import vlmrewrite as vr
from vlmrewrite.capture import CAPTURES, captures_of
from vlmrewrite.testing.models import Row, TinyVLM


class _Named:
    def __init__(self, name: object) -> None:
        self.name = name

    def __repr__(self) -> str:
        return str(self.name)


def text_of(model: nn.Module, gm: GraphModule, inputs: Any) -> list[str]:
    """Each node, by numbers of nodes and names of parameters, with shapes."""
    names: dict[int, str] = {id(x): name for name, x in (*model.named_parameters(), *model.named_buffers())}
    numbers: dict[Node, object] = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, x in zip(placeholders, inputs, strict=True):
        numbers[node] = names.get(id(x), f"an input {node.name}")
    lines = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            args: Any = map_arg((node.args, node.kwargs), lambda n: _Named(numbers[n]))
            x = node.meta.get("example_value")
            lines.append(f"{node.op} {node.target} {args} {tuple(x.shape) if isinstance(x, Tensor) else type(x)}")
            numbers[node] = f"%{len(numbers)}"
    return lines


def same_graphs(tiny: TinyVLM, rows: list[Row]) -> None:
    """Raise AssertionError if a whole trace gives another graph."""
    texts = []
    for whole in (True, False):
        CAPTURES.pop(tiny.model, None)
        found = captures_of(tiny.model)
        if whole:
            found.call.whole = found.inner.whole = "a test wants it"
        with torch.no_grad():
            program = vr.trace(tiny.model, tiny.inputs(rows))
        texts.append(text_of(tiny.model, program.captured, program.inputs))
    assert texts[0] == texts[1]
