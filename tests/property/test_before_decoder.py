"""What is kept before the decoder, without a model, is what the rewritten model keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import batches, family, real
from vlmrewrite.hf import encode_images, encoded_images
from vlmrewrite.passes import STS, DivPrune, Random, Stride, VidCom2
from vlmrewrite.serving import BeforeDecoder
from vlmrewrite.testing import strategies

DEPTH = 4


def before_the_decoder():
    """1 or 2 passes that choose before the decoder; the second stage of one is left out."""
    keep, per = strategies.budgets(), st.sampled_from(["image", "row"])
    one = st.one_of(
        st.builds(Stride, keep=keep, per=per),
        st.builds(Random, keep=keep, seed=st.integers(0, 9), per=per),
        st.builds(DivPrune, keep=keep, per=per),
        st.builds(STS, keep=keep, refine=st.none() | keep, at=st.integers(0, DEPTH - 1), per=per),
        st.builds(VidCom2, keep=keep),
    )
    return st.lists(one, min_size=1, max_size=2)


@pytest.mark.parametrize("name", ["llava_next", "smolvlm"])
@given(rows=batches(), side=strategies.sides(), passes=before_the_decoder(), seed=st.integers(0, 99))
def test_it_keeps_what_the_rewritten_model_keeps(name, rows, side, passes, seed):
    """Images of several sizes, and images that text cuts into tiles; rows alone, as an engine asks for them."""
    tiny = family(name)
    inputs = tiny.inputs(rows, side=side, seed=seed)
    with torch.no_grad(), vr.applied(tiny.model, passes):
        tiny.model(**inputs)
        [*stages] = vr.kept_tokens(tiny.model)
    with torch.no_grad():
        encoded = encoded_images(encode_images(tiny.model, dict(inputs))["mm_encoder_outputs"]["image"])
    lengths = [n for n in next(iter(encoded.lengths.values())) if n]  # a row without images has an entry too
    features = encoded.features.flatten(0, -2).split(lengths)
    of_a_row, first = BeforeDecoder(passes, depth=DEPTH), 0
    tokens = inputs["input_ids"] == tiny.model.config.image_token_id
    for row, padding, kept in zip(tokens, real(inputs), stages[0].vision, strict=True):
        places, padded, last = row.nonzero()[:, 0], int(padding.int().argmax()), first
        while sum(lengths[first:last]) < len(places):
            last += 1
        at = [x - padded for x in places.split(lengths[first:last])]
        found = of_a_row.choose(features[first:last], places=at)
        assert torch.cat([x.positions for x in found] or [places]).tolist() == (kept.nonzero()[:, 0] - padded).tolist()
        first = last
    assert first == len(lengths)


@given(
    sizes=st.lists(st.integers(0, 40), max_size=4),
    gaps=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    passes=before_the_decoder(),
)
def test_what_is_announced_is_what_is_kept(sizes, gaps, passes):
    engine = BeforeDecoder(passes, depth=DEPTH)
    features = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in sizes]
    places = [sum(sizes[:i]) + sum(gaps[: i + 1]) for i in range(len(sizes))]
    found = engine.choose(features, places=places)
    exact = len([n for n in sizes if n]) < 2 or not any(getattr(p, "per", "") == "row" for p in passes)
    if exact:
        assert engine.counts(sizes, places) == [len(x.indices) for x in found]
    for n, start, one in zip(sizes, places, found, strict=True):
        assert one.indices.tolist() == sorted(set(one.indices.tolist()) & set(range(n)))
        assert (one.positions - one.indices == start).all()
    if engine.by_image:
        alone = [engine.choose([x])[0].indices.tolist() for x in features]
        assert alone == [x.indices.tolist() for x in found]
    assert (
        torch.equal(*(x[0].indices for x in (engine.choose([features[0]]), engine.choose(features[0][None]))))
        if (features)
        else engine.choose([]) == []
    )
