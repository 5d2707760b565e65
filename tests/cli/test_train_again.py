"""`vr.train` a second time on a folder, runs that fail, and what is left of the model and of the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT, load
from vlmrewrite.cli import app
from vlmrewrite.cli.loading import device_of
from vlmrewrite.compat import modes_kept
from vlmrewrite.compat import training as of_trainer
from vlmrewrite.evaluate import read_data
from vlmrewrite.passes import DAPE
from vlmrewrite.saving import BLOCKS
from vlmrewrite.training import Training

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

HOW: dict[str, Any] = {"steps": 1, "batch": 2, "lr": 0.01, "log_every": 1, "save_every": 1, "progress": False}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def modes(model: Any) -> list[Any]:
    flags = [(m.training, getattr(m, "gradient_checkpointing", None), len(m._forward_hooks)) for m in model.modules()]
    return [*flags, model.config.to_json_string(), [p.requires_grad for p in model.parameters()]]


@pytest.fixture(scope="module")
def run(digits: Any, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """One step, of a pass with terms."""
    passes = [DAPE(budget=0.5, matching="learned")]
    return vr.train(*digits, questions, passes, output=tmp_path_factory.mktemp("run") / "out", **HOW)


@pytest.fixture
def copy(run: Training, tmp_path: Path) -> Path:
    shutil.copytree(run.folder, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def again(digits: Any, questions: Path, copy: Path) -> Any:
    def go_on(**changes: Any) -> Training:
        how = {"data": questions, "recipe": [DAPE(budget=0.5, matching="learned")], "output": copy, "resume": True}
        return vr.train(*digits, **how | HOW | changes)

    return go_on


def test_a_run_that_is_done_is_not_trained_further(run: Training, copy: Path, again: Any) -> None:
    before = bytes_of(copy)
    (copy / BLOCKS).unlink()
    for _ in range(2):
        assert again().log == run.log
        assert bytes_of(copy) == before


def test_the_card(run: Training) -> None:
    card = (run.folder / "README.md").read_text()
    assert "| data | `my.jsonl`, 12 samples, sha256" in card
    [losses] = [line for line in card.splitlines() if line.startswith("| losses |")]
    parts = run.log[0].keys() - {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert len(parts) > 1 and all(f"{name} " in losses for name in parts)


def test_what_a_folder_is_of(digits: Any, copy: Path, again: Any) -> None:
    told = json.loads((copy / "training.json").read_text())
    weight = next(digits[0].parameters())
    before, first = bytes_of(copy), weight.detach().flatten()[0].clone()
    weight.data.flatten()[0] += 1
    try:
        with pytest.raises(ValueError, match=r"differs in the base model's weights: .*, or the same again$"):
            again()
    finally:
        weight.data.flatten()[0] = first
    with pytest.raises(ValueError, match=r"differs in the numbers that blocks start from, seed: .*\(seed: 0, now 1\)$"):
        again(seed=1)
    assert bytes_of(copy) == before
    told["run"]["processes"] = 2
    (copy / "training.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"differs in processes: .*processes: 2, now 1\)"):
        again()


def test_nothing_to_go_on_with(again: Any, tmp_path: Path) -> None:
    for name in ("empty", "none"):
        with pytest.raises(ValueError, match="holds no run to go on with"):
            again(output=tmp_path / name)
        (tmp_path / "none").mkdir(exist_ok=True)


def test_a_loss_that_is_no_number_ends_the_run(
    digits: Any, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = digits[0], modes(digits[0])
    loss = vr.training.objective.Objective._loss
    monkeypatch.setattr(vr.training.objective.Objective, "_loss", lambda *a: loss(*a) * float("nan"))
    with pytest.raises(RuntimeError, match=r"^step 1: the loss is nan, not finite, .*0.01: lower --lr"):
        vr.train(*digits, questions, "dpvr", output=tmp_path, **HOW)
    assert not list(tmp_path.rglob(BLOCKS)) and modes(model) == before
    with pytest.raises(ValueError, match="is not rewritten"):
        vr.trainable_blocks(model)


def test_gradients_that_are_no_numbers_end_the_run(
    digits: Any, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = vr.training.objective.Objective._loss
    endless = lambda *a: (x := loss(*a)) + (x - x.detach()).abs().sqrt()  # noqa: E731  # 0, of an endless slope
    monkeypatch.setattr(vr.training.objective.Objective, "_loss", endless)
    with pytest.raises(RuntimeError, match="^step 1: gradients are not finite"):
        vr.train(*digits, questions, "dpvr", output=tmp_path, **HOW)
    assert not list(tmp_path.rglob(BLOCKS))


def test_what_is_refused_leaves_nothing(
    digits: Any, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_data(asked[1:2])[0].pictures()[0].save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    cut = [asked[0], asked[1] | {"image": str(tmp_path / "cut.jpg")}]
    how = HOW | {"output": tmp_path / "out"}
    with pytest.raises(OSError, match="^sample 'q1': expected whole images"):
        vr.train(*digits, cut, "dpvr", **how)
    monkeypatch.setattr(type(digits[0]), "is_quantized", True, raising=False)
    with pytest.raises(ValueError, match="is quantised, and transformers' Trainer takes no such model"):
        vr.train(*digits, asked, "dpvr", **how)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"told to use mixed precision 'bf16' .*--bf16"):
        vr.train(*digits, asked, "dpvr", **how)
    with pytest.raises(ValueError, match="expected numbers lr > 0 .* got lr='fast'"):
        vr.train(*digits, asked, "dpvr", **how | {"lr": "fast"})
    assert not (tmp_path / "out").exists()


def test_a_model_in_training_is_given_back_so(digits: Any) -> None:
    model = digits[0]
    before = modes(model)
    with modes_kept(model):
        model.train()
        model.activation_checkpointing_enable()
        between = modes(model)
        with modes_kept(model):
            model.eval()
            model.activation_checkpointing_disable()
            model.activation_checkpointing_enable()
            model.activation_checkpointing_disable()
            model.config.use_cache = False
        assert modes(model)[:-2] == between[:-2]
    assert modes(model) == before


@pytest.mark.filterwarnings("error")
def test_low_precision_is_warned_of(questions: Path, tmp_path: Path) -> None:
    model, processor = load()
    with pytest.raises(UserWarning, match=r"^blocks are torch.bfloat16: AdamW loses steps"):
        vr.train(model.to(torch.bfloat16), processor, questions, "dpvr", output=tmp_path, **HOW)


def test_nothing_on_stdout(digits: Any, questions: Path, tmp_path: Path, capsys: Any) -> None:
    vr.train(*digits, questions, "dpvr", output=tmp_path, **HOW)
    assert capsys.readouterr().out == ""


def test_refused_before_weights_are_loaded(
    questions: Path, run: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmrewrite.cli.loading.with_weights", lambda *a: pytest.fail("loaded"))
    for option, value, said in (
        ("--steps", 0, "steps=0"),
        ("--lr", -1, "lr=-1.0"),
        ("--output", run.folder, "holds a run already"),
    ):
        given = {"--recipe": "dpvr", "--data": questions, "--output": tmp_path / "new"} | {option: value}
        done = CliRunner().invoke(app, ["train", str(CHECKPOINT), *(str(x) for pair in given.items() for x in pair)])
        assert done.exit_code == 2 and said in done.stderr


def test_parts_are_means_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, {"answers": 3.0, "terms": 4.0}])
    assert of_trainer._mean({"answers": 1.0}) == {"answers": 2.0, "terms": 2.0}


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of("auto") == device_of("cuda") == torch.device("cuda", 3)
    monkeypatch.delenv("LOCAL_RANK")
    assert device_of("auto") == torch.device("cuda") and device_of("cpu").type == "cpu"


def test_a_model_that_ends_no_text(digits: Any, questions: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(digits[0].generation_config, "eos_token_id", None)
    with pytest.raises(ValueError, match=r"names the token that ends a text \(eos_token_id\), got none"):
        vr.train(*digits, questions, "dpvr", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
