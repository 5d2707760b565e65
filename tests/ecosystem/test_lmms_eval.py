"""lmms-eval asks the bundled model under a recipe, offline, and finds what `vr.evaluate` finds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT, load
from examples.digits.scenes import held_out_questions
from vlmrewrite.passes import Stride

ROOT = Path(__file__).parents[2]
NEEDED = "lmms_eval"
QUESTIONS = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(NEEDED) is None,
        reason="lmms-eval is not installed: `make ecosystem` installs it, without what it asks for",
    ),
]

READING = """
from PIL import Image


def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""

TASK = """
task: digits_asked
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function reading.pictures
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""

CHOSEN = """
task: digits_chosen
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function reading.pictures
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks: questions with free answers, and those among more that are answered by yes or no."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for i, asked in enumerate(held_out_questions(5 * QUESTIONS)):
        row = {"id": i, "image": str(folder / f"{i}.png"), "prompt": asked.question, "answer": asked.answer}
        if i < QUESTIONS or asked.answer in ("yes", "no"):
            asked.image.save(row["image"])
            rows.append(row)
    closed = [row for row in rows if row["answer"] in ("yes", "no")]
    for name, text, some in (("asked", TASK, rows[:QUESTIONS]), ("chosen", CHOSEN, closed)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in some))
        (folder / f"digits_{name}.yaml").write_text(text.format(data=data))
    (folder / "reading.py").write_text(READING)
    return folder


def run(tasks: Path, out: Path, args: str, *more: str, task: str = "digits_asked", launcher: tuple[str, ...] = ()):
    """The score of a run, and what the model said to each question."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "home")}
    command = [*launcher, "-m", "lmms_eval", "--tasks", task, "--include_path", str(tasks), "--model_args", args]
    done = subprocess.run(
        [sys.executable, *command, "--output_path", str(out), "--log_samples", *more],
        env=os.environ | offline | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        cwd=tasks,
    )
    assert "Error during evaluation" not in done.stdout, done.stdout[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = out.rglob("*_results.json")
    [samples] = out.rglob(f"*_samples_{task}.jsonl")
    scores = {k.split(",")[0]: v for k, v in json.loads(found.read_text())["results"][task].items()}
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return scores, [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]


@pytest.fixture(scope="module")
def expected(tasks: Path):
    """Accuracy and answers of each subject, as `vr.evaluate` has them."""
    with pytest.warns(UserWarning, match=f"{QUESTIONS} samples: intervals are wide"):
        done = vr.evaluate(*load(), str(tasks / "asked.jsonl"), "stride-half", max_new_tokens=4, backend="eager")
    outputs = {row.recipe: [s["output"] for s in done.samples if s["recipe"] == row.recipe] for row in done.rows}
    return {row.recipe: (row.accuracy, outputs[row.recipe]) for row in done.rows}


def test_the_entry_point_is_installed():
    assert [e.value for e in entry_points(group="lmms_eval.models", name="vlmrewrite")] == [
        "vlmrewrite.harness:manifest"
    ]


@pytest.mark.parametrize("how", ["chats", "prompts"])
def test_accuracy_is_that_of_evaluate(how, tasks, expected, tmp_path):
    more = ["--force_simple"] if how == "prompts" else []
    args = f"pretrained={CHECKPOINT},recipe=stride-half"
    scores, said = run(tasks, tmp_path, args, "--model", "vlmrewrite", "--batch_size", "5", *more)
    score, outputs = expected["stride-half"]
    assert said == outputs
    assert scores["exact_match"] == pytest.approx(score)
    assert outputs != expected["unmodified"][1]


def test_without_a_recipe_the_model_is_as_it_is(tasks, expected, tmp_path):
    scores, said = run(tasks, tmp_path, f"pretrained={CHECKPOINT}", "--model", "vlmrewrite", "--batch_size", "8")
    assert (scores["exact_match"], said) == (pytest.approx(expected["unmodified"][0]), expected["unmodified"][1])


def test_two_processes_find_what_one_finds(tasks, expected, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    args = f"pretrained={CHECKPOINT},recipe=stride-half"
    scores, said = run(tasks, tmp_path, args, "--model", "vlmrewrite", "--batch_size", "5", launcher=launcher)
    score, outputs = expected["stride-half"]
    assert (scores["exact_match"], said) == (pytest.approx(score), outputs)


def test_continuations_are_compared(tasks, tmp_path):
    """Of "yes" and "no" the likelier one: what the model says by itself, where it says one of them."""
    args = f"pretrained={CHECKPOINT},recipe=stride-half"
    more = ["--model", "vlmrewrite", "--batch_size", "4", "--force_simple"]
    scores, said = run(tasks, tmp_path, args, *more, task="digits_chosen")
    with pytest.warns(UserWarning, match="intervals are wide"):
        done = vr.evaluate(*load(), str(tasks / "chosen.jsonl"), "stride-half", max_new_tokens=4, backend="eager")
    outputs = [s["output"] for s in done.samples if s["recipe"] == "stride-half"]
    assert {*outputs} == {"yes", "no"}
    assert scores["acc"] == pytest.approx(done.rows[1].accuracy)
    assert len(said) == len(outputs) > 10


def test_a_class_of_lmms_eval_under_a_recipe(tasks, tmp_path):
    """Keeping all says what that class says without us; half of them says something else."""
    vr.Recipe(name="all", passes=(Stride(keep=1_000_000),)).to_yaml(tasks / "all.yaml")
    own = f"pretrained={CHECKPOINT},device_map=cpu,device=cpu,dtype=float32"
    _, plain = run(tasks, tmp_path / "own", own, "--model", "llava_hf", "--force_simple")
    said = {}
    for recipe in (str(tasks / "all.yaml"), "stride-half"):
        args = f"base=llava_hf,recipe={recipe},{own}"
        said[recipe] = run(tasks, tmp_path / Path(recipe).stem, args, "--model", "vlmrewrite", "--force_simple")[1]
    every, half = said.values()
    assert every == plain
    assert half != plain
