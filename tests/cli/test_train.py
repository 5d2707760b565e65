"""`vlmrewrite train` and `vr.train` on the bundled model: folders, runs that were cut off, bad input."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT
from vlmrewrite.cli import app
from vlmrewrite.evaluate import end_tokens, read_data
from vlmrewrite.passes import DAPE, DPVR, VISOR
from vlmrewrite.plan import Edit, Weights, frozen_pass
from vlmrewrite.saving import BLOCKS
from vlmrewrite.training import Training, answered

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")
pytestmark = pytest.mark.filterwarnings("ignore:.* samples. intervals are wide")

CHAIN = [{"cross_layers": 0.25}, {"self_layers": 1.0}]
HOW: dict[str, Any] = {"steps": 4, "batch": 4, "lr": 0.01, "log_every": 1, "save_every": 2, "progress": False}


def blocks(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / BLOCKS)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def run(digits: Any, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Four steps of the shipped recipe with a branch, with distillation."""
    return vr.train(*digits, questions, "dpvr", output=tmp_path_factory.mktemp("run") / "out", distil=0.5, **HOW)


@pytest.mark.slow
def test_the_folder(digits: Any, questions: Path, run: Training) -> None:
    model, processor = digits
    files = {"vlmrewrite.json", BLOCKS, "README.md", "training.json", "checkpoints", "logs"}
    assert {p.name for p in run.folder.iterdir()} == files
    assert {p.name for p in (run.folder / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert not list(run.folder.rglob("model.safetensors")), "checkpoints hold the blocks alone"
    assert list((run.folder / "logs").glob("events.out.tfevents.*"))
    told = json.loads((run.folder / "training.json").read_text())
    assert told["log"] == list(run.log) and told["steps"] == run.steps == 4
    assert told["run"]["losses"] == ["answers", "distillation"]
    for line in run.log:
        assert line["loss"] == pytest.approx(line["answers"] + 0.5 * line["distillation"], abs=2e-4)
    assert [line["step"] for line in run.log] == [1, 2, 3, 4]
    card = (run.folder / "README.md").read_text()
    assert 'vr.apply(model, "out")' in card and "12 samples, sha256" in card and "| steps | 4, 4 samples each" in card
    done = vr.evaluate(model, processor, questions, run.folder, batch=12, max_new_tokens=2, backend="eager")
    assert [row.recipe for row in done.rows] == ["unmodified", "out"]


def test_the_blocks_were_trained_and_the_model_is_as_it_was(digits: Any, run: Training) -> None:
    model, _ = digits
    assert not model.training and all(p.requires_grad for p in model.parameters())
    with vr.applied(model, run.folder):
        trained = {n: p.detach().clone() for n, p in vr.trainable_blocks(model).named_parameters()}
    assert same(trained, blocks(run.folder))
    assert sum(p.numel() for p in trained.values()) == run.parameters
    with vr.applied(model, "dpvr"):
        fresh = dict(vr.trainable_blocks(model).named_parameters())
        assert not any(torch.equal(trained[n], p) for n, p in fresh.items())


def test_a_run_that_was_cut_off_goes_on_to_the_same_numbers(
    digits: Any, questions: Path, run: Training, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    (folder / BLOCKS).unlink()
    (folder / "vlmrewrite.json").unlink()
    again = vr.train(*digits, questions, "dpvr", output=folder, distil=0.5, resume=True, **HOW)
    assert same(blocks(folder), blocks(run.folder))
    assert [line["loss"] for line in again.log] == [line["loss"] for line in run.log]


def test_a_seed_gives_the_same_blocks(digits: Any, questions: Path, tmp_path: Path) -> None:
    passes, how = [DPVR(at=4, branch="random")], HOW | {"steps": 1, "batch": 2}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        vr.train(*digits, questions, passes, output=tmp_path / name, seed=seed, **how)
    a, b, c = (blocks(tmp_path / name) for name in "abc")
    assert (same(a, b), same(a, c)) == (True, False)


@pytest.mark.parametrize(
    ("passes", "parts"),
    [
        ([DAPE(budget=0.5, matching="learned")], ["answers", "terms"]),
        ([VISOR(policy="router", chain=CHAIN), DPVR(at=4)], ["answers", "choice"]),
    ],
    ids=["dape", "router and dpvr"],
)
def test_blocks_with_losses_of_their_own(
    digits: Any, questions: Path, tmp_path: Path, passes: list[Any], parts: list[str]
) -> None:
    how = HOW | {
        "steps": 1,
        "seed": 1,
        "checkpointing": "choice" in parts,
    }  # this seed draws the plan with vision tokens
    done = vr.train(*digits, questions, passes, output=tmp_path, **how)
    assert json.loads((tmp_path / "training.json").read_text())["run"]["losses"] == parts
    names = {"answers", "alignment", "counts"} if "terms" in parts else {"answers", "choice"}
    for line in done.log:
        assert sum(line[name] for name in names) == pytest.approx(line["loss"], abs=5e-4)
    with vr.applied(digits[0], passes), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = {n: p.detach().clone() for n, p in vr.trainable_blocks(digits[0]).named_parameters()}
    after = blocks(tmp_path)
    assert before.keys() == after.keys()
    if "choice" in parts:
        assert {n.partition(".")[0] for n in after if not torch.equal(before[n], after[n])} == {"visor_router", "dpvr"}


class Shift(nn.Module):
    """What is added to hidden states."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(hidden))


def shifted(hidden: Tensor, index: Tensor, valid: Tensor, by: Tensor) -> Tensor:
    return hidden + by


@frozen_pass
class Shifted:
    """A pass of somebody else, with a block and a term of its own."""

    name: ClassVar[str] = "shifted"
    trained_by: ClassVar[tuple[str, ...]] = ("terms",)
    at: int = 2

    def refuse(self, plan: vr.Plan) -> str | None:
        return plan.exhausted(self.at)

    def change(self, plan: vr.Plan) -> None:
        block = plan.block(Weights(Shift))
        plan.edit(Edit("shift", plan.vision(self.at), shifted, self.at, weights=(f"{block}.by",)))

    def terms(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return {"size": vr.trainable_blocks(model)["shifted"].by.square().sum()}


def test_operators_in_bfloat16(digits: Any, questions: Path, run: Training, tmp_path: Path) -> None:
    done = vr.train(*digits, questions, "dpvr", output=tmp_path, bf16=True, distil=0.5, **HOW | {"steps": 1})
    trained = blocks(tmp_path)
    assert {t.dtype for t in trained.values()} == {torch.float32}
    assert done.log[0]["loss"] != run.log[0]["loss"]
    assert done.log[0]["loss"] == pytest.approx(run.log[0]["loss"], abs=0.05)
    assert "| precision | bf16 autocast |" in (tmp_path / "README.md").read_text()


def test_what_is_learnt_stands_behind_the_prompt_that_is_asked(digits: Any, questions: Path) -> None:
    model, processor = digits
    samples = read_data(questions)[:2]
    given = answered(processor, samples, end_tokens(model))
    asked = processor(
        images=[s.pictures() for s in samples], text=[f"<image> {s.prompt}" for s in samples], return_tensors="pt"
    )
    n = asked["input_ids"].shape[1]
    assert torch.equal(given["input_ids"][:, :n], asked["input_ids"])
    assert torch.equal(given["pixel_values"], asked["pixel_values"])
    for row, s in enumerate(samples):
        answer = processor.tokenizer.convert_tokens_to_ids([s.answers[0], "<eos>"])
        assert given["labels"][row].tolist() == [-100] * n + answer
        assert given["input_ids"][row, n:].tolist() == answer
    assert given["attention_mask"].all()


def test_an_image_that_is_cut_off_is_named(digits: Any, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    samples = read_data(asked[:2])
    samples[1].pictures()[0].save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    rows = read_data([asked[0], asked[1] | {"image": str(tmp_path / "cut.jpg")}])
    with pytest.raises(OSError, match=r"^sample 'q1': expected whole images: .*truncated.*: take it out of the data$"):
        answered(digits[1], rows, end_tokens(digits[0]))


@pytest.fixture
def recipe_of_others(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Its pass, as if its package were installed."""
    monkeypatch.setattr("vlmrewrite.registry.find_pass", lambda name: Shifted)
    monkeypatch.setattr("vlmrewrite.recipe.find_pass", lambda name: Shifted, raising=False)
    return [Shifted()]


def test_a_pass_of_others(digits: Any, questions: Path, tmp_path: Path, recipe_of_others: list[Any]) -> None:
    done = vr.train(*digits, questions, recipe_of_others, output=tmp_path, **HOW | {"steps": 2})
    assert [name in done.log[1] for name in ("answers", "size")] == [True, True]
    assert blocks(tmp_path)["shifted.by"].any()
    Shifted.trained_by = ("magic",)
    try:
        with pytest.raises(ValueError, match="trained_by says 'magic', expected one of terms, plans, choice"):
            vr.train(*digits, questions, recipe_of_others, output=tmp_path / "new", **HOW)
    finally:
        Shifted.trained_by = ("terms",)
    assert not (tmp_path / "new").exists()


def test_the_command(questions: Path, tmp_path: Path) -> None:
    given = {"--recipe": "dpvr", "--data": questions, "--output": tmp_path / "out", "--steps": 1, "--limit": 4}
    command = ["train", str(CHECKPOINT), *(str(part) for pair in given.items() for part in pair)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-2].startswith("213,248 parameters, 1 steps: loss ")
    assert done.stdout.splitlines()[-1] == f"blocks: {tmp_path / 'out'}"
    assert blocks(tmp_path / "out")


def refused(*arguments: object) -> list[str]:
    """The lines on stderr, without their ``error:``."""
    done = CliRunner().invoke(app, ["train", str(CHECKPOINT), *map(str, arguments)], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (2, "")
    return [x.removeprefix("error: ") for x in done.stderr.splitlines() if x.startswith("error: ")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--recipe": "stride-half"}, "recipe 'stride-half' has no blocks: none of Stride(keep=0.5"),
        ({"--recipe": "dpvrr"}, "did you mean 'dpvr'?"),
        ({"--data": "bare.jsonl"}, "expected an 'answer' in each row to learn, got none in 2 rows"),
        ({"--data": "mixed.jsonl"}, "mixed.jsonl line 2: expected an 'answer', as other rows have, got none"),
        ({"--data": "broken.jsonl"}, "broken.jsonl line 1: image: expected an image file, got"),
        ({"--data": "none.jsonl"}, "which is not a file"),
        (
            {"--output": "full"},
            "full: expected an empty folder, or one of a run with training.json, got one with x.txt",
        ),
        ({"--output": "bare.jsonl"}, "bare.jsonl: expected a folder, or nothing, got a file"),
        ({"--steps": 0}, "expected integers of at least 1, got steps=0"),
        ({"--lr": "nan"}, "expected numbers lr > 0 and distil >= 0, got lr=nan and distil=0.0"),
        ({"--limit": 0}, "--limit: expected at least 1, got 0"),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_bad_input(questions: Path, tmp_path: Path, monkeypatch: Any, change: dict[str, Any], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in questions.read_text().splitlines()[:2]]
    rows = [row | {"image": str(questions.parent / row["image"])} for row in rows]
    bare = [{k: v for k, v in row.items() if k != "answer"} for row in rows]
    (tmp_path / "text.png").write_text("no image")
    broken = [rows[0] | {"image": "text.png"}]
    for name, some in (("bare", bare), ("mixed", [rows[0], bare[1]]), ("broken", broken)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    given = {"--recipe": "dpvr", "--data": questions, "--output": "out", "--steps": 1} | change
    lines = refused(*(part for pair in given.items() for part in pair))
    assert len(lines) == 1 and message in lines[0], lines
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_another_run(digits: Any, questions: Path, run: Training) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    with pytest.raises(ValueError, match="holds a run already: .* or go on with it by --resume"):
        vr.train(*digits, questions, "dpvr", output=run.folder, **HOW)
    with pytest.raises(ValueError, match="holds a run that differs in lr: .*lr: 0.01, now 0.02"):
        vr.train(*digits, questions, "dpvr", output=run.folder, resume=True, distil=0.5, **HOW | {"lr": 0.02})
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")} == before


def test_others_that_learn_are_refused(digits: Any, questions: Path, tmp_path: Path) -> None:
    model, _ = digits
    weight = model.get_input_embeddings().weight
    first = next(model.model.language_model.layers[0].parameters())
    first.requires_grad_(False)  # somebody has chosen
    try:
        with pytest.warns(UserWarning, match="ask for a gradient too"), pytest.raises(ValueError, match="blocks alone"):
            vr.train(*digits, questions, "dpvr", output=tmp_path / "new", **HOW)
    finally:
        first.requires_grad_(True)
    assert weight.requires_grad and not (tmp_path / "new").exists()


def test_without_accelerate(digits: Any, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = vr.training.run.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "accelerate" else find(name, *a))
    with pytest.raises(ImportError, match=r"^training needs accelerate: pip install 'vlmrewrite\[train\]'$"):
        vr.train(*digits, questions, "dpvr", output=tmp_path, **HOW)
