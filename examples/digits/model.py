"""The digits model: an unmodified Hugging Face LLaVA of 2.5 million parameters, and its processor.

CLIP tower (4 layers x 128, patch 8: 144 tokens) -> projector -> Llama (8 layers x 128, tied embeddings).
A prompt is "<image> " and four words; the processor turns it into <bos>, 144 x <image>, and the four words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .questions import BOS, EOS, IMAGE, PAD, VOCABULARY
from .scenes import CANVAS, PATCH, VISION_TOKENS, HeldOut

WIDTH, HEADS, MLP = 128, 4, 384
TOWER_LAYERS, DECODER_LAYERS = 4, 8
INIT_STD = 0.05
QUERY_KEY_STD = 0.08
CHECKPOINT = Path(__file__).parent / "checkpoint"


def build_model() -> LlavaForConditionalGeneration:
    """A freshly initialised model.

    Queries and keys start alike, so that a token attends to its likes from the start ("mimetic" initialisation:
    Trockman and Kolter, 2023).
    """
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=HEADS,
        image_size=CANVAS,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = text_config(len(VOCABULARY), DECODER_LAYERS, positions=512)
    model = LlavaForConditionalGeneration(llava_config(vision, text, VISION_TOKENS, strategy="default"))
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            alike(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
    greedy(model)
    return model


def text_config(words: int, layers: int, positions: int) -> LlamaConfig:
    """Of a decoder with so many words, layers and positions."""
    return LlamaConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=positions,
        initializer_range=INIT_STD,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )


def llava_config(vision: Any, text: LlamaConfig, tokens: int, strategy: Literal["default", "full"]) -> LlavaConfig:
    """Of a model whose decoder is given all of the tower's last layer, but for what ``strategy`` leaves out."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1,
        image_seq_length=tokens,
        tie_word_embeddings=True,
    )


def alike(query: torch.Tensor, key: torch.Tensor) -> None:
    """Let keys start as queries do, and both a little larger; weights [out, in]."""
    query.mul_(QUERY_KEY_STD / INIT_STD)
    key.copy_(query)


def greedy(model: LlavaForConditionalGeneration) -> None:
    """Let ``generate()`` be greedy, and know the special tokens."""
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = BOS, EOS, PAD
    settings.do_sample = False


def build_processor(
    vocabulary: dict[str, int] = VOCABULARY,
    canvas: int = CANVAS,
    patch: int = PATCH,
    mean: float = 0.5,
    std: float = 0.5,
    strategy: str = "default",
) -> LlavaProcessor:
    """Word-level tokenizer that puts <bos> first, and an image processor that only standardises pixels of 0..1."""
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    pictures = CLIPImageProcessorPil(
        do_resize=False,
        size={"shortest_edge": canvas},
        do_center_crop=False,
        crop_size={"height": canvas, "width": canvas},
        image_mean=[mean] * 3,
        image_std=[std] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        image_token="<image>",
        num_additional_image_tokens=int(strategy == "default"),  # the tower's CLS token, which LLaVA drops
    )


def save(model: LlavaForConditionalGeneration, folder: Path, processor: LlavaProcessor | None = None) -> None:
    """Write weights in fp16 (safetensors) and the processor, the digits' if none is given; ``model`` stays as it is."""
    half = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    (processor or build_processor()).save_pretrained(folder)


def load(folder: Path = CHECKPOINT) -> tuple[Any, Any]:
    """The saved model in fp32, in evaluation mode, and its processor."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def encode(processor: Any, records: Sequence[HeldOut]) -> Any:
    """Model inputs for one prompt a record; all prompts have one length."""
    images, texts = [r.image for r in records], [f"<image> {r.question}" for r in records]
    return processor(images=images, text=texts, return_tensors="pt")


@torch.no_grad()
def answers(model: Any, processor: Any, records: Sequence[HeldOut], batch: int = 50) -> list[str]:
    """Greedy ``generate()`` for every record, one question a prompt; returns the decoded texts."""
    out: list[str] = []
    for start in range(0, len(records), batch):
        inputs = encode(processor, records[start : start + batch]).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        out += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def final_accuracy(model: Any, processor: Any, records: Sequence[Any], kinds: Sequence[str]) -> dict[str, float]:
    """Accuracy of greedy ``generate()`` on held-out questions, overall and of each of their kinds."""
    right = [a == r.answer for a, r in zip(answers(model, processor, records), records, strict=True)]
    asked, hits = Counter(r.kind for r in records), Counter[str]()
    for record, ok in zip(records, right, strict=True):
        hits[record.kind] += ok
    return {"all": sum(right) / len(records)} | {kind: hits[kind] / asked[kind] for kind in kinds if asked[kind]}
