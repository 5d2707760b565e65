"""Autograd functions (``torch.autograd.Function``) in a captured graph, of whatever library, as calls on tensors."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from vlmrewrite.analysis.graph import expression, is_number, sizes, symbols, value
from vlmrewrite.compat import autograd_function

TRIED = "vlmrewrite_tried"
"""In a node's meta: why it may mix tokens, None if it treated made-up tokens alike."""


@dataclass(frozen=True, eq=False)
class Function:
    """What Dynamo made of an autograd function, with its own forward and backward.

    It takes the tensors alone: sizes that the forward was told are read off them, so that it can be called for other
    tokens.

    Attributes:
        call: takes what Dynamo's operator did, and returns a tuple of one tensor.
        given: the arguments that are no tensors, by place; a size of a tensor as which one it is.
        count: of all arguments.
    """

    call: Callable[..., Any]
    given: Mapping[int, Any]
    count: int
    __name__ = "autograd_function"

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function's result for these tensors."""
        rest = iter(tensors)
        args = [self.given[i] if i in self.given else next(rest) for i in range(self.count)]
        args = [tensors[x.tensor].shape[x.dim] if isinstance(x, _Size) else x for x in args]
        return self.call(*args)[0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Size:
    tensor: int
    dim: int


def as_calls(gm: GraphModule) -> None:
    """Put a :class:`Function` in the place of each of Dynamo's operators for one that gives one tensor."""
    for node in gm.graph.find_nodes(op="call_function", target=autograd_function()):
        (forward, backward, *args), users = node.args, [*node.users]
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in users) or not users:
            node.meta[TRIED] = "an autograd function is not known to treat tokens alike: it gives several tensors"
            continue
        tensors = [x for x in args if isinstance(x, Node) and not is_number(x)]
        given = {i: _given(x, tensors) for i, x in enumerate(args) if not any(x is t for t in tensors)}
        if any(isinstance(x, Node) for x in given.values()):
            node.meta[TRIED] = (
                "an autograd function is not known to treat tokens alike: it is told a number that is no size of a"
                " tensor it takes"
            )
            continue
        parts = getattr(gm, forward.target), getattr(gm, backward.target)
        call = functools.partial(node.target, *parts, **node.kwargs)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(Function(call, given, len(args)), tuple(tensors))
        new.meta = dict(users[0].meta)
        for user in users:
            user.replace_all_uses_with(new)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def _given(x: Any, tensors: list[Node]) -> Any:
    """An argument that is no tensor: a number that is the size of one as that size; else as it is."""
    if not isinstance(x, Node) or not symbols(x):
        return value(x) if isinstance(x, Node) else x
    for k, tensor in enumerate(tensors):
        for d, n in enumerate(sizes(tensor) if isinstance(value(tensor), Tensor) else []):
            if n == expression(x):
                return _Size(k, d)
    return x
