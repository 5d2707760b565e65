"""Attributes that accelerate leaves on modules whose weights it brings while they run."""

from __future__ import annotations

from typing import Any

from torch import nn

OFFLOAD_HOOK, HOOKED_FORWARD = "_hf_hook", "_old_forward"
"""Where it keeps a module's hooks, and the forward that they are around."""


def offload_hooks(module: nn.Module) -> list[Any]:
    """Its hooks that say where a module's weights are kept and wanted; none if others are around it."""
    hook: Any = vars(module).get(OFFLOAD_HOOK)
    forward = getattr(vars(module).get("forward"), "func", None)
    if hook is None or forward is None or not forward.__module__.startswith("accelerate."):
        return []
    found = [*hook.hooks] if hasattr(hook, "hooks") else [hook]
    return found if all(hasattr(x, "execution_device") and hasattr(x, "offload") for x in found) else []
