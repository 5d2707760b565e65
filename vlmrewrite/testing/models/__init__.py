"""Tiny vision-language models with random weights, and inputs as their processors would make them.

    tiny = FAMILIES["qwen2_5_vl"]()
    inputs = tiny.inputs([Row(images=2, before=3, after=4), Row(images=0, before=9, after=1)], side="left")
    logits = tiny.model(**inputs).logits

The models are built from the configuration classes of their families, in fp32 on the CPU. Their weights are so large
that attention is far from uniform and that a missing vision token shows in the logits. ``FAMILIES`` are the seven that
all tests run through; ``ZOO`` is every family of transformers that has a builder, those seven among them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping

from vlmrewrite.testing.models.families import gemma3, internvl, llava, llava_next, llava_qwen2, qwen2_5_vl, smolvlm
from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    PAD,
    START,
    TILE,
    VIDEO,
    VOCABULARY,
    Pictures,
    Row,
    Side,
    TinyVLM,
)

Builder = Callable[..., TinyVLM]

FAMILIES: dict[str, Builder] = {
    f.__name__: f for f in (llava, llava_qwen2, llava_next, qwen2_5_vl, internvl, smolvlm, gemma3)
}
"""The builder of each of the seven families, ``(layers=4, seed=0)``."""

_ZOO = {
    "codes": "chameleon emu3 janus",
    "cosmos": "cosmos3_edge cosmos3_omni",
    "crops": "aria fuyu hyperclovax_vision_v2 molmo2 ovis2 phi4_multimodal",
    "families": "gemma3 internvl llava llava_next llava_qwen2 qwen2_5_vl smolvlm",
    "gemmas": "gemma3n gemma4 gemma4_moe gemma4_unified paligemma paligemma_gemma2",
    "glm": "glm46v glm4v glm4v_moe glm_ocr glmga",
    "granites": "granite4_vision granite_docling",
    "grids": "cohere_compass lfm3_vl",
    "hybrids": "inkling2 inkling_mm_model nemotron_h_omni",
    "llavas": "llava_next_video llava_onevision video_llava vipllava",
    "minicpm": "minicpm_ocr minicpmv4_6 minicpmv4_7",
    "muse": "muse_glimmer muse_spark",
    "native": "ernie4_5_vl_moe exaone4_5 hunyuan_vl kimi_k25 minimax_m3_vl paddleocr_vl video_llama_3",
    "omni": "qwen2_5_omni_thinker qwen3_omni_moe_thinker",
    "pages": "deepseek_ocr2 pp_chart2table qianfan_ocr unlimited_ocr",
    "pixtrals": "lighton_ocr llava_pixtral mistral3 mistral3_mistral4 mistral_large4",
    "queries": "blip_2 instructblip instructblipvideo kosmos_2 kosmos_2_5",
    "qwen": "qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe qwen4_exp",
    "sparse": "dots3_note glm5_next step3p7",
    "tiles": "aya_vision cohere2_vision idefics2 idefics3 lfm2_vl llama4",
    "towers": "deepseek_vl deepseek_vl_hybrid fast_vlm got_ocr2 perception_lm",
}


class _Zoo(Mapping[str, Builder]):
    """Builders by family; the module of one, and with it transformers' own, is loaded when it is asked for."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._homes = {name: module for module, names in modules.items() for name in names.split()}

    def __getitem__(self, name: str) -> Builder:
        builder: Builder = getattr(importlib.import_module(f"{__name__}.{self._homes[name]}"), name)
        return builder

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._homes))

    def __len__(self) -> int:
        return len(self._homes)


ZOO: Mapping[str, Builder] = _Zoo(_ZOO)
"""The builder of each family that has one, ``(layers=4, seed=0)``."""

__all__ = [
    "END",
    "FAMILIES",
    "HIDDEN",
    "IMAGE",
    "PAD",
    "START",
    "TILE",
    "VIDEO",
    "VOCABULARY",
    "ZOO",
    "Builder",
    "Pictures",
    "Row",
    "Side",
    "TinyVLM",
    "gemma3",
    "internvl",
    "llava",
    "llava_next",
    "llava_qwen2",
    "qwen2_5_vl",
    "smolvlm",
]
