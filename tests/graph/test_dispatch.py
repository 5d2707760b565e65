"""Dispatch: whole plans chosen among at run time, and VISOR's budget, policies and MLP switch."""

from __future__ import annotations

import pytest
import torch

import vlmrewrite as vr
from tests.small import CHAIN, always, family
from vlmrewrite.oracle import layer_masks
from vlmrewrite.passes import DPVR, STS, VISOR, Random
from vlmrewrite.passes.visor.allocate import spend
from vlmrewrite.passes.visor.dispatch import Confidence
from vlmrewrite.plan.blocks import ATTRIBUTE
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.tokens import Text
from vlmrewrite.runtime import routing, session_of
from vlmrewrite.testing.agreement import generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row

MODELS = {name: family(name) for name in FAMILIES}
TINY = MODELS["llava"]
ROWS = [Row(1, 2, 3), Row(0, 3, 3), Row(3, 1, 3)]
KINDS = [["cross", "text", "cross", "text"], ["self", "text", "cross", "text"], ["self"] * 4]


def kinds(model, row=slice(None)):
    told = [(e.run[row].all(), e.keys[row].all()) for e in layer_masks(model)]
    return ["self" if run else "cross" if keys else "text" for run, keys in told]


def test_plan():
    plan = Plan(4)
    VISOR(policy="confidence", chain=CHAIN[:2], threshold=0.9).change(plan)
    assert str(plan) == (
        "dispatch by Confidence(at=0, threshold=0.9) at layer 0 among\n"
        "variant 0:\n"
        "layer 0        run_on Text, attend_to All\n"
        "layer 1        run_on Text\n"
        "layer 2        run_on Text, attend_to All\n"
        "layer 3        run_on Text\n"
        "variant 1:\n"
        "layer 0        run_on All\n"
        "layer 1        run_on Text\n"
        "layer 2        run_on Text, attend_to All\n"
        "layer 3        run_on Text"
    )


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_policy_chooses_and_later_passes_hold_for_every_plan(which):
    passes = [VISOR(policy=always(which), chain=CHAIN)]
    inputs = TINY.inputs([Row(1, 2, 3), Row(2, 1, 3)])
    with vr.applied(TINY.model, passes) as model:
        model(**inputs)
        assert kinds(model) == KINDS[which]
        assert routing(model).shape == (2, 1, model.config.text_config.hidden_size)
    generation_agreement(TINY.model, inputs, [*passes, STS(keep=4, refine=2, at=1)]).check()


@pytest.mark.slow
@torch.no_grad()
def test_each_row_follows_its_own_plan_and_one_without_an_image_the_cheapest_of_them():
    inputs = TINY.inputs(ROWS)
    real = inputs["attention_mask"].bool()
    alone = {}
    for i in range(3):
        with vr.applied(TINY.model, [VISOR(policy=always(i), chain=CHAIN)]) as model:
            alone[i] = model(**inputs).logits
    for wanted, ran in (([1, 2, 0], [0, 1]), ([0, 2, 0], [0]), ([2, 0, 2], [2]), ([2, 2, 1], [1, 2])):
        with vr.applied(TINY.model, [VISOR(policy=lambda _, w=wanted: torch.tensor(w), chain=CHAIN)]) as model:
            logits = model(**inputs).logits
            assert [run.variant for run in session_of(model).last().result.runs] == ran
            for row in (0, 2):
                assert kinds(model, row) == KINDS[wanted[row]]
                torch.testing.assert_close(logits[row][real[row]], alone[wanted[row]][row][real[row]])


def test_confidence_escalates_until_it_is_reached():
    inputs = TINY.inputs(ROWS)
    seen = {}
    for threshold in (1e-6, 1.0):
        with vr.applied(TINY.model, [VISOR(policy="confidence", chain=CHAIN, threshold=threshold)]) as model:
            model(**inputs)
            seen[threshold] = [kinds(model, row) for row in range(3)]
            found = vr.report(model)
            assert any("2 cheaper plans ran" in note for note in found.notes) == (threshold == 1.0)
            assert (found.totals["after"]["flops"] > found.totals["before"]["flops"]) == (threshold == 1.0)
    assert seen == {1e-6: [KINDS[0]] * 3, 1.0: [KINDS[2], KINDS[0], KINDS[2]]}
    images = torch.tensor([True, False, True, False])
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.0], [0.0, 0.0], [9.0, 0.0]])
    assert Confidence(0, 0.9).then(0, logits, images, 3).tolist() == [0, 0, 1, 0]
    assert Confidence(0, 0.9).then(1, logits, ~images, 3).tolist() == [1, 2, 1, 1]
    assert Confidence(0, 0.9).then(0, logits * float("nan"), ~images, 3).tolist() == [0] * 4
    assert Confidence(0, 0.9).then(2, logits, ~images, 3) is None


