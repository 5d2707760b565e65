"""Rows of a batch on different plans of a dispatch: each agrees with the oracle, and does what it does alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import CHAIN, family, real
from vlmrewrite.oracle import layer_masks
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, DivPrune, Random
from vlmrewrite.runtime import session_of
from vlmrewrite.testing import strategies
from vlmrewrite.testing.agreement import extended, forward_agreement, generation_agreement, logits_agreement
from vlmrewrite.testing.models import FAMILIES, ZOO, Row

LATE = [{"self_layers": [0, 1]}, {"self_layers": [0, 1], "cross_layers": [2]}, {"self_layers": [0, 1, 2]}]
"""A chain that has layers in common before it parts."""


def of_rows(plans):
    """A policy that chooses a plan for each row."""
    return lambda hidden: torch.tensor(plans[: len(hidden)])


def runs(model):
    return session_of(model).last().result.runs


def selections():
    keep, at = strategies.budgets(), strategies.depths(4)
    return st.one_of(
        st.builds(Random, keep=keep, at=at),
        st.builds(DivPrune, keep=keep),
        st.builds(STS, keep=keep, refine=keep, at=at),
    )


@given(
    st.sampled_from(["llava"] * 4 + sorted(FAMILIES)),
    strategies.rows(images=1),
    strategies.sides(),
    st.lists(st.integers(0, 2), min_size=3, max_size=3),
    st.sampled_from([CHAIN, LATE]),
    st.lists(selections(), max_size=1),
    st.lists(selections() | st.builds(DPVR, at=st.integers(0, 3), fuse=st.integers(0, 1)), max_size=1),
)
def test_rows_on_plans_of_their_own_agree_with_the_oracle(name, rows, side, plans, chain, before, after):
    tiny = family(name)
    passes = [*before, VISOR(policy=of_rows(plans), chain=chain), *after]
    inputs = tiny.inputs(rows, side=side)
    (generation_agreement if side == "left" else forward_agreement)(tiny.model, inputs, passes, strict=False).check()


@pytest.mark.slow
@torch.no_grad()
@given(strategies.rows(images=1), strategies.sides(), st.sampled_from([0.15, 0.25, 0.4]), st.integers(0, 9))
def test_what_a_row_does_comes_of_that_row_alone(rows, side, threshold, seed):
    tiny = family("llava")
    inputs = tiny.inputs(rows, side=side, seed=seed)
    images = [0]
    for row in rows:
        images.append(images[-1] + row.images)
    with vr.applied(tiny.model, [VISOR(policy="confidence", chain=CHAIN, threshold=threshold)]) as model:
        together, masks = model(**inputs).logits, layer_masks(model)
        for i, row in enumerate(rows):
            if not row.images:
                continue
            columns = real(inputs)[i]
            alone = {k: inputs[k][i : i + 1, columns] for k in ("input_ids", "attention_mask")}
            pixels = inputs["pixel_values"][images[i] : images[i + 1]]
            logits = model(**alone, pixel_values=pixels).logits
            torch.testing.assert_close(together[i, columns], logits[0], atol=1e-4, rtol=1e-4)
            for mine, all_rows in zip(layer_masks(model), masks, strict=True):
                assert torch.equal(mine.run[0], all_rows.run[i, columns])
                assert torch.equal(mine.keys[0], all_rows.keys[i, columns])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_turn_of_text_on_a_cache_of_different_plans(name):
    tiny = family(name)
    inputs = tiny.inputs([Row(1, 2, 3), Row(1, 2, 3), Row(1, 2, 3)])
    first = inputs["input_ids"].shape[1]
    passes = [VISOR(policy=of_rows([0, 2, 1]), chain=CHAIN), STS(keep=3, refine=2, at=2)]
    with vr.applied(tiny.model, passes) as model:
        cache = model(**inputs, use_cache=True).past_key_values
        assert [bool((layer.positions < 0).any()) for layer in cache.layers] == [False, True, False, True]
        assert [layer.holes for layer in cache.layers] == [False, True, False, True]
        tokens = torch.arange(6).view(3, 2) + 9
        longer = extended(model, inputs, tokens)
        mask = longer["attention_mask"]
        positions = longer["position_ids"][..., first:]
        got = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        masks = layer_masks(model, first + 2)
    logits_agreement(tiny.model, longer, masks, got).check()


@pytest.mark.slow
@torch.no_grad()
def test_a_turn_with_images_on_a_cache_of_different_plans_is_that_of_each_row_alone():
    tiny, n = family("llava"), 3
    turns = [tiny.inputs([Row(1, 2, 3)] * n, seed=seed) for seed in (0, 1)]

    def talk(rows, plans):
        cache, seen, logits = None, 0, []
        for turn, chosen in zip(turns, plans, strict=True):
            seen += turn["input_ids"].shape[1]
            given = {"attention_mask": torch.ones(n, seen).long()[rows], "use_cache": True}
            given |= {k: turn[k][rows] for k in ("input_ids", "pixel_values")}
            with vr.applied(tiny.model, [VISOR(policy=of_rows(chosen), chain=CHAIN)]) as model:
                out = model(**given, past_key_values=cache)
            cache = out.past_key_values
            logits.append(out.logits)
        return torch.cat(logits, 1)

    plans = [[0, 2, 1], [1, 0, 2]]
    together = talk(slice(None), plans)
    for i in range(n):
        alone = talk(slice(i, i + 1), [[of[i]] for of in plans])
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_beams_of_rows_on_different_plans():
    tiny = family("llava")
    inputs = tiny.inputs([Row(1, 2, 3), Row(2, 2, 5), Row(1, 4, 3)])
    how = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plans = [0, 0, 2, 2, 1, 1]
    with vr.applied(tiny.model, [VISOR(policy=of_rows(plans), chain=CHAIN)]) as model:
        together = model.generate(**inputs, **how)
        assert [run.variant for run in runs(model)] == [0, 1, 2]
        without = model.generate(**inputs, **how, use_cache=False)
    assert torch.equal(together, without)


def test_a_branch_that_is_away_where_the_plans_part():
    tiny = family("llava")
    chain = [{"self_layers": [0]}, {"self_layers": [0], "cross_layers": [3]}, {"self_layers": [0, 3]}]
    passes = [DPVR(at=1, fuse=1), VISOR(policy=of_rows([1, 2, 0]), chain=chain)]
    generation_agreement(tiny.model, tiny.inputs([Row(1, 2, 3), Row(1, 3, 3), Row(2, 1, 3)]), passes).check()


@torch.no_grad()
def test_dape_in_some_rows_plans():
    tiny = family("qwen2_5_vl")
    inputs = tiny.inputs([Row(1, 2, 3), Row(1, 3, 3), Row(2, 1, 3)])
    passes = [VISOR(policy=of_rows([2, 0, 2]), chain=LATE), DAPE(0.5)]
    forward_agreement(tiny.model, inputs, passes, strict=False).check()


@pytest.mark.slow
def test_recurrent_layers_of_rows_on_different_plans():
    tiny = ZOO["lfm2_vl"]()
    inputs = tiny.inputs([Row(1, 2, 3), Row(2, 1, 3), Row(1, 3, 4)])
    chain = [{"cross_layers": [1]}, {"self_layers": [0], "cross_layers": [1, 3]}, {"self_layers": [0, 1, 2, 3]}]
    generation_agreement(tiny.model, inputs, [VISOR(policy=of_rows([0, 1, 2]), chain=chain)]).check()
    with pytest.raises(ValueError, match=r"layer 0 is recurrent and cannot attend to All and run on Text"):
        forward_agreement(tiny.model, inputs, [VISOR(policy=of_rows([0, 1, 2]), chain=CHAIN)])


def test_a_loss_is_of_all_rows_which_then_follow_one_plan():
    tiny = family("llava")
    inputs = tiny.inputs([Row(1, 2, 3), Row(1, 3, 3)])
    with torch.no_grad(), vr.applied(tiny.model, [VISOR(policy=of_rows([0, 1]), chain=CHAIN)]) as model:
        labels = inputs["input_ids"].masked_fill(~real(inputs), -100)
        assert model(**inputs, labels=labels).loss is not None
        assert [tuple(run) for run in runs(model)] == [(1, [0, 1], [0, 1])]
        assert "all rows of a call follow the plan of the most demanding one: " in " ".join(vr.report(model).notes)
        model(**inputs)
        assert [tuple(run) for run in runs(model)] == [(0, [0], [0]), (1, [1], [1])]
        assert "all rows of a call follow" not in " ".join(vr.report(model).notes)


@torch.no_grad()
def test_a_decoder_whose_rows_meet_runs_them_together():
    """Behind its last layer, by a hook that takes the mean of the rows off."""
    tiny = family("llava")
    inputs = tiny.inputs([Row(1, 2, 3), Row(0, 3, 3), Row(3, 1, 3)])
    norm = tiny.model.get_submodule("model.language_model.norm")
    undo = norm.register_forward_hook(lambda _, __, out: out - out.mean(0, keepdim=True))
    try:
        with vr.applied(tiny.model, [VISOR(policy=of_rows([0, 0, 1]), chain=CHAIN)]) as model:
            model(**inputs)
            assert [tuple(run) for run in runs(model)] == [(1, [0, 1, 2], [0, 1, 2])]
            told = " ".join(vr.report(model).notes)
    finally:
        undo.remove()
    assert "all rows of a call follow the plan of the most demanding one: node mean" in told
    assert "takes rows together" in told


@torch.no_grad()
def test_the_report_counts_the_rows_of_each_plan():
    tiny = family("llava")
    inputs = tiny.inputs([Row(1, 2, 3), Row(1, 2, 3), Row(1, 2, 3), Row(1, 2, 3)])
    each = []
    for plans in ([0] * 4, [2] * 4, [0, 0, 0, 2]):
        with vr.applied(tiny.model, [VISOR(policy=of_rows(plans), chain=CHAIN)]) as model:
            model(**inputs)
            found = vr.report(model)
            stages = vr.kept_tokens(model)
        each.append(found.totals["after"]["flops"])
    assert each[2] == pytest.approx((3 * each[0] + each[1]) / 4, rel=1e-6)
    assert "layers and totals are those of variant 0: 3 rows, variant 2: 1 row of the plan" in " ".join(found.notes)
    assert found.layers[1]["run_on"] == "Text / All"
    assert [int(n) for n in stages[0].vision.sum(1)] == [0, 0, 0, 16]
