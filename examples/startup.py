"""How long a rewritten model takes to its first tokens, by depth: a LLaVA of hidden size 256 with random weights.

    OMP_NUM_THREADS=1 python examples/startup.py 8 16 32 80

In each line, seconds of this process: the first call of ``generate()`` of the unmodified model, the first one with a
recipe, another prompt of one row after it, a padded batch, and one again; then the graphs that were captured.
``--whole`` traces every layer, as if no two were alike.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmrewrite as vr
from vlmrewrite.capture import captures_of

IMAGE, TOKENS = 999, 16


def build(layers: int) -> LlavaForConditionalGeneration:
    """The model, in eval mode."""
    tower = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=8, vocab_size=1000
    )
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, image_seq_length=TOKENS)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.eval()
    return model


def prompts(lengths: list[int]) -> dict[str, Any]:
    """A prompt of each number of text tokens with an image, padded on the left."""
    longest = max(lengths)
    ids = torch.randint(1, 900, (len(lengths), TOKENS + longest))
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        ids[row, : longest - n], mask[row, : longest - n] = 0, 0
        ids[row, longest - n + 1 : longest - n + 1 + TOKENS] = IMAGE
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(len(lengths), 3, 56, 56)}


def seconds(model: Any, inputs: dict[str, Any]) -> float:
    """Process time of two new tokens."""
    before = time.process_time()
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return time.process_time() - before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", type=int, nargs="+")
    parser.add_argument("--recipe", default="stride-half")
    parser.add_argument("--whole", action="store_true", help="trace every layer")
    options = parser.parse_args()
    print(f"{'layers':>6} {'before':>7} {'first':>7} {'another':>7} {'padded':>7} {'another':>7} {'graphs':>7}")
    for layers in options.layers:
        model = build(layers)
        took = [seconds(model, prompts([5]))]
        if options.whole:
            captures_of(model).call.whole = "--whole"
        vr.apply(model, options.recipe)
        took += [seconds(model, prompts(lengths)) for lengths in ([5], [9], [5, 8], [7])]
        graphs = vr.report(model).graphs["captured"]
        print(f"{layers:6}", *(f"{t:7.2f}" for t in took), f"{graphs:7}", flush=True)


if __name__ == "__main__":
    main()
