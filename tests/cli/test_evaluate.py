"""`vr.evaluate` on samples that fail, on chats, without references, and with metrics of the user's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlmrewrite as vr
from examples.digits.model import load
from examples.digits.scenes import held_out_questions
from vlmrewrite.evaluate import METRICS, Sample, alone
from vlmrewrite.hf import base_model_of
from vlmrewrite.passes import Stride
from vlmrewrite.recipe import shipped_recipes
from vlmrewrite.runtime import SESSIONS

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"batch": 4, "max_new_tokens": 4}

pytestmark = pytest.mark.filterwarnings("ignore:.* samples. intervals are wide")


def test_samples_that_fail_do_not_stop_the_run(digits: Any, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = asked[:5]
    held_out_questions(1)[0].image.save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    rows[1]["image"] = str(tmp_path / "cut.jpg")
    rows[3]["prompt"] = "<image> <image> how many digits ?"
    done = vr.evaluate(*digits, rows, "stride-half", **OPTIONS)
    assert [row.n for row in done.rows] == [3, 3]
    assert {(f["id"], f["error"].partition(":")[0]) for f in done.failures} == {("q1", "OSError"), ("q3", "ValueError")}
    assert done.notes[1] == "2 of 5 samples failed, and are in no row"
    assert [s["score"] is None for s in done.samples] == [
        False,
        False,
        True,
        True,
        False,
        False,
        True,
        True,
        False,
        False,
    ]


def test_a_recipe_whose_answers_depend_on_those_before_is_refused(
    digits: Any, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    [policy] = shipped_recipes()["visor-policy"].passes
    with pytest.raises(ValueError, match=r"start: running.*expected a start by number"):
        vr.evaluate(*digits, asked[:2], [replace(policy, start="running")], output=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_fails_for_one_sample(
    digits: Any, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = digits
    rows, generate = asked[:4], type(model).generate
    bad = processor.tokenizer(rows[2]["prompt"])["input_ids"][-1]

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if base_model_of(self) in SESSIONS and bool((kwargs["input_ids"][:, -1] == bad).any()):
            raise RuntimeError("no room")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", failing)
    done = vr.evaluate(model, processor, rows, "stride-half", **OPTIONS)
    gone = {row["id"] for row in rows if processor.tokenizer(row["prompt"])["input_ids"][-1] == bad}
    assert {(f["id"], f["recipe"], f["error"]) for f in done.failures} == {
        (i, "stride-half", "RuntimeError: no room") for i in gone
    }
    assert [row.n for row in done.rows] == [4 - len(gone)] * 2


def test_without_references_it_is_agreement(digits: Any, asked: list[dict[str, Any]]) -> None:
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in asked[:4]]
    few = vr.Recipe(name="few", passes=(Stride(keep=9),))
    every = vr.Recipe(name="every", passes=(Stride(keep=1.0),))
    done = vr.evaluate(*digits, rows, [every, few], **OPTIONS)
    assert done.about["metric"] == "agreement"
    plain, same, eighth = done.rows
    assert (plain.accuracy, same.accuracy, same.changed) == (1, 1, 0)
    assert same.agreement["kl"] < 1e-6 < eighth.agreement["kl"]
    assert eighth.accuracy == pytest.approx(eighth.agreement["tokens"]) and eighth.accuracy < 1
    assert eighth.agreement["rouge_l"] < 1 and "ROUGE-L" in str(done)
    with pytest.raises(ValueError, match="metric 'exact' needs references, and the data has none"):
        vr.evaluate(*digits, rows, [every], metric="exact", **OPTIONS)


@pytest.mark.slow
def test_a_metric_of_the_users(digits: Any, asked: list[dict[str, Any]]) -> None:
    def first_letter(output: str, sample: Sample) -> float:
        return 0.5 * (output[:1] == sample.answers[0][:1])

    done = vr.evaluate(*digits, asked[:4], "stride-half", metric=first_letter, **OPTIONS)
    assert done.rows[0].accuracy == 0.5 and done.about["metric"].endswith("first_letter")
    with pytest.raises(RuntimeError, match="'q0' under unmodified: the metric: ValueError: expected a score from 0"):
        vr.evaluate(*digits, asked[:4], "stride-half", metric=lambda output, sample: 7, **OPTIONS)

    def picky(output: str, sample: Sample) -> float:
        return {"q1": 1 / 0 if sample.id == "q1" else 1}.get(str(sample.id), np.float32(1))

    done = vr.evaluate(*digits, asked[:4], [Stride(keep=0.5)][0], metric=picky, **OPTIONS)
    assert [row.n for row in done.rows] == [3, 3] and done.rows[1].accuracy == 1
    assert {f["id"]: f["error"] for f in done.failures} == {"q1": "the metric: ZeroDivisionError: division by zero"}


@pytest.mark.slow
def test_a_metric_that_always_fails_stops_the_run(digits: Any, asked: list[dict[str, Any]]) -> None:
    told = set[Any]()

    def never(output: str, sample: Sample) -> float:
        told.add(sample.id)
        raise KeyError(sample.id)

    with pytest.raises(RuntimeError, match=r"^unmodified: all of the first 8 samples failed: the metric: KeyError: 'q"):
        vr.evaluate(*digits, asked, "stride-half", metric=never, **OPTIONS)
    assert len(told) == 8 < len(asked)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"batch": "4"}, ValueError, "batch: expected an integer of at least 1, got '4' (str)"),
        ({"batch": 0}, ValueError, "batch: expected an integer of at least 1, got 0"),
        ({"max_new_tokens": None}, ValueError, "max_new_tokens: expected an integer of at least 1, got None"),
        ({"seed": "a"}, ValueError, "seed: expected an integer of at least 0, got 'a' (str)"),
        ({"recipes": None}, TypeError, "expected a recipe or a list of recipes, got None"),
        ({"recipes": []}, ValueError, "expected recipes with names of their own, got none"),
        ({"model": None}, TypeError, "expected a Hugging Face model, got None"),
        ({"processor": None}, TypeError, "expected a processor of texts and images, got None"),
    ],
    ids=str,
)
def test_arguments_that_are_none(
    digits: Any, asked: list[dict[str, Any]], change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    given = {"model": digits[0], "processor": digits[1], "data": asked[:2], "recipes": "stride-half"}
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        vr.evaluate(**{**given, **OPTIONS, **change})
    with pytest.raises(TypeError, match="^expected a processor of texts and images, got "):
        vr.evaluate(digits[0], digits[1].tokenizer, asked[:2], "stride-half")


def test_two_runs_do_not_share_a_folder(digits: Any, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with (
        alone(folder),
        pytest.raises(ValueError, match="^.*out: another run is writing to it; expected a folder of its"),
    ):
        vr.evaluate(*digits, asked[:2], "stride-half", output=folder, **OPTIONS)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    vr.evaluate(*digits, asked[:2], "stride-half", output=folder, **OPTIONS | {"batch": np.int64(2)})
    assert (folder / "results.json").is_file()


def test_another_metric_of_the_same_name_is_another_run(
    digits: Any, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    one, other = (lambda output, sample: 1.0), (lambda output, sample: 0.0)
    vr.evaluate(*digits, asked[:4], "stride-half", metric=one, output=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="holds a run that differs in metric_code"):
        vr.evaluate(*digits, asked[:4], "stride-half", metric=other, output=tmp_path, **OPTIONS)


def test_logits_that_are_not_numbers_are_a_failure(digits: Any, asked: list[dict[str, Any]]) -> None:
    model, processor = load()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the logits of the first token are not numbers"):
        vr.evaluate(model, processor, asked[:4], "stride-half", **OPTIONS)


def test_chats_go_through_the_template(digits: Any, asked: list[dict[str, Any]]) -> None:
    model, processor = load()
    rows = [
        {
            "id": r["id"],
            "image": r["image"],
            "messages": [{"role": "user", "content": r["prompt"]}],
            "answer": r["answer"],
        }
        for r in asked[:4]
    ]
    with pytest.raises(
        ValueError, match="LlavaProcessor has no chat template: expected 'prompt' in place of 'messages'"
    ):
        vr.evaluate(model, processor, rows, "stride-half", **OPTIONS)
    processor.chat_template = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<image> {% else %}{{ p.text }}"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    told = vr.evaluate(model, processor, rows, "stride-half", **OPTIONS).samples
    plain = vr.evaluate(model, processor, asked[:4], "stride-half", **OPTIONS).samples
    assert [s["output"] for s in told] == [s["output"] for s in plain]


def test_the_page_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluate.md").read_text()
    made, run = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(compile(made.replace("held_out_questions(60)", "held_out_questions(4)"), "evaluate.md", "exec"), {})
    exec(compile(run, "evaluate.md", "exec"), {"__name__": __name__})
    assert "quarter" in capsys.readouterr().out
    scores = re.findall(
        r"^\| `(\w+)`(?:, `(\w+)`)? \|", page.partition("## Scores")[2].partition("##")[0], re.MULTILINE
    )
    assert {name for pair in scores for name in pair if name} == {"auto", *METRICS}


@pytest.mark.slow
def test_a_folder_of_trained_blocks_is_a_recipe(digits: Any, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    model, _ = digits
    with vr.applied(model, "dpvr"):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.mul_(-1)
        vr.save_blocks(model, tmp_path / "upside-down")
    out = tmp_path / "out"
    done = vr.evaluate(*digits, asked[:4], ["dpvr", tmp_path / "upside-down"], output=out, **OPTIONS)
    assert [row.recipe for row in done.rows] == ["unmodified", "dpvr", "upside-down"]
    untrained, turned = done.rows[1:]
    assert untrained.flops == turned.flops and untrained.agreement["kl"] < turned.agreement["kl"]
    again = vr.evaluate(*digits, asked[:4], ["dpvr", tmp_path / "upside-down"], output=out, **OPTIONS)
    assert again.rows == done.rows


def test_what_cannot_be_run_at_all(digits: Any, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    model, processor = load()
    with pytest.raises(ValueError, match="expected a LlavaForConditionalGeneration in eval mode, got one in training"):
        vr.evaluate(model.train(), processor, asked, "stride-half", output=tmp_path / "o", **OPTIONS)
    with pytest.raises(ValueError, match="expected recipes with names of their own, got none"):
        vr.evaluate(*digits, asked, [], output=tmp_path / "o", **OPTIONS)
    with vr.applied(digits[0], "stride-half"), pytest.raises(ValueError, match="is applied to this .* already"):
        vr.evaluate(*digits, asked, "stride-half", output=tmp_path / "o", **OPTIONS)
    assert not (tmp_path / "o").exists()
    wrong = [row | {"prompt": f"<image> <image> {row['prompt']}"} for row in asked]
    with pytest.raises(RuntimeError, match=": all of the first 8 samples failed: ValueError: prompt: expected 1 times"):
        vr.evaluate(*digits, wrong, "stride-half", output=tmp_path / "o", **OPTIONS)
    assert not (tmp_path / "o" / "results.json").exists()
    with pytest.raises(RuntimeError, match="no sample was answered under all recipes; 'q0' under unmodified: ValueErr"):
        vr.evaluate(*digits, wrong[:2], "stride-half", **OPTIONS)
