"""Requests per second and the time to the first token of vLLM with and without a recipe, on a CPU.

    python -m benchmarks.serving --recipe divprune-half --json serving.json     # in the environment of `make serving`

The model is a LLaVA of random weights whose prefill takes most of the time: a CLIP tower of two layers, 576 tokens an
image, and a Llama of eight layers of width 768. Each engine has a process of its own; each request has an image and a
question of its own and generates four tokens. What is told is ratios: absolute times are the machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

SIDE, WIDTH, IMAGE = 336, 768, 4
LEVELS = (1, 8, 32)


def save_model(folder: Path) -> None:
    """Write the model and its processor."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tower: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=14, **tower),
        text_config=LlamaConfig(vocab_size=256, max_position_embeddings=2048, **text),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    special = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "<image>": IMAGE}
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(5, 256)} | special, "<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokens: dict[str, Any] = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, extra_special_tokens={"image_token": "<image>"}, **tokens
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    options: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "default", "image_token": "<image>"}
    LlavaProcessor(pictures, tokenizer, num_additional_image_tokens=1, **options).save_pretrained(folder)


def measure(folder: Path, overrides: dict[str, Any], requests: int) -> dict[str, Any]:
    """Of each level of concurrency: requests per second, and the median time to the first token in seconds."""
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams

    noise, found = np.random.default_rng(0), {}
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 700, "block_size": 32}
    settings |= {"model_impl": "transformers", "max_num_seqs": max(LEVELS), "disable_log_stats": False}
    llm = LLM(str(folder), enable_prefix_caching=False, hf_overrides=overrides, **settings)
    how = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def asked(n: int) -> list[dict[str, Any]]:
        pictures = [Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(n)]
        return [{"prompt": "<image> w9 w10 w11", "multi_modal_data": {"image": picture}} for picture in pictures]

    llm.generate(asked(2), how, use_tqdm=False)
    for level in LEVELS:
        rounds, began, firsts = max(1, requests // level), time.perf_counter(), []
        for _ in range(rounds):  # so many at a time, the next when all have been answered
            firsts += [x.metrics.first_token_latency for x in llm.generate(asked(level), how, use_tqdm=False)]
        found[str(level)] = {
            "requests_per_second": rounds * level / (time.perf_counter() - began),
            "first_token": median(firsts),
        }
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe", default="divprune-half")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--overrides", default="{}", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.engine is not None:
        given.json.write_text(json.dumps(measure(given.engine, json.loads(given.overrides), given.requests)))
        return 0
    from vlmrewrite.recipe import Recipe
    from vlmrewrite.serving import vllm

    with tempfile.TemporaryDirectory() as name:
        folder, out, rows = Path(name) / "model", Path(name) / "out.json", []
        save_model(folder)
        for _ in range(given.rounds):
            each = []
            for overrides in ({}, vllm.overrides(Recipe.load(given.recipe))):
                command = [sys.executable, "-m", "benchmarks.serving", "--engine", str(folder), "--json", str(out)]
                command += ["--overrides", json.dumps(overrides), "--requests", str(given.requests)]
                subprocess.run(command, check=True, env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"})
                each.append(json.loads(out.read_text()))
            rows.append(each)
    print("concurrency  requests per second  time to first token (with the recipe, as a multiple of without)")
    told: dict[str, Any] = {"recipe": given.recipe, "requests": given.requests, "rounds": rows, "ratios": {}}
    for level in map(str, LEVELS):
        ratios = {key: median(new[level][key] / plain[level][key] for plain, new in rows) for key in rows[0][0][level]}
        told["ratios"][level] = ratios
        print(f"{level:>11}  {ratios['requests_per_second']:>19.2f}  {ratios['first_token']:>19.2f}")
    if given.json is not None:
        given.json.write_text(json.dumps(told, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
