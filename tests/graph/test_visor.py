"""VISOR's static form: which layers update, read or ignore vision tokens."""

from __future__ import annotations

import pytest
import torch

import vlmrewrite as vr
from tests.small import family, planned
from vlmrewrite.passes import STS, VISOR, FastV, Stride, ViCA
from vlmrewrite.passes.visor.dispatch import Confidence
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.tokens import Text
from vlmrewrite.runtime import prompt_ends
from vlmrewrite.testing.models import Row

TINY = {name: family(name) for name in ("llava", "qwen2_5_vl")}
LLAVA = TINY["llava"].model


def test_the_three_kinds_of_layer():
    assert planned(VISOR(self_layers=[0, 4], cross_layers=[2, 3])) == (
        "layer 0        run_on All\n"
        "layer 1        run_on Text\n"
        "layers 2-3     run_on Text, attend_to All\n"
        "layer 4        run_on All\n"
        "layers 5-7     run_on Text"
    )


def test_all_layers_self_says_nothing():
    assert planned(VISOR(self_layers=range_of(8))) == planned(VISOR(self_layers=1.0)) == "layers 0-7     run_on All"


def range_of(n):
    return list(range(n))


def test_without_self_layers_it_is_vica():
    assert planned(VISOR(cross_layers=[0, 3])) == planned(ViCA(cross=[0, 3]))


def test_cross_is_short_for_cross_layers():
    assert VISOR(cross=[0, 4]) == VISOR(cross_layers=[0, 4])


def test_a_third_of_each_kind():
    plan = Plan(24)
    VISOR(self_layers=0.3333, cross_layers=0.3333).change(plan)
    kinds = ["self" if e.run_set != Text else "cross" if e.keys != Text else "text" for e in plan.layers]
    assert kinds == ["self", "cross", "text"] * 8


SPLIT = (
    "repulsion = Vision.select(repulsion, keep=9) at layer 0\n"
    "relevance = repulsion.select(relevance, keep=4) at layer 4\n"
    "layer 0        run_on Text | repulsion\n"
    "layer 1        run_on Text, attend_to Text | repulsion\n"
    "layers 2-3     run_on Text\n"
    "layer 4        run_on Text | relevance\n"
    "layer 5        run_on Text, attend_to Text | relevance\n"
    "layers 6-7     run_on Text"
)


def test_with_sts_in_either_order():
    sts, visor = STS(keep=9, refine=4, at=0.5), VISOR(self_layers=[0, 4], cross_layers=[1, 5])
    assert planned(sts, visor) == planned(visor, sts) == SPLIT


def test_a_selection_that_no_layer_uses_is_not_made():
    both = planned(STS(keep=9, refine=4, at=0.5), VISOR(self_layers=[0], cross_layers=[1]))
    assert both == planned(VISOR(self_layers=[0], cross_layers=[1]), STS(keep=9, refine=4, at=0.5))
    assert "relevance" not in both


def test_what_an_earlier_pass_narrowed_stays_narrow():
    plan = Plan(4)
    plan.layer(1).attend_to(Text)
    plan.layer(2).run_on(Text)
    VISOR(self_layers=[0, 2], cross_layers=[1, 3]).change(plan)
    assert str(plan) == (
        "layer 0        run_on All\nlayers 1-2     run_on Text\nlayer 3        run_on Text, attend_to All"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VISOR(), "^VISOR: expected self_layers and cross_layers, or a budget, or a chain; got none$"),
        (lambda: VISOR([], []), "^VISOR: expected self_layers and cross_layers, or a budget, or a chain; got none$"),
        (
            lambda: VISOR([0, 1, 2], [2, 3, 0]),
            "^VISOR: expected a layer in self_layers or in cross_layers, got 2, 0 in",
        ),
        (lambda: VISOR([0, 0]), r"^VISOR\.self_layers: expected a list of different layers .*, got \[0, 0\] \(list\)$"),
        (
            lambda: VISOR([0], [-1]),
            r"^VISOR\.cross_layers: expected a list of different layers .*, got \[-1\] \(list\)$",
        ),
        (lambda: VISOR(crossing=[4]), "^VISOR.crossing: unknown key, expected one of self_layers, cross_layers"),
        (lambda: VISOR(cross=[0], cross_layers=[1]), "expected cross or cross_layers, which mean the same, got both"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("p", [VISOR([0.0], [0.1]), VISOR([0], [0.1]), VISOR(0.5, [0])], ids=repr)
def test_fractions_that_fall_on_one_layer_of_both_kinds(p):
    plan = Plan(8)
    with pytest.raises(ValueError, match="^expected a layer in self_layers or in cross_layers, got 0 in both$"):
        p.change(plan)
    assert str(plan) == "layers 0-7     run_on All"


def test_all_layers_self_is_the_original_bit_by_bit():
    inputs = TINY["llava"].inputs([Row(1), Row(2, 3, 1)], seed=5)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = LLAVA(**inputs).logits[real]
        for p in (VISOR(self_layers=[0, 1, 2, 3]), VISOR(self_layers=1.0), Stride(keep=1.0)):
            with vr.applied(LLAVA, [p]):
                assert torch.equal(LLAVA(**inputs).logits[real], expected)


def test_without_an_image_nothing_changes():
    inputs = TINY["llava"].inputs([Row(0, 4, 2), Row(0, 1, 2)], seed=5)
    with torch.no_grad():
        expected = LLAVA(**inputs).logits
        with vr.applied(LLAVA, [VISOR([1], [2])]):
            assert torch.equal(LLAVA(**inputs).logits, expected)


def test_keys_and_values_of_each_kind():
    inputs = TINY["llava"].inputs([Row(1, 2, 3), Row(1, 2, 3)])
    for passes, lengths in (
        ([VISOR([0], [2])], [21, 5, 21, 5]),
        ([STS(keep=6, refine=3, at=2), VISOR([0], [2])], [11, 5, 8, 5]),
        ([VISOR([0], [2]), FastV(keep=3, at=1)], [21, 5, 8, 5]),
    ):
        with torch.no_grad(), vr.applied(LLAVA, passes):
            assert LLAVA(**inputs).past_key_values.kv_lengths() == lengths


def test_a_cross_layer_reads_vision_as_the_last_self_layer_left_it():
    inputs = TINY["llava"].inputs([Row(1)], seed=5)
    with torch.no_grad():
        results = []
        for p in (VISOR([0], [2]), VISOR([0], [2, 3]), VISOR([], [2]), VISOR([0], [3])):
            with vr.applied(LLAVA, [p]):
                results.append(LLAVA(**inputs).logits[0, -1])
    for i, a in enumerate(results):
        for b in results[:i]:
            assert (a - b).abs().max() > 1e-2


@torch.no_grad()
def test_a_plan_is_chosen_by_the_logits_at_each_prompts_end(llava, monkeypatch):
    seen, then = [], Confidence.then
    monkeypatch.setattr(Confidence, "then", lambda self, tried, *a: (seen.append(a[0]), then(self, tried, *a))[1])
    inputs = llava.inputs([Row(1, 2, 3), Row(0, 3, 3), Row(3, 1, 3)], side="left")
    ends = torch.tensor([0, -1, -2]) + inputs["input_ids"].shape[1] - 1
    chain = [{"self_layers": [0]}, {"self_layers": [0, 1]}]
    passes = [VISOR(policy="confidence", chain=chain, threshold=1e-6)]
    with vr.applied(llava.model, passes) as model, prompt_ends(model, ends):
        whole = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, whole[:, -1:])
    assert len(seen) == 2
    for logits in seen:
        torch.testing.assert_close(logits, whole[range(3), ends])
