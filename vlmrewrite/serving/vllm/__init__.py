"""Recipes in vLLM: a plug-in for the image models of its registry, whatever class they have.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). A model is changed if its
configuration names a recipe, ``hf_overrides=overrides(recipe)``: `vlmrewrite serve-args` prints the
engine's arguments. An image then takes as many tokens of the prompt as the recipe keeps of it before the decoder, in
the scheduler, the caches and the decoder alike; kept tokens have the positions that they have without the recipe.
"""

from vlmrewrite.serving.vllm.plugin import register
from vlmrewrite.serving.vllm.settings import KEY, Serving, overrides

__all__ = ["KEY", "Serving", "overrides", "register"]
