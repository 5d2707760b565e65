"""A family that the compiler was never told about: Aya Vision, with a Cohere 2 decoder and sliding windows."""

# --8<-- [start:build]
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, SiglipVisionConfig

import vlmrewrite as vr
from vlmrewrite.testing import generation_agreement
from vlmrewrite.testing.models import IMAGE, PAD, VOCABULARY, Row, TinyVLM


def aya_vision(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Aya Vision: SigLIP and Cohere 2, 4 tokens an image, a sliding window of 8 tokens in three layers of four."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
    tower = SiglipVisionConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16, vision_use_head=False
    )
    text = Cohere2Config(
        **sizes,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = AyaVisionConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, downsample_factor=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AyaVisionForConditionalGeneration(config).float().eval()
        for p in model.parameters():  # so large that attention is far from uniform, and a wrong token shows
            p.data = torch.randn_like(p) * (1.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1) + (p.dim() == 1)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return TinyVLM("aya_vision", model, IMAGE, pictures)


def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
    """The token ids of each image, and what the vision tower takes."""
    pixels = torch.randn(sum(counts), 3, 16, 16, generator=generator)
    return [[IMAGE] * 4] * len(pixels), {"pixel_values": pixels}


# --8<-- [end:build]
# --8<-- [start:try]
def try_it() -> None:
    """What the compiler finds in the family, and whether it does right by it."""
    tiny = aya_vision()
    inputs = tiny.inputs([Row(images=1), Row(images=2, before=3, after=1)], side="left")
    program = vr.trace(tiny.model, inputs)
    print(program)  # the layers that were found; an error names the node and its source line
    vision = program.vision_mask(*program.inputs)
    assert torch.equal(vision, inputs["input_ids"] == tiny.image_token_id)
    for recipe in ("sts-half", "fastv-half", "vtw-half"):
        generation_agreement(tiny.model, inputs, recipe).check()


# --8<-- [end:try]

if __name__ == "__main__":
    try_it()
