"""The dialect's operators: their contract, and their meaning against brute force."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import vlmrewrite as vr
from vlmrewrite import ops
from vlmrewrite.ops import library
from vlmrewrite.plan.tokens import Text, Vision
from vlmrewrite.plan.vocabulary import Policy
from vlmrewrite.testing.models import FAMILIES, Row
from vlmrewrite.testing.strategies import Sets

VLM = torch.ops.vlm
LENGTHS, KEEP = torch.tensor([5, 0, 4]), torch.tensor([2, 0, 4])
MEMBER = torch.tensor([True, True, False, True, True, True, True, True, True])


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


INDEX = torch.tensor([[0, 2, 3], [1, 2, 4]])
VALID = torch.tensor([[True, True, False], [True, True, True]])
AT5 = torch.arange(5).expand(2, -1)
SAMPLES = {
    "attention": (randn(2, 4, 5, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8)),
    "attention with padding": (
        randn(2, 4, 3, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8), torch.ones(2, 5, dtype=torch.bool),
        AT5[:, 2:].clone(), AT5.clone(), 0.3, False,
    ),
    "kv_append": (None, None, None, randn(2, 2, 3, 8), randn(2, 2, 3, 8), INDEX),
    "kv_append to some": (*[randn(2, 2, 5, 8)] * 2, AT5.clone(), *[randn(2, 2, 3, 8)] * 2, INDEX),
    "token_index": (torch.tensor([[True, False, True], [True, True, True]]), None, 3),
    "select": (randn(1, 5, 8), INDEX),
    "gather": ([randn(2, 5, 8), AT5.clone()], [1, 1], INDEX),
    "restore": (randn(2, 5, 8), randn(2, 3, 8), INDEX, VALID),
    "relative_index": (AT5.clone(), INDEX),
    "positions": (INDEX, VALID, 4),
    "member": (torch.zeros(2, 3, dtype=torch.bool), torch.eye(3, dtype=torch.bool)[:2], torch.tensor([True, False])),
    "checked": (MEMBER, MEMBER, LENGTHS, torch.tensor([4, 0, 4]), "some"),
    "attention_received": (
        randn(2, 4, 1, 8), randn(2, 2, 3, 8), torch.ones(2, 5, dtype=torch.bool), torch.tensor([[4], [4]]), INDEX,
        None, None, INDEX, VALID, torch.tensor([2, 6, 7]), 5,
    ),
    "attention_received with a past": (
        randn(2, 4, 1, 8), randn(2, 2, 5, 8), torch.ones(2, 1, 5, 7).tril(2).bool(), torch.tensor([[6], [6]]),
        torch.cat([AT5[:, :2], INDEX + 2], 1), 0.3, 5.0, INDEX, VALID, torch.tensor([2, 6, 7]), 5,
    ),
    "sts_sample": (randn(9, 6), MEMBER, LENGTHS, KEEP),
    "top_attention": (randn(9), MEMBER, LENGTHS, KEEP),
    "stride_sample": (MEMBER, LENGTHS, KEEP),
    "random_sample": (torch.tensor([0, 1, 0]), MEMBER, LENGTHS, KEEP, 3),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    op = getattr(VLM, name.split()[0]).default
    torch.library.opcheck(op, SAMPLES[name])
    got, expected = op(*SAMPLES[name]), library.REFERENCES[op](*SAMPLES[name])
    for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected)), strict=True):
        assert torch.equal(a, b)


CORE = {f"vlmrewrite.ops.{name}" for name in ("attention", "scoring", "selection")}


def test_every_operator_of_the_core_has_a_sample():
    core = {op.name() for op, f in library.REFERENCES.items() if f.__module__ in CORE}
    assert core <= {f"vlm::{name.split()[0]}" for name in SAMPLES}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("rows", [[Row(2, 1, 3)], [Row(1, 12, 8), Row(2, 0, 3), Row(1, 3, 6)]], ids=["one", "padded"])
def test_attention_received_is_what_transformers_returns(name, rows):
    """In every layer; those of Gemma 3 in turn with a sliding window and full."""
    tiny = FAMILIES[name]()
    inputs, told = tiny.inputs(rows, side="left"), []
    eager = copy.deepcopy(tiny.model)
    eager.set_attn_implementation("eager")

    def everything(weights, member, lengths, keep):
        told.append(weights)
        return member

    def kept(layer):
        return Text | Vision.select(Policy(f"told{layer}", everything, ("attention",)), 99, at=layer)

    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
        with vr.applied(tiny.model, Sets(tuple((kept(layer), None, None) for layer in range(4)))):
            tiny.model(**inputs)
    vision, outside = inputs["input_ids"] == tiny.image_token_id, []
    for got, weights in zip(told, attentions, strict=True):
        expected = weights[:, :, -1].mean(1)[vision]
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
        assert torch.equal(got == 0, expected == 0)
        outside.append(bool((got == 0).any()))
    assert outside == [name == "gemma3", False] * 2


@given(st.integers(1, 3), st.integers(1, 9), st.data())
def test_an_index_holds_the_members_then_padding_then_others(batch, length, data):
    def draw():
        bits = data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
        return torch.tensor(bits).view(batch, length)

    member, padding = draw(), draw()
    member &= padding
    n = data.draw(st.integers(max(1, int(member.sum(1).max())), length))
    index, valid = ops.token_index(member, padding, n)
    assert index.shape == valid.shape == (batch, n)
    for row in range(batch):
        found = index[row].tolist()
        assert found == sorted(set(found))
        assert set(member[row].nonzero()[:, 0].tolist()) == set(index[row][valid[row]].tolist())
        fillers = index[row][~valid[row]]
        if bool(padding[row][fillers].any()):
            assert set((~padding[row]).nonzero()[:, 0].tolist()) <= set(found)


@given(st.integers(1, 3), st.integers(2, 8), st.integers(0, 3), st.data())
def test_visibility_follows_logical_positions(batch, length, past, data):
    q = torch.arange(past, past + length).expand(batch, -1)
    k = torch.tensor(
        data.draw(st.lists(st.integers(-1, past + length - 1), min_size=batch * length, max_size=batch * length))
    ).view(batch, length)
    bits = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=batch * (past + length), max_size=batch * (past + length)))
    ).view(batch, -1)
    seen = ops.visible(bits, q, k, False)
    full = ops.visible((torch.ones(length, past + length).tril(past).bool() & bits[:, None, :])[:, None], q, k, False)
    assert torch.equal(seen, full)
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                at = int(k[b, j])
                assert bool(seen[b, 0, i, j]) == (at >= 0 and at <= past + i and bool(bits[b, at]))


def test_empty_slots_of_a_set_are_nowhere():
    full, part = torch.zeros(2, 5, 1), torch.arange(1.0, 7.0).view(2, 3, 1)
    new = VLM.restore.default(full, part, INDEX, VALID)[..., 0]
    assert new.tolist() == [[1, 0, 2, 0, 0], [0, 4, 5, 0, 6]]  # at 3 of the first row, what fills the set up
    assert VLM.positions.default(INDEX, VALID, 4).tolist() == [[4, 6, -1], [5, 6, 8]]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("heads", [2, 4])
def test_plain_attention_is_masked_attention(heads, softcap):
    q, k, v = randn(2, 4, 5, 8), randn(2, heads, 7, 8), randn(2, heads, 7, 8)
    at = torch.arange(7).expand(2, -1)
    plain = ops.attention(q, k, v, softcap=softcap)
    masked = ops.attention(q, k, v, None, at[:, 2:], at, None, False, softcap)
    torch.testing.assert_close(plain, masked)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made while it is entered."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = [x for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in made)])
        return out


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("n", [1, 5])
def test_keys_of_several_heads_are_not_copied_for_each(n, seen, softcap):
    q, k, v = (randn(2, h, m, 64).double() for h, m in ((8, n), (2, 50), (2, 50)))
    mask = randn(2, 1, n, 50) > 0 if seen else None
    with Largest() as made:
        got = ops.attend(q, k, v, mask, 0.3, softcap, 0.0)
    assert made.numel <= k.numel()
    scores = q @ k.repeat_interleave(4, 1).mT * 0.3
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    shown = torch.ones(n, 50, dtype=torch.bool).tril(50 - n) if mask is None else mask
    weights = scores.masked_fill(~shown, -torch.inf).softmax(-1, dtype=torch.float32 if softcap else None).double()
    torch.testing.assert_close(got, (weights @ v.repeat_interleave(4, 1)).transpose(1, 2), atol=1e-12, rtol=1e-12)


def test_a_query_that_sees_nothing_gives_zeros():
    q = k = v = randn(1, 2, 3, 8)
    bits = torch.tensor([[False, False, True]])
    out = ops.attention(q, k, v, bits, None, None, None, False)
    assert not out[:, :2].any()
    assert out[:, 2].any()


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        VLM.attention.default(*SAMPLES["attention"])
    assert counter.get_total_flops() == 2 * 2 * 4 * 5 * 5 * (8 + 8)
