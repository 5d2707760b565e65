"""Tiny vision-language models with random weights, and inputs as their processors would make them.

    tiny = FAMILIES["qwen2_5_vl"]()
    inputs = tiny.inputs([Row(images=2, before=3, after=4), Row(images=0, before=9, after=1)], side="left")
    logits = tiny.model(**inputs).logits

The models are built from the configuration classes of their families, in fp32 on the CPU. Their weights are so large
that attention is far from uniform and that a missing vision token shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

Side = Literal["left", "right"]

VOCABULARY = 64

HIDDEN = 32

PAD, START, END, TILE, IMAGE, VIDEO = 0, 2, 3, 4, 5, 6

_SPECIAL = 8  # token ids from here on are text


@dataclass(frozen=True)
class Row:
    """One prompt: ``before`` text tokens, ``images`` images with a text token between them, ``after`` text tokens."""

    images: int
    before: int = 2
    after: int = 3


class Pictures(Protocol):
    """Random images for prompts that hold ``counts`` images each."""

    def __call__(self, counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        """The token ids of each image, markers around it included, and what the vision tower takes."""
        ...


@dataclass(frozen=True)
class TinyVLM:
    """A tiny model of a family.

    Attributes:
        name: of the family.
        model: the Hugging Face model, in eval mode, fp32, on the CPU.
        image_token_id: of the tokens that vision features replace.
        pictures: makes images.
        token_types: the input that marks image tokens by 1, if the family has one.
    """

    name: str
    model: Any
    image_token_id: int
    pictures: Pictures
    token_types: str | None = None

    def inputs(self, rows: Sequence[Row], *, side: Side = "left", seed: int = 0) -> dict[str, Any]:
        """Inputs of a batch; the same seed gives the same text and images.

        Args:
            rows: the prompts.
            side: where shorter rows are padded.
            seed: of the text and the images.

        Returns:
            input_ids and attention_mask, int64 [B, T], pixel_values and the like if there is an image.

        Raises:
            ValueError: there is no row, or a row without a token.
        """
        if not rows or any(row.images + row.before + row.after < 1 for row in rows):
            raise ValueError(f"expected at least one row and a token in each, got {rows}")
        generator = torch.Generator().manual_seed(seed)
        images: list[list[int]] = []
        pixels: dict[str, Tensor] = {}
        if any(row.images for row in rows):
            images, pixels = self.pictures([row.images for row in rows], generator)
        pieces, sequences = iter(images), []
        for row in rows:
            prompt = _text(row.before, generator)
            for i in range(row.images):
                prompt += _text(min(i, 1), generator) + next(pieces)
            sequences.append(torch.tensor(prompt + _text(row.after, generator)))
        ids = torch.nn.utils.rnn.pad_sequence(sequences, True, PAD, padding_side=side)
        out: dict[str, Any] = {"input_ids": ids, "attention_mask": ids.ne(PAD).long()}
        if self.token_types is not None:
            out[self.token_types] = ids.eq(self.image_token_id).long()
        return out | pixels


def _text(n: int, generator: torch.Generator) -> list[int]:
    return torch.randint(_SPECIAL, VOCABULARY, (n,), generator=generator).tolist()


def _choice(generator: torch.Generator, n: int) -> int:
    return int(torch.randint(n, (), generator=generator))


def _tiny(
    name: str, kind: type[PreTrainedModel], config: Any, pictures: Pictures, seed: int, token_types: str | None = None
) -> TinyVLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).float().eval()
        for p in model.parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 0
            p.data = torch.randn_like(p) * (1.5 * fan_in**-0.5) if fan_in else p.data + 0.1 * torch.randn_like(p)
    settings = model.generation_config
    settings.pad_token_id, settings.eos_token_id, settings.bos_token_id = PAD, None, None
    settings.suppress_tokens = list(range(_SPECIAL))
    return TinyVLM(name, model, config.image_token_id, pictures, token_types)


def _decoder(layers: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
    return {**sizes, **heads, **ids, "num_hidden_layers": layers, **more}


def _tower(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {**sizes, "patch_size": 4, **more}


def _square(size: int, tokens: int, *, marked: bool = False) -> Pictures:
    """Images that all have one size and one number of tokens."""

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids = [START, *[IMAGE] * tokens, END] if marked else [IMAGE] * tokens
        pixels = torch.randn(sum(counts), 3, size, size, generator=generator)
        return [ids] * len(pixels), {"pixel_values": pixels}

    return pictures


def llava(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LLaVA 1.5: CLIP and Llama, 16 tokens an image."""
    return _llava("llava", LlamaConfig(**_decoder(layers)), seed)


