"""Recipes in lmms-eval: ``python -m lmms_eval --model vlmrewrite --model_args pretrained=...,recipe=...``.

lmms-eval calls :func:`manifest` as it starts (entry point ``lmms_eval.models``), whatever model is asked for; modules
of this package are imported if it is this one. In: lmms-eval's requests. Out: what its tasks score.
"""

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """What lmms-eval is told of the model ``vlmrewrite``: where its classes are, for chats and for prompts."""
    from lmms_eval.models.registry_v2 import ModelManifest  # lmms-eval alone calls this

    return ModelManifest(
        "vlmrewrite",
        simple_class_path=f"{__name__}.lmms.AskedPrompts",
        chat_class_path=f"{__name__}.lmms.AskedChats",
    )
