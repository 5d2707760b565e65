"""Metrics of answers, against cases worked out by hand from their definitions."""

from __future__ import annotations

import pytest

from vlmrewrite.evaluate import METRICS, Sample
from vlmrewrite.evaluate.metrics import lacking, levenshtein, rouge_l, token_match, usual


def sample(*answers: str, choices: tuple[str, ...] = ()) -> Sample:
    return Sample(0, "what ?", None, (b"",), answers, choices)


PEOPLE = ("yes",) * 3 + ("no",) * 6 + ("maybe",)
"""Ten people, as the VQA benchmark asks."""


@pytest.mark.parametrize(
    ("metric", "output", "answers", "score"),
    [
        ("exact", " Top-Left ", ("top-left",), 1),
        ("exact", "top left", ("top-left",), 0),
        ("exact", "b", ("a", "b"), 1),
        ("contains", "It is red, I think", ("red",), 1),
        ("contains", "It is bored", ("red",), 0),
        ("contains", "about 3.5 kg", ("3.5 kg",), 1),
        ("vqa", "no", PEOPLE, 1),
        # three say so: left out of the three, 2/3 three times; of the other seven, 1
        ("vqa", "yes", PEOPLE, (3 * 2 / 3 + 7) / 10),
        ("vqa", "maybe", PEOPLE, 9 / 30),
        ("vqa", "perhaps", PEOPLE, 0),
        ("vqa", "The two dogs!", ("2 dogs", "2 dogs", "a cat"), 2 / 3),
        ("vqa", "dont", ("don't",) * 3, 1),
        ("vqa", "1,000.5", ("1000.5",) * 3, 1),
        ("anls", "hello", ("hello",), 1),
        ("anls", "helo", ("Hello",), 1 - 1 / 5),
        ("anls", "hexxo", ("yelxo", "hello"), 1 - 2 / 5),
        ("anls", "ab", ("cb",), 0),  # half of it is wrong: nothing
        ("number", "105", ("100",), 1),
        ("number", "105.1", ("100",), 0),
        ("number", "$1,000", ("1040",), 1),
        ("number", "-5%", ("-5",), 1),
        ("number", "0.01", ("0",), 0),
        ("number", "Ten", ("ten",), 1),
        ("f1", "The cat sat.", ("a cat",), 2 * 1 / 3),
        ("f1", "red red", ("red",), 2 * 1 / 3),
        ("f1", "the", ("a",), 1),
        ("rouge", "a b c d", ("a c d e", "z"), 2 * 3 / 8),
        ("iou", "[0, 0, 2, 2]", ("[1, 0, 3, 2]",), 2 / 6),
        ("iou", "the box is (0.5,0.5),(1.0,1.0)", ("0 0 1 1",), 0.25),
        ("iou", "no idea", ("0 0 1 1",), 0),
        ("iou", "5 5 6 6", ("0 0 1 1",), 0),
        ("iou50", "0 0 2 2", ("0 0 2 3",), 1),
        ("iou50", "0 0 2 2", ("1 0 3 2",), 0),
    ],
)
def test_scores(metric: str, output: str, answers: tuple[str, ...], score: float) -> None:
    assert METRICS[metric](output, sample(*answers)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("a dog", True),
        ("A dog.", True),
        ("B", True),
        ("(b)", True),
        ("B. a dog", True),
        ("The answer is B.", True),
        ("I see a dog there", True),
        ("A", False),
        ("a cat", False),
        ("a cat and a dog", False),  # says both
        ("Bad question", False),
        ("Z", False),
        ("", False),
    ],
)
def test_choices(output: str, right: bool) -> None:
    asked = sample("a dog", choices=("a cat", "a dog", "a bird"))
    assert METRICS["choice"](output, asked) == usual(output, asked) == float(right)


def test_what_a_metric_needs() -> None:
    assert "expected 'choices'" in str(lacking("choice", sample("a")))
    assert "at least 3 'answers' for the metric 'vqa', got 1" in str(lacking("vqa", sample("a")))
    assert "x0 < x1 and y0 < y1, for the metric 'iou', got '2 0 1 1'" in str(lacking("iou", sample("2 0 1 1")))
    assert lacking("iou", sample("[0, 0, 1.5, 1]")) is lacking("exact", sample("a")) is None


def test_distances_of_texts() -> None:
    assert [levenshtein(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("abc", "abc"))] == [3, 3, 0]
    assert levenshtein("saturday", "sunday") == levenshtein("sunday", "saturday") == 3
    assert rouge_l([1, 2, 3, 4, 5], [2, 9, 4, 5]) == pytest.approx(2 * 3 / 9)
    assert (rouge_l([], []), rouge_l([1], []), rouge_l([1, 2], [2, 1])) == (1, 0, 0.5)
    assert (token_match([1, 2, 3], [1, 9, 3]), token_match([1], [1, 2]), token_match([], [])) == (2 / 3, 0.5, 1)