def llava_qwen2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LLaVA with a Qwen2 decoder, whose q, k and v have biases."""
    return _llava("llava_qwen2", Qwen2Config(**_decoder(layers)), seed)


def _llava(name: str, text: Any, seed: int) -> TinyVLM:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_tower(image_size=16, projection_dim=HIDDEN)),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    return _tiny(name, LlavaForConditionalGeneration, config, _square(16, 16), seed)


def llava_next(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LLaVA 1.6: CLIP and Llama, tiles of any resolution, 14 to 24 tokens an image."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_tower(image_size=8, projection_dim=HIDDEN)),
        text_config=LlamaConfig(**_decoder(layers)),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        vision_feature_layer=-1,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(8, 16), (16, 8), (16, 16), (12, 16)]
        sizes = [options[_choice(generator, len(options))] for _ in range(sum(counts))]
        tiles = [image_size_to_num_patches(s, config.image_grid_pinpoints, 8) for s in sizes]
        pixels = torch.zeros(len(sizes), max(tiles), 3, 8, 8)
        for image, n in zip(pixels, tiles, strict=True):
            image[:n] = torch.randn(n, 3, 8, 8, generator=generator)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        base = tiny.model.base_model
        empty = [torch.zeros(n, 4, HIDDEN) for n in tiles]
        _, lengths = base.pack_image_features(empty, inputs["image_sizes"], "default", base.image_newline)
        return [[IMAGE] * n for n in lengths.tolist()], inputs

    tiny = _tiny("llava_next", LlavaNextForConditionalGeneration, config, pictures, seed)
    return tiny


def qwen2_5_vl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qwen2.5-VL: images of any size, 4 to 12 tokens each, multimodal rope."""
    tower = _tower(depth=2, num_heads=2, window_size=16, out_hidden_size=HIDDEN, fullatt_block_indexes=[1])
    del tower["num_hidden_layers"], tower["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2_5_VLConfig(
        vision_config=tower,
        text_config=_decoder(layers, rope_parameters=rope),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(1, 4, 4), (1, 4, 8), (1, 6, 8), (1, 6, 4)]
        grids = [options[_choice(generator, len(options))] for _ in range(sum(counts))]
        patches = [t * h * w for t, h, w in grids]
        pixels = torch.randn(sum(patches), 3 * 2 * 4 * 4, generator=generator)
        ids = [[START, *[IMAGE] * (n // 4), END] for n in patches]
        return ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}

    return _tiny("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration, config, pictures, seed, "mm_token_type_ids")


def internvl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """InternVL: one tile an image, or several and a thumbnail, 4 tokens a tile, one after the other."""
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**_tower(image_size=[16, 16], patch_size=[4, 4])),
        text_config=Qwen2Config(**_decoder(layers)),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        tiles = [(1, 3)[_choice(generator, 2)] for _ in range(sum(counts))]
        ids = [[START, *[IMAGE] * (4 * n), END] for n in tiles]
        return ids, {"pixel_values": torch.randn(sum(tiles), 3, 16, 16, generator=generator)}

    return _tiny("internvl", InternVLForConditionalGeneration, config, pictures, seed)


def smolvlm(layers: int = 4, seed: int = 0) -> TinyVLM:
    """SmolVLM: one tile an image, or two and a thumbnail, 4 tokens a tile, each behind a marker."""
    config = SmolVLMConfig(
        vision_config=_tower(image_size=16),
        text_config=LlamaConfig(**_decoder(layers)),
        image_token_id=IMAGE,
        scale_factor=2,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        tiles = [[(1, 3)[_choice(generator, 2)] for _ in range(n)] for n in counts]
        pixels = torch.zeros(len(counts), max(map(sum, tiles)), 3, 16, 16)
        mask = torch.zeros(pixels.shape[0], pixels.shape[1], 16, 16, dtype=torch.int64)
        for i, n in enumerate(map(sum, tiles)):
            pixels[i, :n], mask[i, :n] = torch.randn(n, 3, 16, 16, generator=generator), 1
        ids = [[START, TILE, *[IMAGE] * 4] * n + [START] for row in tiles for n in row]
        return ids, {"pixel_values": pixels, "pixel_attention_mask": mask}

    return _tiny("smolvlm", SmolVLMForConditionalGeneration, config, pictures, seed)


def gemma3(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Gemma 3: 9 tokens an image that see one another; every other layer has a sliding window of 8 tokens."""
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    text = _decoder(layers, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=kinds)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**_tower(image_size=24, vision_use_head=False)),
        text_config=Gemma3TextConfig(**text),
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,  # tied to large random embeddings, the next token would be the last one again
    )
    pictures = _square(24, 9, marked=True)
    return _tiny("gemma3", Gemma3ForConditionalGeneration, config, pictures, seed, "token_type_ids")


FAMILIES: dict[str, Callable[..., TinyVLM]] = {
    f.__name__: f for f in (llava, llava_qwen2, llava_next, qwen2_5_vl, internvl, smolvlm, gemma3)
}
"""The builder of each family, ``(layers=4, seed=0)``."""
