"""How good an answer is, from 0 to 1: the metrics of the public benchmarks, from their definitions.

A metric is a function of the model's output and the sample. An output is compared with every reference, and the best
counts, unless it is said otherwise.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from vlmrewrite.evaluate.sample import Sample

Metric = Callable[[str, Sample], float]

_NUMBER_WORDS = {"none": "0"} | {
    word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}

_LETTER = re.compile(r"\s*(?:the\s+)?(?:answer\s*(?:is)?\s*:?\s*)?\(?([A-Za-z])(?:[).:,]|\s*$)", re.IGNORECASE)


def exact(output: str, sample: Sample) -> float:
    """1 if the output is a reference, but for case and spaces around and between words."""
    return float(_plain(output) in map(_plain, sample.answers))


def contains(output: str, sample: Sample) -> float:
    """1 if a reference stands in the output as whole words, case left aside."""
    return float(any(_holds(_plain(output), _plain(answer)) for answer in sample.answers))


def choice(output: str, sample: Sample) -> float:
    """1 if the output names the right option: by its text, its letter (``B``, ``(B)``, ``B.``), or in a sentence.

    In a sentence, it must be the only option that stands in it.
    """
    return float(_chosen(output, sample.choices) in [_plain(answer) for answer in sample.answers])


def vqa(output: str, sample: Sample) -> float:
    """VQA accuracy (Antol et al. 2015, arXiv 1505.00468): min(1, people who said so / 3).

    With ten references, the mean over leaving out each of them, as the benchmark's code does. Outputs and references
    are lower-cased, without punctuation, articles and apostrophes, with number words as digits.
    """
    said, people = _vqa_form(output), [_vqa_form(answer) for answer in sample.answers]
    if len(people) != 10:
        return min(1.0, people.count(said) / 3)
    return sum(min(1.0, (people.count(said) - (one == said)) / 3) for one in people) / 10


def anls(output: str, sample: Sample) -> float:
    """Average normalised Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648): below 1/2 it is 0."""

    def one(answer: str) -> float:
        said, meant = _plain(output), _plain(answer)
        away = levenshtein(said, meant) / max(len(said), len(meant), 1)
        return 1 - away if away < 0.5 else 0.0

    return max(map(one, sample.answers))


def number(output: str, sample: Sample) -> float:
    """Relaxed accuracy (Methani et al. 2020, arXiv 1909.00997): numbers may be 5 % away, other text must be equal."""
    said = _number(output)

    def one(answer: str) -> bool:
        meant = _number(answer)
        if said is None or meant is None:
            return _plain(output) == _plain(answer)
        return abs(said - meant) <= 0.05 * abs(meant)

    return float(any(map(one, sample.answers)))


def f1(output: str, sample: Sample) -> float:
    """F1 of words (Rajpurkar et al. 2016, arXiv 1606.05250), without punctuation and articles."""
    said = _squad_words(output)

    def one(answer: str) -> float:
        meant = _squad_words(answer)
        if not said or not meant:
            return float(said == meant)
        common = sum((Counter(said) & Counter(meant)).values())
        return 2 * common / (len(said) + len(meant))

    return max(map(one, sample.answers))


def rouge(output: str, sample: Sample) -> float:
    """ROUGE-L: see :func:`rouge_l`."""
    return max(rouge_l(_plain(output).split(), _plain(answer).split()) for answer in sample.answers)


def iou(output: str, sample: Sample) -> float:
    """Intersection over union of boxes: the first four numbers in a text, x0, y0, x1, y1, in the reference's units."""
    said = box(output)
    return 0.0 if said is None else max(_overlap(said, meant) for meant in map(box, sample.answers) if meant)


def iou50(output: str, sample: Sample) -> float:
    """1 if :func:`iou` is at least 1/2, as grounding is mostly judged."""
    return float(iou(output, sample) >= 0.5)


METRICS: dict[str, Metric] = {
    f.__name__: f for f in (exact, contains, choice, vqa, anls, number, f1, rouge, iou, iou50)
}
"""Metrics by name."""


def usual(output: str, sample: Sample) -> float:
    """:func:`choice` where the sample has options, else :func:`exact`."""
    return (choice if sample.choices else exact)(output, sample)


def lacking(name: str, sample: Sample) -> str | None:
    """What a metric of this name expected and the sample lacks, or None."""
    if name == "choice" and not sample.choices:
        return "expected 'choices' for the metric 'choice', got none"
    if name == "vqa" and len(sample.answers) < 3:
        return f"expected at least 3 'answers' for the metric 'vqa', got {len(sample.answers)}"
    if name in ("iou", "iou50") and (odd := [a for a in sample.answers if box(a) is None]):
        return f"expected a box of four numbers, x0 < x1 and y0 < y1, for the metric {name!r}, got {odd[0]!r}"
    return None


def box(text: str) -> tuple[float, float, float, float] | None:
    """The first four numbers of a text as a box x0, y0, x1, y1; None if they are none, or not one with an area."""
    found = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", text)[:4]]
    if len(found) < 4 or found[0] >= found[2] or found[1] >= found[3]:
        return None
    return found[0], found[1], found[2], found[3]


def levenshtein(one: str, other: str) -> int:
    """How many characters must be put in, taken out or replaced to make one text of the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def rouge_l(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence (Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries)."""
    if not one or not other:
        return float(len(one) == len(other))
    row = [0] * (len(other) + 1)
    for a in one:
        diagonal = 0
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(one) + len(other))


def token_match(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of places of the longer of two sequences at which both have the same token; 1 if both are empty."""
    most = max(len(one), len(other))
    return sum(a == b for a, b in zip(one, other, strict=False)) / most if most else 1.0


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _holds(text: str, part: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def _chosen(output: str, options: Sequence[str]) -> str | None:
    """The option that an output names, in its plain form."""
    plain, said = [_plain(x) for x in options], _plain(output)
    for form in (said, said.rstrip(".")):
        if form in plain:
            return form
    letter = _LETTER.match(output)
    if letter and (at := ord(letter[1].upper()) - ord("A")) < len(plain):
        return plain[at]
    held = [x for x in plain if _holds(said, x)]
    return held[0] if len(held) == 1 else None


def _vqa_form(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d)|['`]", "", text.lower())
    text = re.sub(rf"[{re.escape(string.punctuation.replace('.', ''))}]|(?<!\d)\.|\.(?!\d)", " ", text)
    words = [word for word in text.split() if word not in ("a", "an", "the")]
    return " ".join(_NUMBER_WORDS.get(word, word) for word in words)


def _squad_words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in text.split() if word not in ("a", "an", "the")]


def _number(text: str) -> float | None:
    """A text that is one number, with or without a currency, thousands and a percent sign (which divides nothing)."""
    found = re.fullmatch(r"[$€£]?\s*(-?\d[\d,]*\.?\d*|-?\.\d+)\s*%?\.?", text.strip())
    return float(found[1].replace(",", "")) if found else None


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    common = max(wide, 0.0) * max(high, 0.0)
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other))
    return common / (areas - common)
