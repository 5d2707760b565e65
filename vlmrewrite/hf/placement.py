"""Where a model's weights are: whole and in one place, or what is to be said of that."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmrewrite.compat import offload_hooks
from vlmrewrite.hf.exchanged import exchanged
from vlmrewrite.hf.lent import lends, places


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
    brought = {f"{x.path}.{x.name}": x.device for x in places(model)} if lends(model) else {}
    absent = [name for name, p in named.items() if p.is_meta and (name not in brought or not _is_plain(p))]
    if absent and (len(absent) < len(named) or any(exchanged(m) or offload_hooks(m) for m in decoder.modules())):
        return (
            f"{absent[0]} is offloaded, and not by hooks on the whole model that bring plain weights: expected those of"
            " accelerate's cpu_offload, disk_offload or dispatch_model, or all weights on one device"
        )
    devices = sorted({str(brought.get(name, p.device)) for name, p in named.items()})
    if len(devices) > 1 and not lends(model):
        return (
            f"its decoder's parameters are on {' and '.join(devices)}, and no hooks on the whole model take tokens"
            " from one to the other: expected those of accelerate's dispatch_model(model) (device_map), or one device"
        )
    other = next((name for name, p in named.items() if name in brought and not p.is_floating_point()), None)
    if other is not None:
        return (
            f"{other} is {named[other].dtype} and on {brought[other]}, where the model's inputs are not: expected a"
            " quantised decoder on one device"
        )
    return None


def _is_plain(p: nn.Parameter) -> bool:
    return type(p) is nn.Parameter and p.is_floating_point()
