"""Where a model's weights are: whole and in one place, or what is to be said of that."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmrewrite.hf.exchanged import exchanged


def scattered(model: nn.Module) -> str | None:
    """What is wrong with where a model's parameters are, in one sentence; None if they are whole and in one place."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    inside = {id(p) for p in decoder.parameters()}
    named = {name: p for name, p in model.named_parameters() if id(p) in inside}
    sharded = next((name for name, p in named.items() if hasattr(p, "device_mesh")), None)
    if sharded is not None:
        return (
            f"{sharded} is sharded over processes (fully_shard of layers, or a tensor-parallel plan): expected whole"
            " parameters in each process, as DistributedDataParallel keeps them, or one group of them all: apply, then"
            " fully_shard(model) alone"
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
    parts = getattr(model, "hf_device_map", None) or {}
    places = sorted({f"cuda:{x}" if isinstance(x, int) else str(x) for x in parts.values()})
    if len(places) > 1:
        return f"its device_map puts parts on {' and '.join(places)}: expected the whole model on one device"
    return None
