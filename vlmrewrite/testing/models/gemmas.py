"""The Gemma families: sliding windows, vision blocks that see one another, shared keys, inputs of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    ConvNextConfig,
    Gemma2Config,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    START,
    VIDEO,
    VOCABULARY,
    Pictures,
    TinyVLM,
    choice,
    decoder_sizes,
    square,
    text_tokens,
    tiny_model,
    tower_sizes,
)

ABSENT: dict[str, str] = {
    "diffusion_gemma": "an encoder reads image tokens; the decoder denoises blocks of text, one call is no next token",
    "pi0": "predicts actions of a robot by flow matching from the cache of a PaliGemma, no tokens",
    "shieldgemma2": "a classifier: a whole Gemma 3 whose logits of yes and no are read, without generate()",
    "t5gemma2": "an encoder-decoder: image tokens are in the stream of the encoder",
}
"""Model types without a builder, and why."""

AUDIO = 7

FRAMES = 2


def paligemma(layers: int = 4, seed: int = 0) -> TinyVLM:
    """PaliGemma: 9 tokens an image; all tokens of a prompt see one another, positions start at 1."""
    return _paligemma("paligemma", GemmaConfig(**decoder_sizes(layers, head_dim=8)), seed)


def paligemma_gemma2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """PaliGemma 2: the same with Gemma 2, whose logits are capped and every other layer has a window of 8 tokens."""
    text = decoder_sizes(layers, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=_kinds(layers))
    return _paligemma("paligemma_gemma2", Gemma2Config(**text), seed)


def _paligemma(name: str, text: Any, seed: int) -> TinyVLM:
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**tower_sizes(image_size=12, vision_use_head=False)),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        tie_word_embeddings=False,  # tied to large random embeddings, the next token would be the last one again
    )

    def finish(inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}

    return tiny_model(name, PaliGemmaForConditionalGeneration, config, square(12, 9), seed, finish=finish)


def _kinds(layers: int) -> list[str]:
    """Sliding and full attention in turn, full in the last layer."""
    return [("full_attention", "sliding_attention")[(layers - 1 - i) % 2] for i in range(layers)]


def gemma3n(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Gemma 3n: four streams (AltUp), inputs of each layer, sparse MLPs, keys of earlier layers in the last ones."""
    shared = max(0, min(layers // 2, layers - 2))
    text = decoder_sizes(
        layers,
        vocab_size=VOCABULARY + 16,
        head_dim=8,
        sliding_window=8,
        layer_types=_kinds(layers),
        num_kv_shared_layers=shared,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.5 * (i < layers // 2) for i in range(layers)],
    )
    image, sound = VOCABULARY + 1, VOCABULARY + 8
    vision: dict[str, Any] = {"hidden_size": HIDDEN, "vocab_size": 8, "vocab_offset": VOCABULARY, "rms_norm_eps": 1e-6}
    config = Gemma3nConfig(
        text_config=text,
        vision_config=vision,
        audio_config={"hidden_size": HIDDEN, "vocab_size": 8, "vocab_offset": sound, "conf_num_hidden_layers": 1},
        vision_soft_tokens_per_image=9,
        image_token_id=image,
        boi_token_id=START,
        eoi_token_id=VOCABULARY,
        audio_token_id=sound + 1,
        tie_word_embeddings=False,
    )
    tower: dict[str, Any] = {"hidden_sizes": [HIDDEN, HIDDEN], "depths": [1, 1], "num_stages": 2}
    # The tower of the released model needs timm; any convolutional tower gives features of the same shape.
    object.__setattr__(config, "vision_config", ConvNextConfig(**tower, **vision))

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        pixels = torch.randn(sum(counts), 3, 24, 24, generator=generator)
        return [[START, *[image] * 9, VOCABULARY]] * len(pixels), {"pixel_values": pixels}

    tiny = tiny_model("gemma3n", Gemma3nForConditionalGeneration, config, pictures, seed, "token_type_ids")
    tiny.model.generation_config.suppress_tokens += list(range(VOCABULARY, VOCABULARY + 16))
    return tiny


def gemma4(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Gemma 4 E2B: inputs of each layer, keys of earlier layers in the last ones, 2 to 6 tokens an image."""
    shared = max(0, min(layers // 2, layers - 2))
    more = {"num_kv_shared_layers": shared, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8}
    return _gemma4("gemma4", layers, seed, vocab_size_per_layer_input=VOCABULARY, **more)


def gemma4_moe(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Gemma 4 26B: experts beside the MLP, values that are keys, images whose tokens see one another."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": HIDDEN}
    full = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    blocks = {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
    return _gemma4("gemma4_moe", layers, seed, **experts, **full, **blocks)


def _gemma4(name: str, layers: int, seed: int, **more: Any) -> TinyVLM:
    tower = tower_sizes(num_key_value_heads=2, head_dim=16, pooling_kernel_size=2, position_embedding_size=16)
    config = Gemma4Config(text_config=_gemma4_text(layers, **more), vision_config=tower, **_gemma4_tokens())
    makers: dict[str, Any] = {"clips": _gemma4_clips(4, 4), "video_token_id": VIDEO}
    pictures = _gemma4_pictures(4, 4)
    return tiny_model(name, Gemma4ForConditionalGeneration, config, pictures, seed, "mm_token_type_ids", **makers)


def gemma4_unified(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Gemma 4 12B: no tower, patches of pixels go straight into the decoder, and see one another there."""
    full = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "use_bidirectional_attention": "vision"}
    patches = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": HIDDEN, "mm_posemb_size": 16}
    vision = {**patches, "output_proj_dims": HIDDEN}
    config = Gemma4UnifiedConfig(text_config=_gemma4_text(layers, **full), vision_config=vision, **_gemma4_tokens())
    makers: dict[str, Any] = {"clips": _gemma4_clips(8, 1), "video_token_id": VIDEO}
    kind, pictures = Gemma4UnifiedForConditionalGeneration, _gemma4_pictures(8, 1)
    return tiny_model("gemma4_unified", kind, config, pictures, seed, "mm_token_type_ids", **makers)


def _gemma4_text(layers: int, **more: Any) -> dict[str, Any]:
    sizes = {"head_dim": 8, "global_head_dim": 16, "sliding_window": 8, "layer_types": _kinds(layers)}
    return decoder_sizes(layers, **sizes, **more)


def _gemma4_tokens() -> dict[str, Any]:
    marks = {"boi_token_id": START, "eoi_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO}
    return {**marks, "audio_token_id": AUDIO, "tie_word_embeddings": False}


def _gemma4_pictures(patch: int, pooled: int) -> Pictures:
    """Images of up to 6 tokens, each of them ``pooled`` patches; patches that are not there have position -1."""

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(1, 2), (2, 1), (2, 2), (2, 3)]
        grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        pixels, places = _patches(grids, 6, patch, pooled, generator)
        ids = [[START, *[IMAGE] * (h * w), END] for h, w in grids]
        return ids, {"pixel_values": pixels, "image_position_ids": places}

    return pictures


def _gemma4_clips(patch: int, pooled: int) -> Pictures:
    """Videos of two frames of up to 4 tokens, the time before each and markers around it."""

    def clips(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(1, 2), (2, 1), (2, 2)]
        grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        pixels, places = _patches([g for g in grids for _ in range(FRAMES)], 4, patch, pooled, generator)
        ids = []
        for h, w in grids:
            frames = [[*text_tokens(2, generator), START, *[VIDEO] * (h * w), END] for _ in range(FRAMES)]
            ids.append([x for frame in frames for x in frame])
        inputs = {"pixel_values_videos": pixels, "video_position_ids": places}
        return ids, inputs | {"num_frames_per_video": torch.tensor([FRAMES] * len(grids))}

    return clips


def _patches(
    grids: list[tuple[int, int]], most: int, patch: int, pooled: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Pixels [N, patches, 3 * patch * patch] in [0, 1], and columns and rows of patches [N, patches, 2]."""
    side, pixels, places = round(pooled**0.5), [], []
    for h, w in grids:
        columns, rows = torch.meshgrid(torch.arange(w * side), torch.arange(h * side), indexing="xy")
        place = torch.stack((columns, rows), -1).reshape(-1, 2)
        missing = (0, 0, 0, most * pooled - len(place))
        pixels.append(pad(torch.rand(len(place), 3 * patch * patch, generator=generator), missing))
        places.append(pad(place, missing, value=-1))
    return torch.stack(pixels), torch.stack(places)
