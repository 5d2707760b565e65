"""Attention by kernels is that of the dialect, whatever hides keys: what lowering and decode steps put in its place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmrewrite import ops
from vlmrewrite.capture import hooks
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.ops import positional


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def calls(draw):
    """q, k, v, mask, q_pos, k_pos, plain."""
    batch, n = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 5, 20]))
    m = n + draw(st.integers(0, 40))
    seed, span = draw(st.integers(0, 99)), m + draw(st.integers(0, 5))
    at = [
        torch.randperm(span, generator=torch.Generator().manual_seed(seed + b))[:m].sort().values for b in range(batch)
    ]
    k_pos = torch.stack(at)
    kind, mask = draw(st.sampled_from(["none", "bits", "full", "window", "additive"])), None
    if kind == "bits":
        mask = randn(batch, span, seed=seed) > -1
    elif kind in ("full", "additive"):
        mask = randn(draw(st.sampled_from([1, batch])), 1, draw(st.sampled_from([n, span])), span, seed=seed) > 0
    elif kind == "window":
        near = torch.arange(span)[:, None] - torch.arange(span)
        mask = ((near >= 0) & (near < draw(st.integers(1, span)))).expand(batch, 1, -1, -1)
    q_pos = k_pos[:, m - n :].clone()
    if draw(st.booleans()):
        k_pos[randn(batch, m, seed=seed + 1) > 1] = -1
        q_pos[randn(batch, n, seed=seed + 2) > 1] = -1
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    q, k, v = (randn(batch, h, x, 16, seed=seed + i) for i, (h, x) in enumerate([(4, n), (2, m), (2, m)]))
    return q, k, v, mask, q_pos, k_pos


@given(calls(), st.sampled_from([None, 3.0]))
def test_it_is_attention_of_the_dialect(device, drawn, softcap):
    q, k, v, mask, q_pos, k_pos = (x if x is None else x.to(device) for x in drawn)
    seen = ops.visible(mask, q_pos, k_pos, False)
    expected = ops.attend(q, k, v, seen, None, softcap, 0.0)
    got = positional.kernel_attention(q, k, v, positional.kernel_mask(mask, q_pos, k_pos, False), None, softcap)
    shown = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    asked = (q_pos >= 0) & shown[:, 0].any(2)
    torch.testing.assert_close(got[asked], expected[asked], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("n", "kind", "few"), [(1, "full", True), (2, "full", False), (2, "bits", True)])
def test_a_full_mask_of_one_query_is_decoded(n, kind, few):
    at = torch.arange(9)[None]
    mask = torch.ones(1, 9) if kind == "bits" else torch.ones(1, 1, 9, 9, dtype=torch.bool)
    seen = positional.kernel_mask(mask, at[:, -n:], at, False)
    assert (seen.blocks is None) == few


def test_what_a_full_mask_hides_is_not_read(device):
    at = torch.arange(300, device=device)[None]
    q, k = randn(1, 4, 1, 16).to(device), randn(1, 2, 300, 16, seed=1).to(device)
    mask = (at > 200)[:, None, None].expand(-1, -1, 300, -1)
    seen = positional.kernel_mask(mask, at[:, -1:], at, False)
    expected = positional.kernel_attention(q, k, k, seen, None, None)
    k[:, :, :200] = float("nan")
    assert torch.equal(positional.kernel_attention(q, k, k, seen, None, None), expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_plain_decoding_is_pytorch_s_unless_it_has_a_softcap(monkeypatch, device, softcap):
    few, launched = positional.FEW, []
    monkeypatch.setattr(positional, "FEW", lambda *args: launched.append(args) or few(*args))
    cache, module = PositionCache(), SimpleNamespace(layer_idx=0)
    k, v, q = (randn(1, h, n, 16, seed=i).to(device) for i, (h, n) in enumerate([(2, 5), (2, 5), (4, 1)]))
    with torch.no_grad():
        for part in (slice(0, 4), slice(4, 5)):
            with hooks.running(cache, "triton"):
                keys, values = cache.update(k[:, :, part], v[:, :, part], 0)
                got, _ = hooks.attention_forward(module, q, keys, values, None, softcap=softcap)
    torch.testing.assert_close(got, ops.attend(q, k, v, None, None, softcap, 0.0), atol=1e-5, rtol=1e-5)
    assert bool(launched) == (softcap is not None)
