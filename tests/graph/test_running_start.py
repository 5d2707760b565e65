"""VISOR's policy by confidence, where a chain begins with the configuration that cost least for earlier rows."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import vlmrewrite as vr
from tests.small import family
from vlmrewrite.ops import Run
from vlmrewrite.passes import VISOR
from vlmrewrite.recipe import Recipe
from vlmrewrite.runtime.running import AGAIN, ENOUGH, WINDOW, RunningShare
from vlmrewrite.testing.models import Row

CHAIN = ({"cross_layers": [0, 2]}, {"self_layers": [2], "cross_layers": [0]}, {"self_layers": 1.0})
COSTS = [1.0, 3.0, 6.0]


def seen(unsure, sure, variant=0):
    """A run for some rows, of which the first ones want more."""
    rows = [*range(unsure + sure)]
    return Run(variant, rows, rows[unsure:])


def after(*runs):
    running = RunningShare()
    for run in runs:
        running.add([run], [True] * len(run.rows), 3)
    return running


@pytest.mark.parametrize(
    ("runs", "variant"),
    [
        ([], 0),
        ([seen(ENOUGH - 1, 0)], 0),
        ([seen(ENOUGH, 0)], 2),  # 1 + 1 * (3 + 6) > 6: what no row tried does for none
        ([seen(0, ENOUGH)], 0),
        ([seen(8, 0), seen(0, 8, 1)], 1),  # 1 + 3 against 3 and 6
        ([seen(4, 4), seen(0, 4, 1)], 0),  # 1 + 3 / 2
        ([seen(8, 0), seen(4, 4, 1)], 1),  # 3 + 6 / 2 is 6 too: of equal ones the cheaper
        ([seen(WINDOW, 0), seen(0, WINDOW)], 0),  # what is long ago is forgotten
        ([seen(0, WINDOW), seen(WINDOW, 0)], 2),
    ],
)
def test_the_variant_that_costs_least_by_the_running_share(runs, variant):
    assert after(*runs).begin(3, lambda: COSTS).variant == variant


def test_now_and_then_it_looks_again():
    running = after(seen(ENOUGH, 0))
    found = [running.begin(3, lambda: COSTS).variant for _ in range(2 * AGAIN)]
    assert [i for i, x in enumerate(found) if x == 0] == [AGAIN - 1, 2 * AGAIN - 1]
    assert {*found} == {0, 2}


def test_no_more_than_three_hundredths_are_lost_on_rows_that_are_never_sure():
    running, costs, total = RunningShare(), [1.0, 2.6, 6.0], 0.0
    for _ in range(50 * AGAIN):
        first = running.begin(3, lambda: costs).variant
        total += sum(costs[first:])
        running.add([Run(i, [0], [0] if i == 2 else []) for i in range(first, 3)], [True], 3)
    assert total / (50 * AGAIN * costs[-1]) < 1 / 0.97


def test_rows_without_an_image_say_nothing():
    running = RunningShare()
    running.add([seen(0, 20)], [False] * 20, 3)
    assert "of 8 rows that it takes to choose, 0" in running.begin(3, lambda: COSTS).why


@torch.no_grad()
def test_calls_begin_where_earlier_ones_ended_and_say_so():
    tiny = family("llava")
    inputs = tiny.inputs([Row(1), Row(2, 3, 1), Row(0, 5)], seed=2)
    recipe = VISOR(policy="confidence", chain=CHAIN, threshold=0.99, start="running")
    expected, real = tiny.model(**inputs).logits, inputs["attention_mask"].bool()
    variants, notes = [], []
    with vr.applied(tiny.model, recipe):
        for _ in range(AGAIN):
            got = tiny.model(**inputs).logits
            torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)
            variants.append([run.variant for run in vr.runtime.session_of(tiny.model).last().result.runs])
            notes.append(" ".join(str(vr.report(tiny.model)).split()))
    each = [0, 1, 2]  # two rows with an image a call: after four calls there are enough
    assert variants == [*[each] * 4, *[[2]] * (AGAIN - 5), each]
    assert "of 8 rows that it takes to choose, 2 were seen" in notes[1]
    assert "began with variant 2, expected at 1.00 of the last one's cost" in notes[4]
    assert "unsure were 100% after variant 0" in notes[4]
    assert "to look again" in notes[-1]
    with vr.applied(tiny.model, recipe):  # applied anew, it has seen nothing
        tiny.model(**inputs)
        assert len(vr.runtime.session_of(tiny.model).last().result.runs) == 3


@torch.no_grad()
def test_no_row_depends_on_the_others_of_its_call():
    tiny = family("llava")

    def of(n, before):
        with vr.applied(tiny.model, VISOR(policy="confidence", chain=CHAIN, threshold=0.2, start="running")):
            session = vr.runtime.session_of(tiny.model)
            session.running.add([seen(8, 0)] if before else [], [True] * 8, 3)
            logits = tiny.model(**{k: x[: n or len(x)] for k, x in inputs.items()}).logits
            return logits[0, -1], session.last().result.runs[0].variant

    inputs = tiny.inputs([Row(1), Row(1), Row(1)], seed=0)
    for before in (False, True):
        alone, together = of(1, before), of(None, before)
        torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-5)
        assert alone[1] == together[1] == (2 if before else 0)


@torch.no_grad()
def test_threads_and_copies():
    tiny = family("llava")
    model, inputs = copy.deepcopy(tiny.model), tiny.inputs([Row(1)], seed=2)
    vr.apply(model, VISOR(policy="confidence", chain=CHAIN, threshold=0.99, start="running"))
    model(**inputs)
    threads = [threading.Thread(target=lambda: [model(**inputs) for _ in range(ENOUGH // 2)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model(**inputs)
    assert [run.variant for run in vr.runtime.session_of(model).last().result.runs] == [2]


def test_calls_in_training_see_and_are_seen_by_no_other():
    tiny = family("llava")
    model, inputs = copy.deepcopy(tiny.model), tiny.inputs([Row(1)], seed=2)
    vr.apply(model, VISOR(policy="confidence", chain=CHAIN, threshold=0.99, start="running"))
    session = vr.runtime.session_of(model)
    session.running.add([seen(8, 0)], [True] * 8, 3)
    with torch.no_grad():
        for training, first in ((True, 0), (False, 2), (True, 0)):
            model(**inputs) if not training else model.train()(**inputs)
            assert session.last().result.runs[0].variant == first
            model.eval()
    assert session.unlearned == 0


def test_it_is_a_part_of_the_recipe(tmp_path):
    given = Recipe.of(VISOR(policy="confidence", chain=CHAIN, start="running"))
    given.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml").passes == given.passes
    with pytest.raises(ValueError, match="start"):
        VISOR(policy="confidence", chain=CHAIN, start="soon")
    with pytest.raises(ValueError, match="'running' is for policy='confidence'|start=running is for"):
        VISOR(policy="router", chain=CHAIN, start="running")
