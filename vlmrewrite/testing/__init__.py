"""The testing kit: tiny models, hypothesis strategies, agreement with the oracle; what works; Triton without a GPU.

A name is loaded when it is first asked for. The strategies alone need hypothesis: the extra ``testing`` brings it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlmrewrite import moved

if TYPE_CHECKING:
    from vlmrewrite.testing.agreement import (
        Agreement,
        InFloat64,
        extended,
        forward_agreement,
        generation_agreement,
        logits_agreement,
    )
    from vlmrewrite.testing.models import FAMILIES, ZOO, Row, Side, TinyVLM
    from vlmrewrite.testing.strategies import (
        Sets,
        budgets,
        depths,
        pass_lists,
        plans,
        policies,
        rows,
        sides,
        techniques,
    )

_NAMES = {
    "agreement": "Agreement InFloat64 extended forward_agreement generation_agreement logits_agreement",
    "models": "FAMILIES ZOO Row Side TinyVLM",
    "strategies": "Sets budgets depths pass_lists plans policies rows sides techniques",
    "matrix": "",
    "triton": "",
}
"""Each module, and what of it can be had from here."""

_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "FAMILIES",
    "ZOO",
    "Agreement",
    "InFloat64",
    "Row",
    "Sets",
    "Side",
    "TinyVLM",
    "budgets",
    "depths",
    "extended",
    "forward_agreement",
    "generation_agreement",
    "logits_agreement",
    "pass_lists",
    "plans",
    "policies",
    "rows",
    "sides",
    "techniques",
]


def __getattr__(name: str) -> Any:
    """A name of the kit, or one of its modules."""
    if name in _NAMES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; expected one of {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *__all__})


moved.register(__name__)
