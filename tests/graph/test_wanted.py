"""Where one token's logits are asked for, the last layer runs on that token alone, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import crossed, family
from vlmrewrite.compiler import rewritten
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, Stride
from vlmrewrite.plan import All, Last, Plan, Text, Vision, for_last
from vlmrewrite.runtime import session_of
from vlmrewrite.testing.models import FAMILIES, ZOO, Row

RECIPES = {
    "stride": [Stride(0.5)],
    "sts": [STS(keep=6, refine=3, at=2)],
    "fastv in the last layer": [FastV(0.5, at=3)],
    "visor": [VISOR(self_layers=0.25, cross_layers=0.25)],
    "dpvr": [DPVR(at=1)],
    "policy": [VISOR(policy="confidence", chain=[{"cross_layers": 0.5}, {"self_layers": 1.0}])],
}
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def last_alone(model) -> bool:
    """Whether the last call went by a graph for it."""
    ran, made = session_of(model).last(), session_of(model).executables
    return any(key[-1] for of_graph in made.values() for key, x in of_graph.items() if x is ran.executable)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), crossed(FAMILIES, RECIPES))
@given(
    st.lists(st.builds(Row, st.integers(0, 2), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3), st.data()
)
def test_one_logit_is_the_last_of_all(name, recipe, rows, data):
    rows, side = [Row(1, 2, 3), *rows], data.draw(st.sampled_from(["left", "right"]))
    tiny = family(name, dtype=torch.float64)
    inputs = tiny.inputs(rows, side=side)
    with torch.no_grad(), vr.applied(tiny.model, RECIPES[recipe]):
        whole = tiny.model(**inputs, use_cache=True)
        kept, chosen = vr.kept_tokens(tiny.model), session_of(tiny.model).last().result.chosen
        one = tiny.model(**inputs, use_cache=True, logits_to_keep=1)
        assert last_alone(tiny.model) == bool(inputs["attention_mask"][:, -1].all())
        for a, b in zip(kept, vr.kept_tokens(tiny.model), strict=True):
            assert (a.name, a.layers) == (b.name, b.layers) and torch.equal(a.vision, b.vision)
        assert chosen.keys() == session_of(tiny.model).last().result.chosen.keys()
    torch.testing.assert_close(one.logits, whole.logits[:, -1:], **EXACT)
    for a, b in zip(one.past_key_values.attended, whole.past_key_values.attended, strict=True):
        torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), **EXACT)
        assert torch.equal(a.positions, b.positions)


@pytest.mark.slow
def test_a_call_whose_other_tokens_are_read_is_not_cut(llava):
    inputs = llava.inputs([Row(1, 3, 4)])
    with torch.no_grad(), vr.applied(llava.model, [Stride(0.5)]):
        for more in ({}, {"logits_to_keep": 2}, {"logits_to_keep": 1, "output_hidden_states": True}):
            llava.model(**inputs, **more)
            assert not last_alone(llava.model)
        llava.model(**inputs, logits_to_keep=1)
        assert last_alone(llava.model)
    with vr.applied(llava.model, [Stride(0.5)]):
        llava.model(**inputs, logits_to_keep=1)
        assert not last_alone(llava.model)


def test_what_is_left_of_a_plan():
    plan = Plan(4)
    assert for_last(plan, range(4)) is plan
    for entry in plan.layers[2:]:
        entry.run_on(Text).attend_to(All)
    made = for_last(plan, range(4))
    assert [entry.sets() for entry in made.layers] == [(All, All, All)] * 2 + [(Text, All, Text), (Last, All, Last)]
    assert [entry.sets() for entry in plan.layers[2:]] == [(Text, All, Text)] * 2
    assert for_last(plan, range(3)).layers[3].sets() == (Text, All, Text)
    plan.branch(Vision, 1, 4)
    assert plan.branches and not for_last(plan, range(4)).branches


def test_layers_that_share_keys_run_on_it_too():
    """With a plan for layers 1 and 2, which attend to the keys of layer 1, and 3 to its own."""
    plan = Plan(4, owners=(0, 1, 1, 1))
    for entry in plan.layers:
        entry.run_on(Text).attend_to(All)
    runs = [entry.sets()[0] for entry in for_last(plan, range(4)).layers]
    assert runs == [Text, Last, Last, Last]
    assert [entry.sets()[0] for entry in for_last(plan, [0, 2, 3]).layers] == [Text, Text, Last, Last]
    assert for_last(plan, [0, 1, 2]).layers[3].sets()[0] == Text


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[Row(0, 9, 3)], [Row(0, 9, 3), Row(0, 3, 2)], [Row(1, 3, 2), Row(2, 1, 4)]], ids=str)
def test_a_decoder_that_leaves_tokens_out_itself(rows):
    tiny = ZOO["gemma4"](layers=4)
    inputs, how = tiny.inputs(rows, side="left"), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected = tiny.model(**inputs, logits_to_keep=1).logits, tiny.model.generate(**inputs, **how)
        with vr.applied(tiny.model, [Stride(1.0)]):
            got = tiny.model(**inputs, logits_to_keep=1).logits, tiny.model.generate(**inputs, **how)
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(got[1], expected[1])


@pytest.mark.slow
def test_the_graph_runs_no_other_token_through_the_last_layers():
    tiny = ZOO["gemma4"](layers=4)
    program = vr.trace(tiny.model, tiny.inputs([Row(1, 3, 4)]) | {"logits_to_keep": 1})
    plain, cut = (rewritten(program, [Stride(0.5)], last=last).variants[0] for last in (False, True))
    linear = [[s for n, s in x.typed.items() if getattr(n.target, "__name__", "") == "linear"] for x in (plain, cut)]
    own = max(i for i, owner in enumerate(program.plan.owners) if i == owner)
    assert own < 3 and Last not in linear[0]
    assert sum(s == Last for s in linear[1]) >= 5 * (4 - own)