def test_logits_of_the_last_tokens_only():
    inputs = TINY.inputs(ROWS)
    with vr.applied(TINY.model, [VISOR(policy="confidence", chain=CHAIN, threshold=1.0)]) as model:
        whole = model(**inputs).logits
        for n in (1, 2):
            torch.testing.assert_close(model(**inputs, logits_to_keep=n).logits, whole[:, -n:])


def test_what_plans_share_runs_once():
    program = vr.rewrite(
        vr.trace(TINY.model, TINY.inputs([Row(1)])),
        [VISOR(policy=always(0), chain=[{"self_layers": [0, 1]}, {"self_layers": [0, 1, 2]}])],
    )
    attention = torch.ops.vlm.attention.default
    count = [sum(n.target is attention for n in gm.graph.nodes) for gm in program.graphs]
    assert count == [2, 2, 2]
    assert program.run()[0][program.anatomy.logits].shape[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("nonsense", [7, -1, "two", 0.5, None, torch.tensor([0.25, 0.5]), torch.zeros(2, 9)])
def test_a_policy_that_returns_nonsense(nonsense):
    inputs = TINY.inputs([Row(1), Row(1)])
    expected = TINY.model(**inputs).logits
    with (
        vr.applied(TINY.model, [VISOR(policy=lambda _: nonsense, chain=CHAIN)]) as model,
        pytest.raises(ValueError, match=r"(?s)chose variant .*; expected an int in 0 \.\. 2"),
    ):
        model(**inputs)
    assert torch.equal(TINY.model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a budget, or a chain; got none"),
        ({"self_layers": [0], "budget": 0.5}, "got layers and a budget"),
        ({"chain": CHAIN}, "expected a policy with a chain"),
        ({"policy": "router", "self_layers": [0]}, "expected a policy with a chain"),
        ({"policy": "oracle", "chain": CHAIN}, "VISOR.policy"),
        ({"policy": "router", "chain": CHAIN[:1]}, "at least two configurations, got one"),
        (
            {"policy": "router", "chain": [{"self": [1]}, {}]},
            r"chain\[0\]: expected the keys .*, got 'self'",
        ),
        ({"policy": "router", "chain": [{"budget": 0.5}, {}]}, r"chain\[0\]: expected the keys"),
        ({"budget": 0.0}, "VISOR.budget: .*greater than 0, got 0.0"),
        ({"budget": 1.5}, "VISOR.budget: .*less than or equal to 1, got 1.5"),
        ({"policy": "confidence", "threshold": 0.0, "chain": CHAIN}, "VISOR.threshold"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VISOR(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("visor", "message"),
    [
        (VISOR(policy="router", chain=CHAIN[::-1]), r"chain\[1\] must update what chain\[0\] updates"),
        (VISOR(policy="router", chain=[CHAIN[0], CHAIN[0]]), "are all the same on this model"),
        (
            VISOR(policy="router", chain=[{"self_layers": [9]}, {"self_layers": [9, 1]}]),
            r"expected a layer in 0 \.\. 3",
        ),
        (VISOR(budget=0.5), r"VISOR\(budget=0.5\) measures the layers; expected calibration=inputs"),
        (VISOR(budget=1e-9, calibration=TINY.inputs([Row(1)])), "buys no layer; expected at least"),
        (VISOR(budget=0.5, calibration={"input_ids": torch.tensor([[3, 4]])}), "no image"),
    ],
)
def test_bad_recipes_leave_the_model_as_it_was(visor, message):
    before = set(TINY.model.state_dict())
    with pytest.raises(ValueError, match=message):
        vr.apply(TINY.model, [visor])
    assert set(TINY.model.state_dict()) == before
    assert "forward" not in TINY.model.__dict__


def test_dispatching_twice():
    plan = Plan(4)
    VISOR(policy="router", chain=CHAIN).change(plan)
    with pytest.raises(ValueError, match="two plans or more that do not dispatch themselves"):
        plan.dispatch(Confidence(0, 0.5), [plan.copy(), plan.copy()])
    a, b = Plan(4), Plan(4)
    a.layer(0).run_on(Text)
    with pytest.raises(ValueError, match="the plans of a dispatch at layer 2 differ before it"):
        Plan(4).dispatch(Confidence(2, 0.5), [a, b])


def test_an_untrained_router_chooses_the_most_demanding_and_a_trained_one_what_it_learnt():
    model, inputs = FAMILIES["llava"]().model, TINY.inputs([Row(1, 2, 3), Row(2, 1, 3)])
    vr.apply(model, [VISOR(policy="router", chain=CHAIN)])
    model(**inputs)
    assert kinds(model) == KINDS[2]
    learning = [n for n, p in model.named_parameters() if p.requires_grad]
    assert learning
    assert all(n.startswith(f"{ATTRIBUTE}.visor_router.") for n in learning)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    labels, losses = torch.tensor([0, 1]), []
    for _ in range(12):
        model(**inputs)
        loss = torch.nn.functional.cross_entropy(routing(model), labels)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
    assert losses[3] < losses[0]
    model(**inputs)
    assert routing(model).argmax(-1).tolist() == [0, 1]
    assert [kinds(model, row) for row in range(2)] == KINDS[:2]
    vr.restore(model)
    assert not hasattr(model, ATTRIBUTE)


@pytest.mark.slow
def test_routing_without_a_router():
    with vr.applied(TINY.model, [VISOR(policy="confidence", chain=CHAIN)]) as model:
        with pytest.raises(ValueError, match="no call with an image"):
            routing(model)
        model(**TINY.inputs([Row(1)]))
        with pytest.raises(ValueError, match="chooses nothing by a value in the graph"):
            routing(model)


def test_a_budget_is_spent_where_it_matters():
    freeze, hide, share = [0.5, 0.1, 0.0, 0.0], [0.6, 0.9, 0.2, 0.0], [0.25] * 4
    assert spend(1.0, freeze, hide, share) == ([0, 1, 2, 3], [])
    assert spend(0.0625, freeze, hide, share) == ([], [1])
    assert spend(0.125, freeze, hide, share) == ([], [1, 2])
    assert spend(0.4375, freeze, hide, share) == ([0], [1, 2, 3])
    assert spend(0.05, freeze, hide, share) == ([], [])


@pytest.mark.slow
def test_a_budget_is_measured_once_and_kept_in_the_recipe(tmp_path):
    inputs = TINY.inputs(ROWS)
    recipe = vr.calibrate(TINY.model, [VISOR(budget=0.5, calibration=inputs)])
    (found,) = recipe.passes
    assert found.budget is None
    assert found.self_layers or found.cross_layers
    assert vr.calibrate(TINY.model, [VISOR(budget=0.5)], inputs) == recipe
    assert vr.calibrate(TINY.model, recipe) is recipe
    recipe.to_yaml(tmp_path / "found.yaml")
    assert vr.Recipe.from_yaml(tmp_path / "found.yaml").passes == recipe.passes
    with vr.applied(TINY.model, [VISOR(budget=1.0, calibration=inputs)]) as model:
        assert model(**inputs).logits.shape
        assert kinds(model) == ["self"] * 4


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_vision_without_the_mlp(name):
    passes = [VISOR(self_layers=[0, 1, 2, 3], sa_vision_mlp=False)]
    plan = Plan(4)
    passes[0].change(plan)
    assert str(plan) == "layers 0-3     run_on All, mlp_on Text"
    tiny = MODELS[name]
    generation_agreement(tiny.model, tiny.inputs(ROWS), [*passes, Random(keep=3, at=2)]).check()


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.15, 0.2, 0.5])
def test_confidence_is_that_of_the_first_token(threshold):
    """Whether or not later tokens, or padding, are what the model gives logits of."""
    with vr.applied(TINY.model, [VISOR(policy="confidence", chain=CHAIN, threshold=threshold)]) as model:
        for seed in range(3):
            inputs = TINY.inputs([Row(1, 2, 3)], seed=seed)
            one, two = (model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=c) for c in (True, False))
            assert torch.equal(one, two)
            inputs = TINY.inputs([Row(1, 2, 6), Row(1, 2, 1)], side="right", seed=seed)
            last = model(**inputs, logits_to_keep=1).logits
            torch.testing.assert_close(last, model(**inputs).logits[:, -1:], atol=1e-4, rtol=0)


def test_scores_that_are_no_numbers():
    policy = lambda hidden: torch.full((hidden.shape[0], 3), float("nan"))  # noqa: E731
    with (
        vr.applied(TINY.model, [VISOR(policy=policy, chain=CHAIN)]) as model,
        pytest.raises(ValueError, match="expected finite scores"),
    ):
        model(**TINY.inputs([Row(1)]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: VISOR([0], calibration={}), "expected a budget with calibration inputs"),
        (lambda: VISOR([0], threshold=0.5), "threshold=0.5 is for policy='confidence'"),
        (lambda: VISOR([0], enough=0.5), "enough=0.5 is for policy='router', got policy=None"),
        (lambda: DPVR(at=1, calibration={}), "calibration inputs are for at='auto', got at=1"),
    ],
)
def test_options_that_would_do_nothing(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
