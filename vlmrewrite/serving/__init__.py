"""Recipes outside of transformers' ``generate()``: in vLLM, token sets for other engines, and answers to many rows.

In: features of images, or rows with images and prompts. Out: kept tokens, or files of answers.
"""

from vlmrewrite.serving import vllm
from vlmrewrite.serving.batch import Mapped, map_rows
from vlmrewrite.serving.select import AVAILABLE, BeforeDecoder, Kept, PassRuns, what_runs

__all__ = ["AVAILABLE", "BeforeDecoder", "Kept", "Mapped", "PassRuns", "map_rows", "vllm", "what_runs"]
