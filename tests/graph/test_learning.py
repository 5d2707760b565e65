"""What a recipe trains, and a router that learns in calls with labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vlmrewrite as vr
from tests.small import CHAIN, family
from vlmrewrite.passes import DPVR, VISOR, Stride
from vlmrewrite.passes.visor.dispatch import Routed
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.saving import sharing
from vlmrewrite.testing.models import Row
from vlmrewrite.training import answer_loss, following, prompt_ends, routing

TINY = family("llava")
ROUTER = VISOR(policy="router", chain=CHAIN)


def batch():
    inputs = TINY.inputs([Row(1, 2, 3), Row(2, 1, 3)])
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return inputs, labels


def test_the_blocks_of_a_recipe():
    model = TINY.model
    with pytest.raises(ValueError, match="is not rewritten"):
        vr.trainable_blocks(model)
    with vr.applied(model, [Stride(0.5)]), pytest.raises(ValueError, match=r"has no blocks: none of Stride\(.*nothing"):
        vr.trainable_blocks(model)
    with vr.applied(model, [DPVR(at=2), ROUTER]):
        blocks = vr.trainable_blocks(model)
        assert list(blocks) == ["dpvr", "visor_router"]
        learning = {n for n, p in model.named_parameters() if p.requires_grad}
        assert learning == {f"{ATTRIBUTE}.{n}" for n, _ in blocks.named_parameters()}
        blocks["dpvr"].requires_grad_(False)
        vr.trainable_blocks(model)
        assert not any(p.requires_grad for p in blocks["dpvr"].parameters()), "what was frozen stays so"


def test_others_that_learn_are_named():
    model = TINY.model
    with vr.applied(model, [DPVR(at=2)]):
        next(model.parameters()).requires_grad_(True)
        try:
            with pytest.warns(UserWarning, match=r"^\S+ of this Llava\w+ ask for a gradient too, and are no blocks"):
                blocks = vr.trainable_blocks(model)
            assert all(p is not next(model.parameters()) for p in blocks.parameters())
        finally:
            next(model.parameters()).requires_grad_(False)


def test_a_router_takes_what_is_enough():
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.95, 0.04, 0.01]]).log()
    images = torch.ones(3, dtype=torch.bool)
    for enough, expected in (
        (None, [0, 2, 0]),
        (0.5, [0, 2, 0]),
        (0.8, [1, 2, 0]),
        (0.98, [2, 2, 1]),
        (1.0, [2, 2, 2]),
    ):
        chooser = Routed(0, weights=("router.inner",), enough=enough)
        assert chooser.first(scores, images, 3).tolist() == expected
    assert [str(Routed(0, weights=("a.b",), enough=x)) for x in (None, 0.9)] == ["a", "a(enough=0.9)"]


def test_a_recipe_of_one_plan_has_none_to_follow():
    with (
        vr.applied(TINY.model, [Stride(0.5)]),
        pytest.raises(ValueError, match="has one plan: there is none to choose"),
    ):
        following(TINY.model, 0)


@pytest.mark.slow
@torch.no_grad()
def test_the_unmodified_model_beside_a_rewritten_one():
    model, (inputs, _) = TINY.model, batch()
    expected = model(**inputs).logits
    with vr.applied(model, [DPVR(at=0, fuse=0, branch="random")]):
        other = model(**inputs).logits
        assert torch.equal(sharing(model)(**inputs).logits, expected)
        assert not torch.equal(other, expected)
        assert torch.equal(model(**inputs).logits, other)


def test_blocks_are_loaded_whatever_is_enough(tmp_path):
    model, other = TINY.model, VISOR(policy="router", chain=CHAIN, enough=0.5)
    assert "enough=0.5" in repr(other)
    with vr.applied(model, [ROUTER]):
        vr.save_blocks(model, tmp_path)
    with vr.applied(model, [other]):
        vr.load_blocks(model, tmp_path)
    with (
        vr.applied(model, [VISOR(policy="router", chain=CHAIN[:2])]),
        pytest.raises(ValueError, match="these blocks belong to the passes"),
    ):
        vr.load_blocks(model, tmp_path)


@pytest.fixture(scope="module")
def routed():
    """A router that learnt for some steps by the model's own loss, and the losses."""
    model, (inputs, labels) = TINY.model, batch()
    torch.manual_seed(0)
    with vr.applied(model, [ROUTER]):
        blocks, losses = vr.trainable_blocks(model), []
        optimizer = torch.optim.AdamW(blocks.parameters(), lr=0.05)
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        yield model, inputs, labels, losses


@pytest.mark.slow
def test_the_loop_of_the_documentation_trains_a_router(routed):
    model, inputs, labels, losses = routed
    right = []
    with torch.no_grad():
        for i in range(3):
            with following(model, i):
                out = model(**inputs, labels=labels)
            right.append((out.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum(1))
    wanted = torch.stack(right, 1)
    cheapest = [row.index(max(row)) for row in wanted.tolist()]
    out = model(**inputs, labels=labels)
    scores = routing(model)
    torch.testing.assert_close(
        out.loss, answer_loss(out.logits, labels) + F.cross_entropy(scores, torch.tensor(cheapest))
    )
    assert scores.argmax(-1).tolist() == cheapest
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_router_adds_nothing_where_it_does_not_learn(routed):
    model, inputs, labels, _ = routed
    calls = model(**inputs), model(**inputs, labels=torch.full_like(labels, -100))
    assert calls[0].loss is None and not calls[1].loss.requires_grad
    with torch.no_grad():
        out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, answer_loss(out.logits, labels))
    blocks = vr.trainable_blocks(model).requires_grad_(False)
    try:
        assert not model(**inputs, labels=labels).loss.requires_grad
    finally:
        blocks.requires_grad_(True)


@pytest.mark.slow
@torch.no_grad()
def test_all_rows_follow_the_plan_that_is_asked_for(routed):
    model, inputs, _, _ = routed
    ends = inputs["attention_mask"].long().cumsum(1).argmax(1) - 1
    for i in (0, 1):
        with following(model, i), prompt_ends(model, ends):
            found = model(**inputs).logits
            made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        session = vr.runtime.session_of(model)
        assert {session.last().executable.program.plan.variants.index(p) for p in session.last().plans} == {i}
        with following(model, i):
            again = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(made, again)
        assert torch.isfinite(found).all()
    for wrong in (3, -1, True, "0"):
        with pytest.raises(ValueError, match=r"expected an int in 0 \.\. 2"):
            following(model, wrong)


def test_a_call_without_images_has_the_models_loss_alone(routed):
    model, inputs, labels, _ = routed
    text = torch.randint(3, 20, (2, 7))
    for _ in range(2):  # with the call of images before, and with one that was as long
        loss = model(input_ids=text, labels=text).loss
        torch.testing.assert_close(loss, answer_loss(model(input_ids=text).logits, text))
        assert model(**inputs, labels=labels).loss > 0


@pytest.mark.slow
def test_the_router_learns_as_much_from_batches_that_are_accumulated(routed):
    model, inputs, labels, _ = routed
    out = model(**inputs, labels=labels)
    of = 2 * int((labels[:, 1:] != -100).sum())
    half = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(of)).loss
    torch.testing.assert_close(half, out.loss / 2)
