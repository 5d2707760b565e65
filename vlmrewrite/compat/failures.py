"""What Dynamo says in a page about code that it cannot trace, as one line: what, where, and what to do."""

from __future__ import annotations

import re

_EAGER = "expected a call that the unmodified model can run"

_KINDS: list[tuple[str, str, str]] = [
    (r"Data-dependent branching", "Python branches on a tensor's value", "expected torch.where or the like there"),
    (
        r"(?s).*data-dependent expression (?P<what>.*?)(?: \(unhinted|\n|$)",
        "Python needs a number that depends on a tensor's values ({what})",
        "expected sizes, indices and branches that do not",
    ),
    (
        r"(?s)Failed to trace builtin operator.*?`(?P<what>[^`]*)`",
        "Python's {what}() is called",
        "expected tensor operations alone",
    ),
    (
        r"(?s)Attempted to call function marked as skipped.*?qualname: (?P<what>[^\s,]*)",
        "{what}() is called, which is not made of tensor operations",
        "expected tensor operations alone",
    ),
    (r"(?s)Observed exception.*?raised exception (?P<what>[^\n]*)", "{what} is raised", _EAGER),
    (r"(?s)[^\n]* when making fake tensor call.*?: got (?P<what>[^\n]*)", "{what} is raised", _EAGER),
    (r"Call to `torch._dynamo.graph_break\(\)`", "torch._dynamo.graph_break() is called", "expected no such call"),
    (
        r"(?s)(?P<what>[^\n]*)(?:.*?Explanation: (?P<more>[^\n]*))?",
        "Dynamo cannot trace it ({what}{more})",
        "expected code that torch.compile(fullgraph=True) takes",
    ),
]

_FRAME = re.compile(
    r'File "(?:[^"]*?/)??(?P<file>(?:[^"/]+/)?[^"/]+)", line (?P<line>\d+), in (?P<function>[^\s,]+)$', re.MULTILINE
)


def untraced(error: BaseException) -> str:
    """Why a function could not be captured.

    Args:
        error: what Dynamo raised, one of :func:`vlmrewrite.compat.untraceable`.

    Returns:
        one line: what the code does, the innermost source line where it does, and what was expected of it.
    """
    text = str(error).strip()
    found, (_, what, expected) = next((x, kind) for kind in _KINDS if (x := re.match(kind[0], text)))
    parts = {name: (x or "").strip().rstrip(".") for name, x in found.groupdict().items()}
    if parts.get("more"):
        parts["more"] = f": {parts['more']}"
    frames = list(_FRAME.finditer(text))
    place = "in {function}, {file}, line {line}: ".format(**frames[-1].groupdict()) if frames else ""
    return f"{place}{what.format(**parts)}; {expected}"
