"""Policies that are told how many tokens are left choose what they choose when they count them."""

from __future__ import annotations

import pytest
import torch

from vlmrewrite.ops import REFERENCES, counted

LENGTHS, KEEP = torch.tensor([9, 4, 12]), torch.tensor([3, 4, 5])


@pytest.mark.parametrize("name", ["stride_sample", "sts_sample", "divprune_sample", "top_attention"])
@pytest.mark.parametrize("seed", range(3))
def test_told_or_not(name, seed):
    op = getattr(torch.ops.vlm, name).default
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(int(LENGTHS.sum()), 6, generator=generator)
    member = torch.rand(len(features), generator=generator) < 0.8
    left = [int(x.sum()) for x in member.split(LENGTHS.tolist())]
    given = {"stride_sample": [], "top_attention": [features[:, 0]]}.get(name, [features])
    want = REFERENCES[op](*given, member, LENGTHS, KEEP)
    with counted(left):
        assert torch.equal(REFERENCES[op](*given, member, LENGTHS, KEEP), want)
    assert want.sum() == sum(min(n, k) for n, k in zip(left, KEEP.tolist(), strict=True))
