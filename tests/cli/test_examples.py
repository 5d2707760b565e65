"""Every example runs, on the bundled weights."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlmrewrite as vr
from tests import scripts
from vlmrewrite.passes import DAPE, DPVR, VISOR
from vlmrewrite.plan.blocks import ATTRIBUTE
from vlmrewrite.runtime import routing

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "digits" / "checkpoint"


run = functools.partial(scripts.run, EXAMPLES)


@pytest.mark.slow
def test_demo(tmp_path):
    """In a process of its own, as whoever reads the README runs it."""
    picture = tmp_path / "demo.png"
    command = [sys.executable, "examples/demo.py", "--image", str(picture)]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unmodified" in done.stdout
    assert "sts-half" in done.stdout
    assert "FLOPs ÷" in done.stdout
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_startup():
    head, line = run("startup.py", 3).splitlines()
    assert head.split() == ["layers", "before", "first", "another", "padded", "another", "graphs"]
    assert (line.split()[0], line.split()[-1]) == ("3", "2")


@pytest.mark.slow
def test_evaluate(tmp_path):
    text = run("-m", "digits.evaluate", "-n", 2, "--batch", 2, "--json", tmp_path / "out.json")
    assert all(name in text for name in ("unmodified", "STS", "Random", "Stride", "1/8"))


@pytest.mark.slow
def test_train_runs(tmp_path):
    small = ("--smoke", "--questions", 2, "--threads", 1)
    run("-m", "digits.train", *small, "--out", tmp_path / "out", "--scratch", tmp_path / "s")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_bundled_model_is_small_and_unmodified_classes_load_it():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert sum(f.stat().st_size for f in CHECKPOINT.iterdir()) < 10_000_000
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    assert type(model).__module__ == "transformers.models.llava.modeling_llava"
    assert model.config.text_config.num_hidden_layers >= 6
    assert model.config.image_seq_length >= 144
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-16x1024"])
def test_configurations_can_be_read(name):
    from vlmrewrite.cli.config import read_config

    config, _ = read_config(EXAMPLES / "configs" / f"{name}.json")
    assert config.image_seq_length == 576


@pytest.mark.slow
def test_recipes(tmp_path):
    arguments = ("-n", 2, "--batch", 2, "--prompts", 1, "--repeat", 1, "--json", tmp_path / "out.json")
    text = run("-m", "digits.recipes", *arguments, "--only", "dpvr", "visor-policy", "vtw-half")
    assert all(name in text for name in ("unmodified", "dpvr", "untrained", "visor-policy", "vtw-half"))


CHAIN = [{"cross_layers": [0, 1, 2]}, {"self_layers": [0, 1, 2], "cross_layers": [3]}, {"self_layers": 1.0}]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize(
    ("technique", "rate"),
    [
        (DPVR(at=2, branch="random"), 1e-3),
        (DAPE(budget=0.5, mode="inject"), 3e-2),
        (VISOR(policy="router", chain=CHAIN), 1e-3),
    ],
    ids=["dpvr", "dape", "visor"],
)
def test_three_steps_on_the_bundled_model_reduce_the_loss(technique, rate):
    sys.path.insert(0, str(EXAMPLES))
    try:
        from digits.model import encode, load
        from digits.scenes import EVALUATION_SEED, held_out_questions
    finally:
        sys.path.remove(str(EXAMPLES))
    torch.manual_seed(0)
    model, processor = load()
    records = held_out_questions(8, EVALUATION_SEED)
    inputs = dict(encode(processor, records))
    answers = processor.tokenizer([r.answer for r in records], add_special_tokens=False, return_tensors="pt").input_ids
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answers[:, :1]], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answers[:, :1]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    vr.apply(model, [technique], strict=True)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in learning} == {id(p) for p in getattr(model, ATTRIBUTE).parameters()}
    optimizer = torch.optim.AdamW(learning, lr=rate)
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=labels).loss
        if technique.name == "visor":  # the router's labels: the cheapest configuration
            loss = torch.nn.functional.cross_entropy(routing(model), torch.zeros(8, dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learning)
        optimizer.step()
        losses.append(loss.item())
    assert losses[3] < losses[0]
