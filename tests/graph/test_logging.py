"""What the library says by `logging`, and what by warnings."""

from __future__ import annotations

import logging
import re

import pytest
import torch

import vlmrewrite as vr
from tests.small import ONE_EACH
from vlmrewrite.passes import VTW, Stride
from vlmrewrite.testing.models import FAMILIES, Row

REFUSED = Stride(keep=0.5, at=2)
"""Behind VTW(at=1), which leaves no vision tokens there."""


def test_nothing_is_said_unless_asked_for():
    logger = logging.getLogger("vlmrewrite")
    assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]
    assert logger.level == logging.NOTSET and logger.propagate


@pytest.mark.slow
@torch.no_grad()
def test_captures_and_graphs_are_logged(unshared, caplog):
    caplog.set_level(logging.INFO, "vlmrewrite")
    tiny = FAMILIES["llava"]()
    with vr.applied(tiny.model, ONE_EACH["sts"]):
        for _ in range(2):
            tiny.model(**tiny.inputs([Row(1)]))
    told = [(r.name, r.levelname, r.getMessage()) for r in caplog.records]
    assert [(name, level) for name, level, _ in told] == [
        ("vlmrewrite.capture.dynamo", "INFO"),
        ("vlmrewrite.compiler", "INFO"),
    ], told
    captured, made = (text for *_, text in told)
    assert re.fullmatch(
        r"LlavaForConditionalGeneration captured \(called with image, .*input_ids.*\) in \d+\.\d\d s: \d+ nodes, \d+"
        r" layers as copies",
        captured,
    )
    assert re.fullmatch(
        r"1 graph\(s\) for cpu under STS\(keep=5, .*\) in \d+\.\d\d s: 4 decoder layers, 2 selections", made
    )
    assert "tensor" not in captured + made


@pytest.mark.slow
@torch.no_grad()
def test_a_refusal_is_said_once(unshared, caplog):
    caplog.set_level(logging.INFO, "vlmrewrite")
    tiny = FAMILIES["llava"]()
    with vr.applied(tiny.model, [VTW(at=1), REFUSED]):
        with pytest.warns(UserWarning, match=r"does nothing: an earlier pass leaves no vision tokens"):
            tiny.model(**tiny.inputs([Row(1)]))
        tiny.model(**tiny.inputs([Row(1, 2, 3), Row(1)]))  # a warning would be an error
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert "(refused: an earlier pass leaves no vision tokens" in caplog.text


def test_rewrite_warns_of_what_is_refused(llava):
    program = vr.trace(llava.model, llava.inputs([Row(1)]))
    with pytest.warns(UserWarning, match=r"^rewrite: Stride\(.*\) does nothing: an earlier pass leaves") as seen:
        made = vr.rewrite(program, [VTW(at=1), REFUSED])
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.warns(UserWarning, match="Stride") as seen:
        vr.rewrite(vr.rewrite(program, VTW(at=1)), REFUSED)
    assert len(seen) == 1
    assert "REFUSED Stride" in str(made)
