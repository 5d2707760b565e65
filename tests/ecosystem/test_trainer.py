"""transformers' Trainer (which needs accelerate): checkpoints of a rewritten model, resumed to the last bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import vlmrewrite as vr
from vlmrewrite.passes import DPVR, STS
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.testing.models import FAMILIES, Row

pytest.importorskip("peft")  # of the environment that `make ecosystem` makes
RECIPE = [STS(keep=5, refine=3, at=1), DPVR(at=2, branch="random")]


def made():
    torch.manual_seed(0)
    return FAMILIES["llava"](layers=4)


def rows(tiny):
    for seed in range(8):
        one = tiny.inputs([Row(1, 2, 3)], seed=seed)
        yield {name: x[0] for name, x in one.items()} | {"labels": one["input_ids"][0]}


GIVEN = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 2, "use_cpu": True}
QUIET = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "dataloader_pin_memory": False}


def trainer(model, folder, **how):
    data = list(rows(made()))
    arguments = TrainingArguments(folder, **GIVEN | QUIET | how)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])


def blocks(model):
    return {n: p.detach().clone() for n, p in getattr(model, ATTRIBUTE).named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of checkpoints, the blocks at the end, and the model."""
    folder, model = tmp_path_factory.mktemp("run"), made().model
    vr.apply(model, RECIPE)
    before = blocks(model)
    trainer(model, folder).train()
    assert not same(blocks(model), before)
    return folder, blocks(model), model


@pytest.mark.parametrize("how", ["from_pretrained", "apply"])
def test_a_run_is_resumed_to_the_last_bit(run, tmp_path, how):
    folder, expected, _ = run
    half = folder / "checkpoint-2"
    model = vr.from_pretrained(half) if how == "from_pretrained" else vr.apply(made().model, half)
    assert not same(blocks(model), expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*none of the blocks")
        trainer(model, tmp_path).train(resume_from_checkpoint=str(half))
    assert same(blocks(model), expected)


def test_a_run_that_is_resumed_without_its_blocks_says_so(run, tmp_path):
    model = made().model
    vr.apply(model, RECIPE)
    with pytest.warns(UserWarning, match=r"none of the blocks of this Llava.*load_blocks\(model, folder\)"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(run[0] / "checkpoint-2"))


def test_the_best_model_has_its_blocks_loaded(tmp_path):
    model = made().model
    vr.apply(model, RECIPE)
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    one = trainer(model, tmp_path, metric_for_best_model="loss", **best)
    with pytest.warns(UserWarning, match="none of the blocks"):
        one.train()
    found = one.state.best_model_checkpoint
    assert found.endswith("checkpoint-2"), "the larger loss is the best here"
    last = blocks(model)
    vr.load_blocks(model, found)
    assert not same(blocks(model), last)
    assert same(blocks(model), blocks(vr.from_pretrained(found)))


@torch.no_grad()
def test_what_the_trainer_saves_is_loaded(run, tmp_path):
    model = run[2]
    inputs = made().inputs([Row(1, 2, 3)])
    trainer(model, tmp_path).save_model(tmp_path / "saved")
    model.eval()
    plain, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values())
    other = vr.from_pretrained(tmp_path / "saved")
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    vr.restore(other)
    assert torch.equal(other(**inputs).logits, plain(**inputs).logits)


def test_generated_answers_are_those_of_generate(tmp_path):
    """While it is trained and behind that, `predict_with_generate` asks `generate()` of the rewritten model."""
    model, data, said = made().model, list(rows(made())), []
    vr.apply(model, RECIPE)
    how = {"predict_with_generate": True, "eval_strategy": "steps", "eval_steps": 2, "generation_max_length": 25}
    arguments = Seq2SeqTrainingArguments(tmp_path, **GIVEN | QUIET | how, per_device_eval_batch_size=2)
    greedy = {"do_sample": False, "max_new_tokens": 4}

    def generated(predicted):
        said.append((torch.as_tensor(predicted.predictions), blocks(model)))
        return {"seen": len(said)}

    one = Seq2SeqTrainer(model, arguments, train_dataset=data, eval_dataset=data[:2], compute_metrics=generated)
    before = blocks(model)
    one.train()
    assert len(said) == 2 and not same(said[0][1], said[1][1]) and not same(before, said[0][1])
    batch = {name: torch.stack([row[name] for row in data[:2]]) for name in data[0] if name != "labels"}
    found = torch.as_tensor(one.predict(data[:2], **greedy).predictions)
    model.eval()
    expected = model.generate(**batch, **greedy)
    assert torch.equal(found, expected)
    report = vr.report(model)
    assert {p["name"]: p["reason"] for p in report.passes} == {"sts": None, "dpvr": None}
