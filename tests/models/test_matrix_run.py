"""A family of the table, measured: every cell, what the unmodified model does not do, and processes that die."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmrewrite.passes import VISOR
from vlmrewrite.testing.agreement import Agreement
from vlmrewrite.testing.matrix.cases import CASES, IMAGES, LAYERS, TECHNIQUES, answers, beams, conversation, fitted
from vlmrewrite.testing.matrix.cells import Cell, Record
from vlmrewrite.testing.matrix.measure import measure, padded, tried, unpadded
from vlmrewrite.testing.matrix.run import run
from vlmrewrite.testing.matrix.table import details
from vlmrewrite.testing.models import VOCABULARY, ZOO, Row, TinyVLM


@pytest.fixture(scope="module")
def tiny() -> TinyVLM:
    return ZOO["llava"](layers=LAYERS)


@pytest.mark.slow
def test_a_family_from_the_first_piece_to_the_last(unshared: None) -> None:
    pieces = list(measure("llava"))
    first = dict(pieces[:4])
    assert list(first) == ["versions", "capture_seconds", "graphs", "moved"]
    assert first["moved"] == {}
    assert first["capture_seconds"] > 0
    assert first["graphs"] == (2, 2)
    cells = {(case, technique): cell for kind, (case, technique, cell) in pieces[4:] if kind == "cell"}
    assert list(cells) == [(case, technique) for case in CASES for technique in TECHNIQUES]
    for (case, _), cell in cells.items():
        assert cell.status == ("absent" if case == "video" else "ok"), cell
        assert (cell.error is not None) == (case not in ("trace", "video"))
    assert {cell.reason for (case, _), cell in cells.items() if case == "video"} == {"the family takes no videos"}


def test_techniques_take_layers_that_have_attention() -> None:
    """Of Qwen3.5 only the last layer of three has attention, of LFM2-VL only the one in the middle."""
    last, middle = (fitted(ZOO[name](layers=LAYERS)) for name in ("qwen3_5", "lfm2_vl"))
    assert (last["STS"].at, last["FastV"].at, last["VISOR"]) == (2, 2, TECHNIQUES["VISOR"])
    assert middle == dict(TECHNIQUES) | {"VISOR": VISOR([0], [1])}
    told = list(details("some", Record(moved={"FastV": repr(last["FastV"])})))
    assert told[1].startswith("  some layers have no attention: FastV(keep=0.5, at=2")


def test_videos_go_alone_where_the_model_takes_no_images_beside_them() -> None:
    """GLM-4.1V's image and video tokens are one."""
    apart, why = CASES["video"].fitting(ZOO["glm4v"](layers=LAYERS))
    assert why is not None
    assert why.startswith("ValueError: Image features and image tokens do not match")
    assert any(row.videos for row in apart.rows)
    assert not any(row.images for row in apart.rows)
    assert CASES["video"].fitting(ZOO["qwen2_vl"](layers=LAYERS)) == (CASES["video"], None)
    assert "  videos are tried without images beside them" in list(details("glm4v", Record(alone=why)))[1]


