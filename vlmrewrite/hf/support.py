"""Which models can be rewritten at all; every refusal says what was found and what was expected."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from transformers import PreTrainedModel

from vlmrewrite.compat import experts_implementation, is_compiled
from vlmrewrite.hf.decoder import EXPERTS
from vlmrewrite.hf.inner import language_model
from vlmrewrite.hf.lent import APPLIED, elsewhere, lends
from vlmrewrite.hf.mixers import indexed_mixers, recurrent_mixers, refuse_cache_layers
from vlmrewrite.hf.placement import scattered


def check_support(model: Any, offloaded: bool = False) -> int:
    """Check that a model can be rewritten, without changing it.

    Args:
        model: any object.
        offloaded: whether its weights may come and go, or be on several devices.

    Returns:
        the number of decoder layers that its config names.

    Raises:
        TypeError: it is not a Hugging Face model.
        ValueError: it is compiled or exported, its parameters are not whole in one place, it has no image tokens, no
            causal text decoder, an experts implementation other than eager, grouped_mm or batched_mm, or layers whose
            cache is of another kind.
    """
    _check_kind(model)
    if lends(model) and not offloaded:
        raise ValueError(
            f"{type(model).__name__} has accelerate's hooks, which say where its weights are: expected a model on one"
            " device (apply takes this one)"
        )
    config = model.config
    inside = hasattr(model, "generate") and language_model(model) is not None
    if not inside and not hasattr(model.base_model, "get_image_features"):
        what = "a text-only model"
        if hasattr(config, "vision_config"):
            what = "a model whose images are not tokens of its text stream"
        raise ValueError(
            f"{type(model).__name__} has no get_image_features: it is {what}; expected a vision-language model that"
            " encodes images to tokens"
        )
    if not inside and getattr(config, "image_token_id", None) is None:
        raise ValueError(
            f"the config of {type(model).__name__} has no image_token_id (image_token_index): expected a model whose"
            " images stand as tokens in the text"
        )
    if not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} has no generate(): expected the model with its language-model head")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: there are no vision tokens in its decoder's stream"
        )
    text = config.get_text_config(decoder=True)
    experts = experts_implementation(text)
    if experts not in (None, *EXPERTS):
        raise ValueError(f"experts implementation {experts!r} is not supported; expected one of {', '.join(EXPERTS)}")
    depth = getattr(text, "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"the text config has num_hidden_layers={depth!r}; expected at least one decoder layer")
    refuse_cache_layers(model)
    if elsewhere(model) and (recurrent_mixers(model) or indexed_mixers(model)):
        raise ValueError(
            f"{type(model).__name__} is offloaded or on several devices, and has layers with a recurrent state or an"
            " index, whose modules run by themselves: expected all weights on one device"
        )
    return depth


def _check_kind(model: Any) -> None:
    if isinstance(model, (torch.export.ExportedProgram, torch.fx.GraphModule)):
        raise ValueError(
            f"{type(model).__name__} is an exported model; expected the Hugging Face model it was made from"
        )
    if is_compiled(model):
        raise ValueError(
            "the model is compiled with torch.compile already; expected the model itself (recipes compile with"
            " backend='inductor')"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers PreTrainedModel, got {type(model).__name__}")
    if APPLIED in vars(model):
        raise ValueError(
            f"a recipe is applied to this {type(model).__name__} already; call vlmrewrite.restore(model) first"
        )
    if (reason := scattered(model)) is not None:
        raise ValueError(f"{type(model).__name__} cannot be rewritten: {reason}")
    for name in ("forward", "generate"):
        if name in model.__dict__ and not (name == "forward" and lends(model)):
            raise ValueError(
                f"{type(model).__name__}.{name} was exchanged on this instance (by hooks or another tool); expected an"
                " unmodified model"
            )
