"""Families that cut images into crops, or into nothing but patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaTextConfig,
    FuyuConfig,
    FuyuForCausalLM,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    Qwen2Config,
)

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    START,
    TILE,
    VIDEO,
    VOCABULARY,
    Pictures,
    TinyVLM,
    choice,
    decoder_sizes,
    text_tokens,
    tiny_model,
    tower_sizes,
)


def ovis2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Ovis 2: features are mixtures of visual words, 4 tokens a tile; five markers have embeddings of such words."""
    words, row_end = 32, 7
    config = Ovis2Config(
        vision_config=tower_sizes(image_size=16, vocab_size=words, hidden_stride=2),
        text_config=Qwen2Config(**decoder_sizes(layers)),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, TILE, VIDEO, row_end, END],
        hidden_size=HIDDEN,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    tile = [IMAGE] * 4

    def ids(rows: int, columns: int) -> list[int]:
        tiles: list[int] = []
        for i in range(rows * columns if rows * columns > 1 else 0):
            last = (i + 1) % columns == 0
            tiles += tile + ([] if i == rows * columns - 1 else [row_end] if last else [VIDEO])
        return [START, *tile, TILE, *tiles, END]

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(1, 1), (1, 2), (2, 2)]
        grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        tiles = sum(h * w + (h * w > 1) for h, w in grids)
        return [ids(*grid) for grid in grids], {"pixel_values": torch.randn(tiles, 3, 16, 16, generator=generator)}

    return tiny_model("ovis2", Ovis2ForConditionalGeneration, config, pictures, seed)


def aria(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Aria: experts in all layers beside shared ones; queries look at 16 or 36 patches, 4 or 6 tokens a crop.

    The images of a batch have one size and one number of crops; a mask says which of their pixels are padding.
    """
    text = decoder_sizes(layers, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    config = AriaConfig(
        vision_config={"model_type": "idefics3_vision", **tower_sizes(image_size=24)},
        text_config=AriaTextConfig(**text),
        projector_patch_to_query_dict={16: 4, 36: 6},
        image_token_index=IMAGE,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        size, tokens = [(16, 4), (24, 6)][choice(generator, 2)]
        crops = 1 + choice(generator, 2)
        pixels = torch.randn(sum(counts) * crops, 3, size, size, generator=generator)
        mask = torch.ones(len(pixels), size, size, dtype=torch.bool)
        for one in mask:
            one[size - 4 * choice(generator, 3) :] = False
        return [[IMAGE] * (tokens * crops)] * sum(counts), {"pixel_values": pixels, "pixel_mask": mask}

    return tiny_model("aria", AriaForConditionalGeneration, config, pictures, seed)


def fuyu(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Fuyu: no tower, patches are projected into the decoder; 2 to 6 tokens an image, a newline behind each row."""
    text = decoder_sizes(layers, model_type="persimmon", hidden_act="relu2", qk_layernorm=True)
    del text["num_key_value_heads"]
    config = FuyuConfig(patch_size=4, image_size=16, text_config=text, image_token_id=IMAGE)

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(1, 2), (2, 2), (3, 2), (2, 3)]
        grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        patches = torch.randn(sum(h * w for h, w in grids), 4 * 4 * 3, generator=generator)
        return [([IMAGE] * w + [TILE]) * h + [START] for h, w in grids], {"pixel_values": patches}

    return tiny_model("fuyu", FuyuForCausalLM, config, pictures, seed)


