"""Which recipe an engine has, and what cannot be served with it."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

from vlmrewrite.compat import vllm
from vlmrewrite.errors import shown
from vlmrewrite.recipe import Recipe
from vlmrewrite.serving.select import BeforeDecoder

KEY = "vlmrewrite"
"""The key of ``hf_overrides`` under which a recipe travels."""

LONGER = 2
"""How many times a prompt's length the positions of its tokens can come to, at most."""


class Serving:
    """A recipe in an engine.

    Attributes:
        before: what it does before the decoder.
        tile: features of a tile of which a budget is, or None.
        digest: what differs between recipes.
    """

    def __init__(self, recipe: Recipe, depth: int, tile: int | None) -> None:
        self.before, self.tile = BeforeDecoder(recipe, depth=depth), tile
        if self.before.counts([576]) == [0]:
            raise ValueError("it keeps no vision token: expected a recipe that keeps some of each image")
        self._told = False
        self.digest = f"{recipe.name}-{digest([recipe.to_data()['passes'], tile])}"

    def tell(self, tokens: int) -> None:
        """Say in the engine's log, once, what of the recipe runs, with the numbers of an image of so many tokens."""
        if not self._told:
            for line in self.before.told(tokens):
                vllm.log(f"vlmrewrite: {line}")
        self._told = True


def digest(value: Any) -> str:
    """16 hexadecimal digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def overrides(recipe: Recipe, tile: int | None = None) -> dict[str, Any]:
    """``hf_overrides`` of an engine.

    Args:
        recipe: the recipe.
        tile: how many tokens each tile of an image has, if the model takes tiles that stand side by side for images of
            their own under transformers, as `vlmrewrite serve-args` finds out; else None.

    Raises:
        ValueError: a pass of the recipe is not registered.
    """
    return {KEY: recipe.to_data() | ({} if tile is None else {"tile": tile})}


def serving_recipe(hf_config: Any) -> dict[str, Any] | None:
    """What a model's configuration says of a recipe, or None.

    Raises:
        ValueError: it is not what :meth:`vlmrewrite.recipe.Recipe.to_data` gives.
    """
    found = getattr(hf_config, KEY, None)
    if found is not None and not isinstance(found, dict):
        raise ValueError(
            f"hf_overrides[{KEY!r}]: expected a recipe as `vlmrewrite serve-args` prints it, got {shown(found)}"
        )
    return found


def serving_of(model_config: Any) -> Serving | None:
    """The recipe of an engine, or None.

    Raises:
        ValueError: it is no recipe, or some of its passes cannot run before the decoder, and why.
    """
    found = serving_recipe(model_config.hf_config)
    if found is None:
        return None
    return _read(json.dumps(found), model_config.get_total_num_hidden_layers())


@functools.lru_cache(maxsize=16)
def _read(written: str, depth: int) -> Serving:
    data, where = json.loads(written), f"hf_overrides[{KEY!r}]"
    tile = data.pop("tile", None)
    if tile is not None and (type(tile) is not int or tile < 1):
        raise ValueError(f"{where}: tile: expected how many of an image's tokens a tile has, got {shown(tile)}")
    recipe = Recipe.of_data(data, where)
    try:
        return Serving(recipe, depth, tile)
    except ValueError as e:
        raise ValueError(f"recipe {recipe.name!r} cannot be served: {e}") from None


def takes_images(chosen: Any) -> bool:
    """Whether a class of vLLM's encodes images apart from its prompt, with a processor, and makes what it says."""
    return hasattr(chosen, "embed_multimodal") and hasattr(chosen, "_processor_factory") and not _makes_another(chosen)


def _makes_another(chosen: Any) -> bool:
    return "__new__" in vars(chosen)


def check_model(chosen: Any, model_config: Any) -> None:
    """Whether a recipe can be served with a model.

    Raises:
        ValueError: it cannot, and why.
    """
    serving = serving_of(model_config)
    assert serving is not None
    if reason := _unfit_model(chosen, model_config, serving):
        raise ValueError(f"{chosen.__name__} cannot be served with a recipe: {reason}")


def _unfit_model(chosen: Any, model_config: Any, serving: Serving) -> str | None:
    if not hasattr(chosen, "embed_multimodal") or not hasattr(chosen, "_processor_factory"):
        return "vLLM knows no images for it; expected a model that takes images and a processor for them"
    if _makes_another(chosen):
        return "it has a __new__ of its own, so that what is loaded may be of another class"
    if getattr(chosen, "supports_multimodal_raw_input_only", False):
        return "it encodes images inside its forward pass, where no token can be left out"
    if getattr(chosen, "is_encoder_decoder", False) or model_config.is_encoder_decoder:
        return "its decoder attends to the image from outside of the prompt"
    kinds = _ropes(model_config.hf_config.get_text_config())
    if not kinds:
        return "its text model has no rotary positions, so that kept tokens cannot have those of the whole prompt"
    if by_length := sorted(kinds & _BY_LENGTH):
        return f"its rope type {by_length[0]!r} goes by the length of a prompt, which is another one with a recipe"
    images = model_config.multimodal_config
    if serving.before.by_row and (images is None or images.get_limit_per_prompt("image") != 1):
        return 'a budget per="row" is of all images of a prompt together; set limit_mm_per_prompt={"image": 1}'
    if images is not None and images.video_pruning_rate:
        return f"video_pruning_rate={images.video_pruning_rate} uses what a recipe needs; leave it out"
    return None


_BY_LENGTH = {"dynamic", "longrope", "su"}
"""Types of ropes whose frequencies or tables are others for longer prompts."""


def _ropes(text: Any) -> set[str]:
    """The types of a text model's ropes, which may have one for each kind of layer."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not found:
        return {"default"} if getattr(text, "rope_theta", None) else set()
    each = [x for x in found.values() if isinstance(x, dict)] or [found]
    return {str(x.get("rope_type", x.get("type", "default"))) for x in each}


def check_engine(vllm_config: Any) -> None:
    """Whether an engine's settings go with a recipe.

    Raises:
        ValueError: they do not, and which to change.
    """
    wrong = []
    if vllm_config.speculative_config is not None:
        wrong.append("speculative_config: expected None, drafts do not know the positions of kept tokens")
    if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        wrong.append(
            f"pipeline_parallel_size: expected 1, got {stages}: later stages do not learn which tokens are kept"
        )
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        wrong.append("compilation_config.cudagraph_mm_encoder: expected False, such a graph goes round the selection")
    if getattr(vllm_config.model_config.multimodal_config, "mm_processor_cache_type", None) == "shm":
        wrong.append('mm_processor_cache_type: expected "lru", got "shm": what is known of an image would be lost')
    if vllm_config.model_config.enable_prompt_embeds:
        wrong.append("enable_prompt_embeds: expected False, embeddings of a prompt do not tell where images stand")
    if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        wrong.append("enable_tower_connector_lora: expected False, it counts an image's tokens by its placeholders")
    if vllm.uses_second_runner(vllm_config) and (why := vllm.second_runner()) is not None:
        wrong.append(f"VLLM_USE_V2_MODEL_RUNNER: expected 0, the second model runner cannot be imported here: {why}")
    if wrong:
        raise ValueError("with a recipe of vlmrewrite: " + "; ".join(wrong))
