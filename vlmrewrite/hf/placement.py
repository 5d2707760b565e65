"""Where a model's weights are, whole and in one place, and whose forwards and hooks run; what is to be said of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vlmrewrite.compat import hooks_of

_HERE = Path(__file__).parents[1]


def scattered(model: nn.Module) -> str | None:
    """What is wrong with where a decoder's parameters are, in one sentence; None if they are whole and in one place."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    inside = {id(p) for p in decoder.parameters()}
    named = {name: p for name, p in model.named_parameters() if id(p) in inside}
    sharded = next((name for name, p in named.items() if hasattr(p, "device_mesh")), None)
    if sharded is not None:
        return (
            f"{sharded} is sharded over processes (fully_shard, or a tensor-parallel plan): expected whole parameters"
            " in each process, as DistributedDataParallel keeps them"
        )
    absent = [name for name, p in named.items() if p.is_meta]
    if absent and (len(absent) < len(named) or any(map(exchanged, decoder.modules()))):
        return (
            f"{absent[0]} is offloaded, and brought only while its module runs: expected all weights on one device"
            " (quantised, if they do not fit)"
        )
    devices = sorted({str(p.device) for p in named.values()})
    if len(devices) > 1:
        return f"its decoder's parameters are on {' and '.join(devices)}: expected all of them on one device"
    return None


def exchanged(module: nn.Module) -> bool:
    """Whether a module's forward was exchanged on the instance, by somebody else than a recipe."""
    forward = vars(module).get("forward")
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    return forward is not None and (code is None or not Path(code.co_filename).is_relative_to(_HERE))


def hooked(model: nn.Module) -> str:
    """What may have kept a forward from being captured: another one in its place, or hooks, captured with it."""
    if (name := next((name for name, module in model.named_modules() if exchanged(module)), None)) is not None:
        who = name or "the model"
        return f"; the forward of {who} was exchanged on the instance: expected its own, or one that Dynamo can trace"
    found = []
    for name, module in model.named_modules():
        hooks = hooks_of(module)
        if any(not str(getattr(hook, "__module__", "")).startswith(("transformers.", "vlmrewrite.")) for hook in hooks):
            found.append(name or "the model")
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" (there are hooks on {', '.join(found[:3])}{more}: expected hooks that Dynamo can trace, or none)"
