"""Families whose learned queries look at an image: it has as many tokens as there are queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    Kosmos2_5Config,
    Kosmos2_5ForConditionalGeneration,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    OPTConfig,
)

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    PAD,
    SPECIAL,
    START,
    VIDEO,
    VOCABULARY,
    TinyVLM,
    choice,
    decoder_sizes,
    square,
    tiny_model,
    tower_sizes,
)

QUERIES = 4


def blip_2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """BLIP-2: 4 queries of a Q-Former, OPT with learned positions; each call needs an image, in no more than a row."""
    config = Blip2Config(
        vision_config=tower_sizes(image_size=16),
        qformer_config=_qformer(),
        text_config=_opt(layers),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    return tiny_model("blip_2", Blip2ForConditionalGeneration, config, square(16, QUERIES), seed)


def instructblip(layers: int = 4, seed: int = 0) -> TinyVLM:
    """InstructBLIP: 4 queries of a Q-Former that reads the prompt too; each call needs an image, in no more than a row.

    An image comes with the text of its row.
    """
    config = InstructBlipConfig(
        vision_config=tower_sizes(image_size=16),
        qformer_config=_qformer(),
        text_config=_opt(layers),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    pictures, finish = square(16, QUERIES), _read(IMAGE, QUERIES)
    return tiny_model("instructblip", InstructBlipForConditionalGeneration, config, pictures, seed, finish=finish)


def instructblipvideo(layers: int = 4, seed: int = 0) -> TinyVLM:
    """InstructBLIP for videos: 4 queries of each of 4 frames; it takes no images, so its pictures are such clips.

    As InstructBLIP, but the features come from ``get_video_features``. Images and clips do not go together.
    """
    config = InstructBlipVideoConfig(
        vision_config=tower_sizes(image_size=16),
        qformer_config=_qformer(),
        text_config=_opt(layers),
        num_query_tokens=QUERIES,
        video_token_index=VIDEO,
    )
    tokens = 4 * QUERIES

    def clips(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        pixels = torch.randn(sum(counts), 4, 3, 16, 16, generator=generator)
        return [[VIDEO] * tokens] * len(pixels), {"pixel_values": pixels}

    more: dict[str, Any] = {
        "image_token_id": VIDEO,
        "video_token_id": VIDEO,
        "clips": clips,
        "finish": _read(VIDEO, tokens),
    }
    kind = InstructBlipVideoForConditionalGeneration
    return tiny_model("instructblipvideo", kind, config, clips, seed, **more)


def kosmos_2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Kosmos-2: 4 tokens an image, each with an id of its own; a mask says where they are, not the ids.

    Sine positions that leave out padding, and a 4-d mask of floats that the model makes itself; each call needs an
    image. ``image_token_id`` is the first of the four.
    """
    text = {"vocab_size": VOCABULARY + QUERIES, "ffn_dim": 2 * HIDDEN}
    config = Kosmos2Config(
        text_config=_kosmos_text(layers, **text),
        vision_config=tower_sizes(image_size=16),
        latent_query_num=QUERIES,
        tie_word_embeddings=False,
    )
    image = list(range(VOCABULARY, VOCABULARY + QUERIES))

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        pixels = torch.randn(sum(counts), 3, 16, 16, generator=generator)
        return [[START, *image, END]] * len(pixels), {"pixel_values": pixels}

    def finish(inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | {"image_embeds_position_mask": inputs["input_ids"].ge(VOCABULARY).long()}

    more: dict[str, Any] = {"image_token_id": image[0], "finish": finish}
    return tiny_model("kosmos_2", Kosmos2ForConditionalGeneration, config, pictures, seed, **more)


def kosmos_2_5(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Kosmos-2.5: 4 tokens an image of up to 16 patches that come with their rows and columns.

    A mask says where the tokens are (1) and their markers (-1); both get another segment. Sine positions.
    """
    config = Kosmos2_5Config(
        text_config=_kosmos_text(layers, vocab_size=VOCABULARY, ffn_dim=2 * HIDDEN),
        vision_config=tower_sizes(patch_embed_hidden_size=3 * 4 * 4, head_dim=HIDDEN // 2, max_num_patches=17),
        latent_query_num=QUERIES,
        tie_word_embeddings=False,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(4, 4), (3, 5), (5, 3), (2, 8)]
        grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        patches = torch.zeros(len(grids), 16, 2 + 3 * 4 * 4)
        for one, (h, w) in zip(patches, grids, strict=True):
            places = torch.cartesian_prod(torch.arange(1, h + 1), torch.arange(1, w + 1))
            one[: h * w] = torch.cat([places, torch.randn(h * w, 3 * 4 * 4, generator=generator)], 1)
        heights, widths = (4 * torch.tensor(sides) for sides in zip(*grids, strict=True))
        inputs = {"flattened_patches": patches, "width": widths, "height": heights}
        return [[START, *[IMAGE] * QUERIES, END]] * len(grids), inputs

    def finish(inputs: dict[str, Any]) -> dict[str, Any]:
        ids = inputs["input_ids"]
        return inputs | {"image_embeds_position_mask": ids.eq(IMAGE).long() - ids.eq(START).long() - ids.eq(END).long()}

    more: dict[str, Any] = {"image_token_id": IMAGE, "finish": finish}
    return tiny_model("kosmos_2_5", Kosmos2_5ForConditionalGeneration, config, pictures, seed, **more)


def _qformer() -> dict[str, Any]:
    """A Q-Former of two layers; the first looks at the image."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_attention_heads": 2, "num_hidden_layers": 2}
    return {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 512}


def _opt(layers: int) -> OPTConfig:
    sizes = decoder_sizes(layers, ffn_dim=2 * HIDDEN, word_embed_proj_dim=HIDDEN, tie_word_embeddings=False)
    del sizes["num_key_value_heads"], sizes["intermediate_size"]
    return OPTConfig(**sizes)


def _kosmos_text(layers: int, **more: Any) -> dict[str, Any]:
    sizes = {"embed_dim": HIDDEN, "attention_heads": 4, "layers": layers, "max_position_embeddings": 512}
    ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
    return {**sizes, **ids, "tie_word_embeddings": False, **more}


def _read(image: int, tokens: int) -> Any:
    """Adds what the Q-Former reads: for each image the text of its row, padded on the right."""

    def finish(inputs: dict[str, Any]) -> dict[str, Any]:
        texts = []
        for row in inputs["input_ids"]:
            texts += [row[row >= SPECIAL]] * (int(row.eq(image).sum()) // tokens)
        if not texts:
            return inputs
        ids = torch.nn.utils.rnn.pad_sequence(texts, True, PAD)
        return inputs | {"qformer_input_ids": ids, "qformer_attention_mask": ids.ne(PAD).long()}

    return finish
