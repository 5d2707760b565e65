"""Families whose decoders carry states besides keys and values: of convolutions and of recurrences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Inkling2Config,
    Inkling2ForConditionalGeneration,
    InklingConfig,
    InklingForConditionalGeneration,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
)

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    START,
    VIDEO,
    VOCABULARY,
    TinyVLM,
    choice,
    decoder_sizes,
    tiny_model,
    tower_sizes,
)

GRIDS = [(1, 2), (2, 2), (3, 2), (2, 3)]
"""Tokens over height and width that an image may have."""


def inkling_mm_model(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Inkling: four short convolutions a layer, learned biases of distances in place of rope, experts.

    Every other layer has a window of 8 tokens and more heads for keys and values; the others scale with the position.
    A token is a patch, twice in time.
    """
    config = InklingConfig(
        text_config=_inkling(layers, swa_num_key_value_heads=4, n_shared_experts=1, logits_mup_width_multiplier=1.0)
        | {"mlp_layer_types": ["sparse" if i else "dense" for i in range(layers)], "intermediate_size": 2 * HIDDEN},
        vision_config={"patch_size": 4, "hidden_size": HIDDEN, "num_hidden_layers": 4},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 4},
        image_token_id=IMAGE,
        audio_token_id=END,
        image_bos_token_id=START,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        grids = [GRIDS[choice(generator, len(GRIDS))] for _ in range(sum(counts))]
        pixels = torch.randn(sum(h * w for h, w in grids), 1, 4, 4, 3, generator=generator)
        return [[START, *[IMAGE] * (h * w)] for h, w in grids], {"pixel_values": pixels.repeat(1, 2, 1, 1, 1)}

    return tiny_model("inkling_mm_model", InklingForConditionalGeneration, config, pictures, seed)


def inkling2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Inkling 2: what a layer reads is attention over the streams at the starts of all blocks of two layers.

    Queries, keys and values of full layers read apart and have convolutions whose weights depend on the token, sinks
    and gates; every other layer has a window of 8 tokens. Learned biases of distances, experts, no fast attention.
    """
    config = Inkling2Config(
        text_config=_inkling(layers, swa_num_key_value_heads=2, n_layers_per_attn_res_block=2),
        vision_config={
            **tower_sizes(posemb_grid_size=4, projection_hidden_dim=2 * HIDDEN, text_hidden_size=HIDDEN),
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        },
        image_token_id=IMAGE,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        grids = [GRIDS[choice(generator, len(GRIDS))] for _ in range(sum(counts))]
        pixels = torch.randn(sum(h * w for h, w in grids), 8, 8, 3, generator=generator)
        inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, h, w] for h, w in grids])}
        return [[START, *[IMAGE] * (h * w)] for h, w in grids], inputs

    return tiny_model("inkling2", Inkling2ForConditionalGeneration, config, pictures, seed)


def nemotron_h_omni(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Nemotron Omni: a layer is a recurrence, attention without positions, or experts, in turns.

    Images of any size, 2 to 6 tokens. No videos: the forward of transformers 5.23 fails where it joins their features.
    """
    kinds = ["linear_attention", "full_attention", "moe"]
    sizes: dict[str, Any] = {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8}
    sizes["time_step_min"] = 1e-9  # transformers 5.23 heeds this limit in a prefill, and not in a decode step
    sizes["head_dim"] = HIDDEN // 4
    experts = {"n_routed_experts": 4, "moe_intermediate_size": HIDDEN, "moe_shared_expert_intermediate_size": HIDDEN}
    turns = {"chunk_size": 8, "layers_block_type": [kinds[i % 3] for i in range(layers)]}
    tower = {"max_img_size": 32, "num_registers": 2, "video_temporal_patch_size": 2, "mlp_ratio": 2.0}
    config = NemotronH_Omni_Reasoning_V3_Config(
        text_config={"model_type": "nemotron_h", **decoder_sizes(layers, **sizes, **experts, **turns)},
        vision_config={"model_type": "radio", **tower_sizes(image_size=16, **tower)},
        projector_hidden_size=2 * HIDDEN,
        vision_hidden_size=HIDDEN,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        grids = [GRIDS[choice(generator, len(GRIDS))] for _ in range(sum(counts))]
        pixels = torch.randn(sum(4 * h * w for h, w in grids), 3 * 4 * 4, generator=generator)
        inputs = {"pixel_values": pixels, "image_grid_hw": 2 * torch.tensor(grids)}
        return [[START, *[IMAGE] * (h * w), END] for h, w in grids], inputs

    return tiny_model("nemotron_h_omni", NemotronH_Omni_Reasoning_V3, config, pictures, seed)


def _inkling(layers: int, **more: Any) -> dict[str, Any]:
    heads = {"head_dim": HIDDEN // 4, "swa_num_attention_heads": 4, "swa_head_dim": HIDDEN // 4}
    distances = {"sliding_window_size": 8, "d_rel": 4, "rel_extent": 16, "log_scaling_n_floor": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN, "route_scale": 1.0}
    kinds = [("hybrid_sliding", "hybrid")[i % 2] for i in range(layers)]
    sizes = decoder_sizes(layers, layer_types=kinds, **heads, **distances, **experts, **more)
    del sizes["intermediate_size"]
    return sizes | {"vocab_size": VOCABULARY + 8, "unpadded_vocab_size": VOCABULARY}