@pytest.mark.slow
def test_a_fault_is_wrong(tiny: TinyVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is what the rewritten model gave."""
    from vlmrewrite.lower import Executable

    own = Executable.run

    def off(self, inputs, call):
        result = own(self, inputs, call)
        logits = [isinstance(x, torch.Tensor) and x.shape[-1] == VOCABULARY for x in result.out]
        assert sum(logits) == 1
        out = tuple(x + 0.01 if yes else x for x, yes in zip(result.out, logits, strict=True))
        return dataclasses.replace(result, out=out)

    monkeypatch.setattr(Executable, "run", off)
    for case in ("prefill", "generate", "beams"):
        cell = tried(tiny, CASES[case], TECHNIQUES["Stride"], [])
        assert cell.status == "wrong", f"{case}: {cell}"
        assert cell.error == pytest.approx(0.01, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("how", [answers, beams, conversation])
def test_what_is_generated(tiny: TinyVLM, how) -> None:
    rows = CASES["beams"].rows if how is beams else IMAGES
    tokens, logits = how(tiny, tiny.inputs(rows))
    assert logits.shape == (len(rows), 3, VOCABULARY)
    assert tokens.shape == (len(rows), 7 if how is conversation else 2)


def test_what_the_unmodified_model_does_not_do_is_absent(tiny: TinyVLM) -> None:
    def generate(**_):
        raise RuntimeError("no beams here")

    class Halved:
        """Its forward gives other logits than its generate()."""

        def __call__(self, **inputs):
            return SimpleNamespace(logits=tiny.model(**inputs).logits / 2)

        def __getattr__(self, name):
            return getattr(tiny.model, name)

    case = dataclasses.replace(CASES["beams"], check=lambda *_: 1 / 0)
    assert case.amiss(tiny) is None
    cell = tried(tiny, case, TECHNIQUES["Stride"], [])
    assert cell.status == "failed"
    assert cell.reason.startswith("ZeroDivisionError: ")
    other = dataclasses.replace(tiny, model=Halved())
    unlike = case.amiss(other)
    assert unlike is not None
    assert unlike.status == "failed"
    assert unlike.reason.endswith("off those of its own forward over the same tokens")
    wrong = dataclasses.replace(case, check=lambda *_: Agreement(1.0, 0.1))
    assert tried(other, wrong, TECHNIQUES["Stride"], []) == unlike
    assert tried(other, case, TECHNIQUES["Stride"], []) == cell  # what else goes wrong is told as it is
    other.model.generate = generate
    absent = tried(other, case, TECHNIQUES["Stride"], [])
    assert absent == Cell("absent", reason="the unmodified model: RuntimeError: no beams here")


def test_batches_with_and_without_padding() -> None:
    tiny = ZOO["smolvlm"](layers=1)
    batches = unpadded(tiny, 2, Row(1, 3, 2))
    assert len(batches) == 2
    assert all(bool(inputs["attention_mask"].all()) for inputs in batches)
    one = tiny.inputs([Row(1, 1, 4)])
    more = padded(one)
    assert more["attention_mask"][0, :3].tolist() == [0, 0, 1]
    assert torch.equal(more["input_ids"][:, 2:], one["input_ids"])
    assert torch.equal(more["pixel_values"], one["pixel_values"])


# ---- processes


def _measured(name: str) -> Iterator[tuple[str, Any]]:
    yield "versions", "some"
    yield "cell", ("trace", "Stride", Cell("ok"))
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hangs":
        time.sleep(600)
    if name == "raises":
        raise KeyError(name)


def test_a_family_that_dies_or_hangs_costs_its_own_cells_only() -> None:
    begun = time.monotonic()
    found = dict(run(["dies", "raises", "ends"], jobs=3, timeout=120, measure=_measured))
    assert time.monotonic() - begun < 110
    told = {"dies": "not reached: the process ended with SIGKILL", "raises": "KeyError: 'raises'"}
    told["ends"] = "not reached: the process ended with exit code 0"
    for name, one in found.items():
        assert one.versions == "some"
        assert list(one.cells) == list(CASES)
        cells = {(case, t): cell for case, row in one.cells.items() for t, cell in row.items()}
        assert cells.pop(("trace", "Stride")) == Cell("ok")
        assert len(cells) == len(CASES) * len(TECHNIQUES) - 1
        assert {cell.status for cell in cells.values()} == {"failed"}
        assert all(cell.reason.startswith(told[name]) for cell in cells.values())


def test_a_family_that_takes_too_long() -> None:
    [(name, found)] = run(["hangs"], timeout=0.5, measure=_measured)
    assert name == "hangs"
    assert found.cells["beams"]["DAPE"] == Cell("failed", reason="not reached: 0.5 seconds were over")
