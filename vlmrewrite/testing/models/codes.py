"""Families made to read and to draw images: codes of a codebook stand for what is in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
)

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    START,
    TILE,
    VIDEO,
    VOCABULARY,
    TinyVLM,
    choice,
    decoder_sizes,
    square,
    text_tokens,
    tiny_model,
    tower_sizes,
)

CODES = 16


def chameleon(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Chameleon: features are embeddings of 16 of the codebook's tokens; such tokens never come next, their logits say.

    Queries and keys have norms.
    """
    codes = {"IMGIMG" + chr(ord("A") + i // 10) + chr(ord("A") + i % 10) + "Z": VOCABULARY + i for i in range(CODES)}
    config = ChameleonConfig(
        **decoder_sizes(layers) | {"vocab_size": VOCABULARY + CODES},
        vq_config=_codebook(num_embeddings=CODES, embed_dim=8, latent_channels=8, resolution=16),
        vocabulary_map={"<image>": IMAGE, **codes},
    )
    pictures = square(16, 16, marked=True)
    return tiny_model("chameleon", ChameleonForConditionalGeneration, config, pictures, seed)


def emu3(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Emu3: features are embeddings of the codebook's tokens, rows of them with a token at the end, 6 to 12 an image.

    Markers and the image's height and width in letters stand in front.
    """
    codes = {f"<|visual token {i:06d}|>": VOCABULARY + i for i in range(CODES)}
    tower = _codebook(codebook_size=CODES, embed_dim=4, latent_channels=4, hidden_size=HIDDEN, attn_resolutions=[1])
    config = Emu3Config(
        vq_config=tower,
        text_config=decoder_sizes(layers, bos_token_id=START) | {"vocab_size": VOCABULARY + CODES + 1},
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": VOCABULARY + CODES, **codes},
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(2, 2), (2, 3), (3, 2), (3, 3)]
        grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        sizes = 4 * torch.tensor(grids)
        pixels = torch.zeros(len(grids), 3, *sizes.amax(0).tolist())
        for one, (h, w) in zip(pixels, sizes.tolist(), strict=True):
            one[:, :h, :w] = torch.randn(3, h, w, generator=generator)
        ids = [[START, *text_tokens(3, generator), TILE, *[IMAGE] * (h * (w + 1)), VIDEO, END] for h, w in grids]
        return ids, {"pixel_values": pixels, "image_sizes": sizes}

    return tiny_model("emu3", Emu3ForConditionalGeneration, config, pictures, seed)


def janus(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Janus: a tower for reading, 16 tokens an image; a codebook and a head of its own for drawing lie beside it."""
    sizes = {"projection_dim": HIDDEN, "image_token_embed_dim": HIDDEN}
    config = JanusConfig(
        vision_config=tower_sizes(image_size=16, projection_dim=HIDDEN, num_image_tokens=16, mlp_ratio=2.0),
        text_config=LlamaConfig(**decoder_sizes(layers)),
        vq_config=_codebook(num_embeddings=CODES, embed_dim=8, latent_channels=8, **sizes),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    pictures = square(16, 16, marked=True)
    return tiny_model("janus", JanusForConditionalGeneration, config, pictures, seed)


def _codebook(**more: Any) -> dict[str, Any]:
    """A codebook of images a quarter as high and as wide."""
    return {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, **more}
