"""Trainers of TRL, which call what is below a model's head and put a head of their own on it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlmrewrite as vr
from tests.saved_llava import saved_llava
from vlmrewrite.passes import DPVR, STS

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{{ ('<image>' if c['type'] == 'image' else c['text']) + ' ' }}"
    "{% endfor %}{% endfor %}"
)
SOME = [STS(keep=5, refine=3, at=1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def processor(folder):
    made = AutoProcessor.from_pretrained(folder)
    made.chat_template = made.tokenizer.chat_template = TEMPLATE
    made.tokenizer.eos_token = "<pad>"
    return made


def turn(role, *words, image=False):
    content = [{"type": "image"}] * image + [{"type": "text", "text": word} for word in words]
    return {"role": role, "content": content}


def rows(make):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(8)]
    return datasets.Dataset.from_list([{"images": [picture], **make(i)} for i, picture in enumerate(pictures)])


def question(i):
    return turn("user", f"w{10 + i}", "w11", image=True)


def options(tmp_path, **more):
    common = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 5e-3, "logging_steps": 1}
    return common | {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "save_strategy": "no",
                     "gradient_checkpointing": False, "bf16": False, "max_length": None} | more  # fmt: skip


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def supervised(model, processor, tmp_path, **more):
    data = rows(lambda i: {"messages": [question(i), turn("assistant", f"w{20 + i}", "w21")]})
    args = trl.SFTConfig(**options(tmp_path, **more))
    return trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)


@pytest.mark.parametrize("passes", [SOME, [DPVR()]], ids=["sts", "dpvr"])
def test_supervised(folder, processor, tmp_path, passes):
    model = vr.apply(LlavaForConditionalGeneration.from_pretrained(folder), passes)
    seen = losses(supervised(model, processor, tmp_path))
    assert len(seen) == 6
    assert seen[-1] < 0.9 * seen[0]
    assert any(not stage.vision.all() for stage in vr.kept_tokens(model))


def test_checkpointing_changes_no_loss(folder, processor, tmp_path):
    seen = []
    for on in (False, True):
        model = vr.apply(LlavaForConditionalGeneration.from_pretrained(folder), SOME)
        seen.append(losses(supervised(model, processor, tmp_path, gradient_checkpointing=on)))
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_preferences(folder, processor, tmp_path):
    model, other = (LlavaForConditionalGeneration.from_pretrained(folder) for _ in range(2))
    data = rows(
        lambda i: {
            "prompt": [question(i)],
            "chosen": [turn("assistant", f"w{20 + i}", "w21")],
            "rejected": [turn("assistant", f"w{30 + i}", "w31")],
        }
    )
    args = trl.DPOConfig(**options(tmp_path))
    trainer = trl.DPOTrainer(
        model=vr.apply(model, SOME), ref_model=other, args=args, train_dataset=data, processing_class=processor
    )
    seen = losses(trainer)
    assert seen[-1] < seen[0]
    assert any(not stage.vision.all() for stage in vr.kept_tokens(model))
