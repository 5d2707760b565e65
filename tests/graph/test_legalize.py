"""The rewritten graph: what is in it, what is not, and what cannot be rewritten."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import vlmrewrite as vr
from vlmrewrite.analysis import tokenwise
from vlmrewrite.analysis.graph import value
from vlmrewrite.lower.lowering import lower
from vlmrewrite.passes import STS, VISOR, Random, Stride
from vlmrewrite.plan import Edit, Plan, frozen_pass
from vlmrewrite.plan.tokens import All, Text, Vision
from vlmrewrite.rewrite.legalize import legalize
from vlmrewrite.rewrite.verifier import check_sets, propagate_fakes
from vlmrewrite.testing.agreement import generation_agreement
from vlmrewrite.testing.models import Row

VLM = torch.ops.vlm


@pytest.fixture(scope="module")
def program(llava):
    return vr.trace(llava.model, llava.inputs([Row(1), Row(2)], seed=1))


def targets(program):
    return Counter(n.target for n in program.graph_module.graph.nodes)


def test_the_old_program_is_untouched(program):
    before = str(program.graph_module.graph), str(program)
    vr.rewrite(program, [STS(keep=3, refine=2)])
    assert (str(program.graph_module.graph), str(program)) == before


def test_one_gather_per_set_and_side_table(program):
    rewritten = vr.rewrite(program, [Stride(keep=3), Random(keep=2, at=2)])
    gathered = Counter()
    for n in rewritten.graph_module.graph.nodes:
        if n.target is VLM.select.default:
            gathered[n.args[0].name, n.args[1].name] += 1
    assert max(gathered.values()) == 1
    tables = [name for name, _ in gathered if name.startswith(("cos", "sin"))]
    assert len(tables) == 4  # two sets, cos and sin


def test_no_restore_is_selected_from_again(program):
    for passes in ([Stride(keep=3), Random(keep=2, at=1), Stride(keep=1, at=3)], [STS(keep=4, refine=2, at=1)]):
        for n in vr.rewrite(program, passes).graph_module.graph.nodes:
            if n.target is VLM.select.default:
                assert n.args[0].target is not VLM.restore.default


def test_nothing_dead_is_left(program):
    rewritten = vr.rewrite(program, [Stride(keep=3)])
    for n in rewritten.graph_module.graph.nodes:
        assert n.users or n.op in ("placeholder", "output"), n.name
    assert targets(rewritten)[VLM.attention.default] == targets(program)[VLM.attention.default] == 4


def test_layers_before_the_first_cut_are_the_captured_ones(program):
    rewritten = vr.rewrite(program, [Stride(keep=3, at=3)])
    kept = [n for n in rewritten.graph_module.graph.nodes if n.target is VLM.attention.default]
    assert [n.args[4] is None for n in kept] == [True, True, True, False]


def test_no_op_of_a_layer_on_text_sees_full_length(program):
    plan = program.plan.copy()
    for layer in plan.layers:
        layer.run_on(Text)
    rewritten = legalize(program.captured, program.anatomy, plan)
    assert sum(tokens == Text for tokens in rewritten.typed.values()) > 100
    for node, tokens in rewritten.typed.items():
        if tokens == Text and node.target not in (VLM.select.default, VLM.attention.default):
            for source in node.all_input_nodes:
                assert source in rewritten.typed or not _full(source, program.anatomy.length), node.name


def _full(node, length):
    x = value(node)
    return isinstance(x, torch.Tensor) and any(str(n) == str(length) for n in x.shape)


def test_a_cross_layer_reads_vision_and_updates_text(program):
    plan = program.plan.copy()
    plan.layer(1).run_on(Text).attend_to(All)
    rewritten = legalize(program.captured, program.anatomy, plan)
    call = program.call
    out, _ = lower(rewritten.graph_module).graph_module(*program.inputs, *(call.fill(e) for e in rewritten.extras))
    assert any(isinstance(x, torch.Tensor) for x in out)


def test_the_rewritten_graph_runs_as_it_is(program):
    rewritten = vr.rewrite(program, [STS(keep=3, refine=2, at=2)])
    raw, chosen = rewritten.run()
    lowered, again = lower(rewritten.graph_module).graph_module(*rewritten.arguments(rewritten.inputs, rewritten.call))
    assert [int(c.sum()) for c in chosen] == [9, 6]
    assert all(torch.equal(a, b) for a, b in zip(chosen, again, strict=True))
    for a, b in zip(raw, lowered, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b)


def test_listing(program):
    text = str(vr.rewrite(program, [Stride(keep=3, at=2)]))
    assert text.splitlines()[0].startswith("program: 4 decoder layers, hidden 32, float32; 2 rows of")
    assert "stride = Vision.select(stride, keep=3) at layer 2" in text
    assert "Text | stride" in text


def test_programs_compose(program):
    once = vr.rewrite(vr.rewrite(program, [Stride(keep=5)]), [Random(keep=2, at=2)])
    assert str(once.plan) == str(vr.rewrite(program, [Stride(keep=5), Random(keep=2, at=2)]).plan)
    assert [o.name for o in once.outcomes] == ["stride", "random"]


def test_an_error_in_a_pass_names_it(program):
    class Broken:
        name = "broken"

        def refuse(self, plan):
            return None

        def change(self, plan):
            raise KeyError("inside")

        def __repr__(self):
            return "Broken()"

    with pytest.raises(KeyError, match="inside") as caught:
        vr.rewrite(program, [Broken()])
    assert "in pass Broken(), on the plan:\nlayers 0-3" in caught.value.__notes__[0]


@frozen_pass
class TwoEdits:
    name: ClassVar[str] = "two edits"

    def refuse(self, plan: Plan) -> str | None:
        return None

    def change(self, plan: Plan) -> None:
        plan.edit(Edit("doubled", Vision, lambda hidden, index, valid: 2 * hidden, 1))
        plan.edit(Edit("raised", Vision, lambda hidden, index, valid: hidden + 1, 1))


def test_edits_of_one_layer_are_done_in_order(llava):
    assert vr.verify(llava.model, llava.inputs([Row(1), Row(2)], seed=1), [TwoEdits()]) < 1e-4


def test_what_tokens_had_become_is_kept_when_they_bypass(llava):
    """Layer 2 reads what layer 0 made of the vision tokens that are left, and layer 1 ran on none of."""
    passes = [Stride(keep=4), VISOR(self_layers=[0], cross_layers=[2])]
    assert vr.verify(llava.model, llava.inputs([Row(1), Row(2)], seed=1), passes) < 1e-4


@pytest.mark.slow
def test_empty_slots_of_a_cache_are_not_seen_without_padding_either(llava):
    """Two rows of one length, of which one keeps fewer tokens: no mask says so, only the positions in the cache."""
    one = llava.inputs([Row(1, 1, 0)])["input_ids"].shape[1] - 1  # tokens of an image
    inputs = llava.inputs([Row(2, 1, 2), Row(1, 1, 3 + one)], seed=1, side="left")
    assert inputs["attention_mask"].all()
    generation_agreement(llava.model, inputs, [Stride(keep=2)], 3).check()
    with torch.no_grad(), vr.applied(llava.model, [Stride(keep=2)]) as model:
        cache = model(**inputs).past_key_values
    assert cache.layers[1].holes
    assert (cache.layers[1].positions < 0).any(1).tolist() == [True, False]


def test_what_mixes_tokens_is_refused(program):
    length = program.anatomy.length
    layer = program.anatomy.layers[0]
    graph = program.captured.graph
    for make, reason in (
        (lambda: graph.call_function(torch.cumsum, (layer.entry, 1)), "not known to treat tokens alike"),
        (lambda: graph.call_method("mean", (layer.entry, 1)), "works along the token axis"),
        (lambda: graph.call_method("softmax", (layer.entry,), {"dim": -2}), "works along the token axis"),
        (lambda: graph.call_function(operator.getitem, (layer.entry, (slice(None), slice(1, None)))), "a part of"),
        (lambda: graph.call_function(torch.matmul, (layer.entry, layer.entry)), "multiplies two activations"),
        (lambda: graph.call_method("add_", (layer.entry, 1)), "writes in place"),
    ):
        with graph.inserting_after(layer.entry):
            node = make()
        try:
            assert reason in tokenwise.not_token_wise(node, length)
        finally:
            graph.erase_node(node)
    for node in layer.region - {layer.entry}:
        if node.target not in (VLM.attention.default, VLM.kv_append.default):
            assert tokenwise.not_token_wise(node, length) is None


def test_a_node_that_mixes_token_sets_is_found(program):
    made = vr.rewrite(program, [STS(keep=3, refine=2, at=2)]).variants[0]
    check_sets(program.anatomy, made)
    for node in made.graph_module.graph.find_nodes(op="call_method", target="transpose"):
        (source,) = node.all_input_nodes
        other = next(s for s in made.typed.values() if s not in (All, made.typed[node]))
        mixed = replace(made, typed=made.typed | {node: other})
        with pytest.raises(ValueError, match=f"node {node.name} .* but reads {source.name}, which is on "):
            check_sets(program.anatomy, mixed)


def test_every_node_holds_as_many_tokens_as_its_set(program):
    rewritten = vr.rewrite(program, [STS(keep=3, refine=2, at=2)])
    rewritten.propagate()
    counts = rewritten.call.counts
    more = replace(counts, text=tuple(n + 1 for n in counts.text)).size
    arguments = rewritten.arguments(program.inputs, program.call)
    with pytest.raises(ValueError, match=r"node .* has shape .*, not \d+ tokens at axis 1"):
        propagate_fakes(program.anatomy, rewritten.variants[0], arguments, more)
