"""The second task and the study: pages, fonts, recipes of equal cost, parts that are kept, tables, claims."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import vlmrewrite as vr
from examples.digits.documents import fonts, train
from examples.digits.documents.attention import SHORT, by_picture
from examples.digits.documents.model import build_model
from examples.digits.documents.pages import GRID, LABELS, PageSampler, held_out_questions, slot
from examples.digits.documents.questions import KINDS, PAD, UNK, VOCABULARY, WORDS, Question, Token, ask, prose
from examples.digits.model import CHECKPOINT
from examples.digits.study import claims, command
from examples.digits.study.configurations import at_depth
from examples.digits.study.configurations import methods as configurations
from examples.digits.study.tables import by_kind, overall
from examples.digits.study.tasks import any_size, encoded_once, task_of

pytestmark = pytest.mark.filterwarnings("ignore:.* samples. intervals are wide")
FACES = fonts.IN_MATPLOTLIB


def test_a_font_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_files", dict)
    with pytest.raises(FileNotFoundError, match=r"^font FreeSans\.ttf is neither .*apt-get install fonts-freefont-ttf"):
        fonts.face("FreeSans.ttf")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model of the documents: python -m examples"):
        task_of("documents", FACES, tmp_path)
    with pytest.raises(ValueError, match="expected the task 'digits' or 'documents', got 'pages'"):
        task_of("pages")


def test_held_out_prose_is_other_prose() -> None:
    learnt, kept = prose(False), prose(True)
    assert len(learnt) > len(kept) > 10_000
    runs = [{tuple(text for text, _ in words[i : i + 12]) for i in range(len(words) - 12)} for words in (learnt, kept)]
    assert len(runs[0] & runs[1]) < 0.02 * len(runs[1])


def test_pages_are_a_function_of_the_seed() -> None:
    one, other = held_out_questions(3, 1, 1, FACES), held_out_questions(3, 1, 1, FACES)
    assert [r[1:] for r in one] == [r[1:] for r in other]
    assert all(np.array_equal(np.asarray(a.image), np.asarray(b.image)) for a, b in zip(one, other, strict=True))
    assert [r[1:] for r in held_out_questions(3, 2, 1, FACES)] != [r[1:] for r in one]


def test_questions_have_the_answers_of_the_page() -> None:
    words = ["the", "class", "the", "value"]
    tokens = [
        Token(word, WORDS.index(word), -1, i // 2, 100.0 * (i % 2), 100.0 * (i % 2) + 80, i == 3)
        for i, word in enumerate(words)
    ] + [Token("42", -1, 42, 1, 250.0, 290.0, False)]
    asked = {(q.text, q.answer) for q in ask(tokens, 300.0, 600, np.random.default_rng(0))}
    assert {
        ("How Many Lines ?", "2"),
        ("Times Of Word the", "2"),
        ("Line Of Word value", "2"),
        ("Side Of Word value", "Centre"),
        ("Word After Word class", "x"),
        ("Word Before Word class", "the"),
        ("First Word Line 2", "the"),
        ("Last Word Line 1", "class"),
        ("Number In Line 2", "4 2"),
        ("Word In Red ?", "value"),
    } - asked == {("Word After Word class", "x")}
    assert not [q for q, _ in asked if q in ("Last Word Line 2", "Number In Line 1", "Line Of Word the")]


def test_what_is_under_a_patch() -> None:
    sampler = PageSampler(True, 5, FACES)
    for _ in range(5):
        _, tokens, size, tops = sampler.draw()
        labels = dict(zip(LABELS, sampler.labels(tokens, size, tops, GRID), strict=True))
        for token in (t for t in tokens if t.word >= 0):
            assert (labels["word"] == 2 + token.word).any(), token
        assert set(labels["line"]) == {0, *(t.line + 1 for t in tokens)}
        assert (labels["red"] == 2).any()
        assert all(labels[name].max() < n for name, n in LABELS.items())
    batch = sampler.batch(2, 8, 12)
    assert batch.pixels.shape == (2, 3, 168, 168) and batch.labels.shape == (2, len(LABELS), 144)
    assert not ((batch.slots == PAD) | (batch.slots == UNK)).any()


def test_every_answer_is_in_the_vocabulary() -> None:
    for record in held_out_questions(200, 3, 8, FACES):
        assert record.kind in KINDS and len(record.question.split()) == 4
        assert all(word in VOCABULARY for word in (*record.question.split(), *record.answer.split()))
        assert len(slot(Question(record.kind, record.question, record.answer))) == 7


def test_a_tower_takes_smaller_pages_and_its_own_size_as_before() -> None:
    torch.manual_seed(0)
    model: Any = build_model().eval()
    pixels = torch.randn(1, 3, 336, 336)
    with torch.no_grad(), encoded_once(model):
        before = model.model.get_image_features(pixels).pooler_output[0]
        again = model.model.get_image_features(pixels.clone()).pooler_output[0]
    any_size(model.model.vision_tower)
    with torch.no_grad():
        smaller = [model.model.get_image_features(pixels[..., :n, :n]).pooler_output[0] for n in (238, 168, 112)]
        after = model.model.get_image_features(pixels).pooler_output[0]
    assert [tuple(x.shape) for x in smaller] == [(289, 128), (144, 128), (64, 128)]
    assert torch.equal(before, again) and torch.equal(before, after) and before.shape == (576, 128)


def test_attention_of_training_is_attention() -> None:
    torch.manual_seed(0)
    for tokens in (30, SHORT + 10):
        q, k, v = (torch.randn(2, 4, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None].expand(2, -1, -1, -1)
        for seen in (None, mask):
            made = by_picture(None, q, k, v, seen)[0].transpose(1, 2)
            right = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            torch.testing.assert_close(made, right, rtol=1e-12, atol=1e-12)
            out = torch.randn_like(made)
            for a, b in zip(*(torch.autograd.grad(x, (q, k, v), out) for x in (made, right)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_training_runs(tmp_path: Path) -> None:
    given = ["--smoke", "--questions", "2", "--threads", "1", "--fonts", "matplotlib"]
    train.main([*given, "--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch")])
    log = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log if "stage" in line} == {"L", "A", "B", "C"}
    assert log[-1]["questions"] == 2 and (tmp_path / "out" / "model.safetensors").stat().st_size < 12e6


@pytest.mark.slow
def test_the_study(tmp_path: Path) -> None:
    given = ["--task", "digits", "-n", "6", "--share", "1/4", "--batch", "6", "--output", str(tmp_path)]
    given += ["--only", "stride", "downsample", "sts", "dpvr"]
    command.study(command.arguments(given), Console(quiet=True))
    found = json.loads((tmp_path / "digits.json").read_text())
    assert [row["recipe"] for row in found["rows"]] == ["unmodified", "downsample-1of4", "stride-1of4", "sts-1of4"]
    assert all(0.15 < row["flops"] <= 0.25 for row in found["rows"][1:])
    assert found["n"] == 6 and set(found["rows"][3]["versus"]) == {"stride", "downsample"}
    assert [row["technique"] for row in found["absent"]] == ["dpvr"]
    assert "costs more than 1/4" in (tmp_path / "digits-absent.md").read_text()
    assert (tmp_path / "digits.md").read_text() == overall(found)
    assert (tmp_path / "digits-kinds.md").read_text() == by_kind(found)
    assert "<svg" in (tmp_path / "digits.svg").read_text()
    folder = tmp_path / "digits" / "untrained-0-6"
    before = (folder / "progress.jsonl").read_text()
    command.study(command.arguments(given), Console(quiet=True))
    assert (folder / "progress.jsonl").read_text() == before, "what is done is not done again, and has its seconds"
    assert json.loads((tmp_path / "digits.json").read_text()) == found


def test_configurations_at_another_depth() -> None:
    assert at_depth((1, 4, 7, 22), 24) == (0, 3, 6, 21)
    assert at_depth((1, 4, 7, 10, 16, 19, 22), 8) == (0, 1, 2, 3, 5, 6, 7)
    rows = configurations(24)
    assert len(rows) == 15 and len({row.name for row in rows}) == 15
    assert rows[0].recipe.passes[0].self_layers == (0, 3)
    assert len(rows[0].recipe.passes[0].cross_layers) == 22


def _documents(path: str, config: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    """A few documents with the columns that the data sets of lmms-eval have."""
    image = Image.new("RGB", (96, 96), "gray")
    if path == "lmms-lab/GQA":
        return [{"id": "7", "image": image}] if "images" in str(config) else [
            {"imageId": "7", "question": "Is it gray?", "answer": "yes"}
        ]  # fmt: skip
    if path == "lmms-lab/ScienceQA":
        return [
            {"image": None, "question": "?", "choices": ["a", "b"], "answer": 0, "hint": ""},
            {"image": image, "question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "It barks."},
        ]
    if path == "lmms-lab/POPE":
        return [{"image": image, "question": "Is it gray?", "answer": "yes"} for _ in range(4)]
    return [{"image": image, "question": "what is it", "answers": ["a", "b"]}]


def test_rows_of_the_data_sets() -> None:
    [science] = claims.rows_of("scienceqa", 5, _documents)
    assert science["prompt"].startswith("Context: It barks.\nWhich?\nA. cat\nB. dog\nAnswer with the option's letter")
    assert (science["choices"], science["answer"]) == (["cat", "dog"], "B")
    [gqa] = claims.rows_of("gqa", 5, _documents)
    assert gqa["image"].size == (96, 96) and gqa["answer"] == "yes"
    [text] = claims.rows_of("textvqa", 5, _documents)
    assert text["answers"] == ["a", "b"] and text["prompt"].startswith("What is it\nAnswer the question")
    assert len(claims.rows_of("pope", 3, _documents)) == 3


@pytest.mark.slow
def test_the_claims_as_a_table(tmp_path: Path) -> None:
    args = claims.arguments([str(CHECKPOINT), "--data", "pope", "-n", "2", "--dtype", "float32", "--device", "cpu"])
    args.output = tmp_path
    found = claims.claims(args, _documents)
    assert (tmp_path / "claims.md").read_text() == found
    rows = [line.split(" | ") for line in found.splitlines()[2:]]
    assert len(rows) == 3 + 1 + 13 + 1
    assert rows[0][:2] == ["| `sts-128`: score retained", "99.4 %"]
    assert rows[3][2] == "not measured |"
    done = json.loads((tmp_path / "claims.json").read_text())
    assert done["pope"]["rows"][0]["n"] == 2
    assert vr.__version__ and rows[-1][0].startswith("| prefill by the clock")