def molmo2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Molmo 2: features are added to embeddings of ids beyond the vocabulary; vision tokens see one another.

    A small view and crops that overlap, pooled two by two; rows end with a marker. Every other layer has another rope.
    Frames of videos stand between their times; images and videos do not go together.
    """
    start, end, patch, column, low, frame, frame_end = range(VOCABULARY, VOCABULARY + 7)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": HIDDEN // 2}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    sizes = {"head_dim": HIDDEN // 4, "additional_vocab_size": 8, "rope_scaling_layers": list(range(1, layers, 2))}
    config = Molmo2Config(
        vision_config=tower_sizes(image_size=[16, 16], **heads) | {"num_hidden_layers": 2},
        adapter_config={
            "vision_feature_layer": [1, 0],
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "text_hidden_size": HIDDEN,
            **heads,
        },
        text_config=decoder_sizes(layers, rope_parameters=rope, **sizes),
        image_start_token_id=start,
        low_res_image_start_token_id=low,
        image_end_token_id=end,
        image_patch_id=patch,
        frame_start_token_id=frame,
        frame_end_token_id=frame_end,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(1, 1), (1, 2), (2, 1)]
        tilings = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        ids, pools, grids, crops = [], [], [], 0
        for h, w in tilings:
            rows, columns = (
                h + 1,
                w + 1,
            )  # crops of 4 × 4 patches share a margin of one patch with the next, on each side
            pools += [_pools(torch.arange(16).view(4, 4)) + 16 * crops, _pools(_canvas(h, w)) + 16 * (crops + 1)]
            ids.append([low, *([patch] * 2 + [column]) * 2, end, start, *([patch] * columns + [column]) * rows, end])
            grids.append([2, 2, rows, columns])
            crops += 1 + h * w
        return ids, {
            "pixel_values": torch.randn(crops, 16, 4 * 4 * 3, generator=generator),
            "image_token_pooling": torch.cat(pools),
            "image_grids": torch.tensor(grids),
            "image_num_crops": torch.tensor([1 + h * w for h, w in tilings]),
        }

    def clips(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        frames = [2 + choice(generator, 2) for _ in range(sum(counts))]
        pixels = torch.randn(sum(frames), 16, 4 * 4 * 3, generator=generator)
        one, view = _pools(torch.arange(16).view(4, 4)), [frame, *[patch] * 4, frame_end]
        ids = [[i for _ in range(n) for i in (*text_tokens(2, generator), *view)] for n in frames]
        return ids, {
            "pixel_values_videos": pixels,
            "video_token_pooling": torch.cat([one + 16 * i for i in range(len(pixels))]),
            "video_grids": torch.tensor([[n, 2, 2] for n in frames]),
        }

    def finish(inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | {"mm_token_type_ids": inputs["input_ids"].ge(VOCABULARY).long()}

    more: dict[str, Any] = {"clips": clips, "video_token_id": patch, "finish": finish}
    return tiny_model("molmo2", Molmo2ForConditionalGeneration, config, pictures, seed, **more)


def phi4_multimodal(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Phi-4 multimodal: the decoder encodes images itself; a small view and crops, masks of their padding, longrope.

    A learned token ends each row and stands between crops and view: 9 to 19 tokens an image. Queries, keys and values
    are one projection, half of a head has rope.
    """
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    factors = {"short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0]}
    audio = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_blocks": 1, "num_attention_heads": 2}
    channels = dict.fromkeys(["ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"], HIDDEN)
    config = Phi4MultimodalConfig(
        **decoder_sizes(layers, rope_parameters=rope | factors, original_max_position_embeddings=256),
        vision_config=tower_sizes(image_size=16, crop_size=16, image_token_id=IMAGE) | {"num_hidden_layers": 2},
        audio_config={**audio, **channels, "input_size": 16, "audio_token_id": END, "feature_layer": -1},
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(4, 4), (4, 6), (7, 4), (2, 8)]  # patches of the whole image; crops have 4 × 4
        grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        crops = [(-(-h // 4), -(-w // 4)) for h, w in grids]
        most = 1 + max(h * w for h, w in crops)
        pixels, masks = torch.zeros(len(grids), most, 3, 16, 16), torch.ones(len(grids), most, 4, 4)
        lengths = []
        for i, ((h, w), (rows, columns)) in enumerate(zip(grids, crops, strict=True)):
            whole = torch.zeros(4 * rows, 4 * columns)
            whole[:h, :w] = 1
            masks[i, 1 : 1 + rows * columns] = whole.unfold(0, 4, 4).unfold(1, 4, 4).flatten(0, 1)
            pixels[i, : 1 + rows * columns] = torch.randn(1 + rows * columns, 3, 16, 16, generator=generator)
            lengths.append(2 * 3 + 1 + -(-h // 2) * (-(-w // 2) + 1))
        sizes = 16 * torch.tensor(crops)
        inputs = {"image_pixel_values": pixels, "image_sizes": sizes, "image_attention_mask": masks}
        return [[IMAGE] * n for n in lengths], inputs

    kind = Phi4MultimodalForCausalLM
    return tiny_model("phi4_multimodal", kind, config, pictures, seed, image_token_id=IMAGE)


def hyperclovax_vision_v2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """HyperCLOVA X Vision: the tower of Qwen2.5-VL, plain rope, norms behind attention and MLP too, and multipliers.

    Images of any size, 4 to 12 tokens each; videos of 2 or 3 such frames.
    """
    tower = tower_sizes(depth=2, num_heads=2, window_size=16, out_hidden_size=HIDDEN, fullatt_block_indexes=[1])
    del tower["num_hidden_layers"], tower["num_attention_heads"]
    scales = {"embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}
    config = HyperCLOVAXVisionV2Config(
        vision_config={"model_type": "qwen2_5_vl_vision", **tower},
        text_config={"model_type": "hyperclovax", **decoder_sizes(layers, **scales, logits_scaling=0.5)},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )

    def patches(frames: Sequence[int], token: int, names: Sequence[str]) -> Pictures:
        def make(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
            options = [(t, h, w) for t in frames for h, w in [(4, 4), (4, 8), (6, 8), (6, 4)]]
            grids = torch.tensor([options[choice(generator, len(options))] for _ in range(sum(counts))])
            numbers = grids.prod(1).tolist()
            pixels = torch.randn(sum(numbers), 3 * 2 * 4 * 4, generator=generator)
            return [[START, *[token] * (n // 4), END] for n in numbers], {names[0]: pixels, names[1]: grids}

        return make

    pictures = patches([1], IMAGE, ["pixel_values", "image_grid_thw"])
    clips = patches([2, 3], VIDEO, ["pixel_values_videos", "video_grid_thw"])
    kind = HyperCLOVAXVisionV2ForConditionalGeneration
    more: dict[str, Any] = {"clips": clips, "video_token_id": VIDEO}
    return tiny_model("hyperclovax_vision_v2", kind, config, pictures, seed, **more)


def _canvas(h: int, w: int) -> Tensor:
    """Of h × w crops of 4 × 4 patches that overlap, the patch that stands for each place of the whole image."""
    index = torch.arange(16 * h * w).view(h, w, 4, 4)
    index[1:, :, :1], index[:, 1:, :, :1], index[:-1, :, -1:], index[:, :-1, :, -1:] = -1, -1, -1, -1
    index = index.transpose(1, 2).flatten()
    return index[index >= 0].view(2 * h + 2, 2 * w + 2)


def _pools(patches: Tensor) -> Tensor:
    """The patches of each window of two by two."""
    return patches.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
