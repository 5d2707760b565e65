"""What classes of modules do with the number of the layer that they are in."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_HANDED_ON = (ast.Call, ast.keyword, ast.Dict, ast.Tuple, ast.List, ast.FormattedValue, ast.Starred)


@functools.cache
def goes_by_number(kind: type, name: str) -> bool:
    """Whether methods of a class of modules do more with a layer's number than hand it on, to a cache for one.

    They compare it, count with it or take something by it, so that what two layers do may differ although all that they
    hold is equal. A class whose source is not there counts as one that does.

    Args:
        kind: the class.
        name: the attribute that holds the number.
    """
    own = [c for c in kind.__mro__ if issubclass(c, nn.Module) and not c.__module__.startswith(nn.__name__)]
    try:
        return any(_uses(ast.parse(textwrap.dedent(inspect.getsource(c))), name) for c in own)
    except (OSError, TypeError, SyntaxError):
        return True


def _uses(tree: ast.AST, name: str) -> bool:
    methods = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name != "__init__"]
    read = [above for f in methods for above, x in _pairs(f) if getattr(x, "attr", "") == name and _is_read(x)]
    return not all(isinstance(above, _HANDED_ON) or _is_none(above) for above in read)


def _is_read(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Load)


def _is_none(node: ast.AST) -> bool:
    """Whether something is only compared to None."""
    return isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)


def _pairs(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            yield parent, child
