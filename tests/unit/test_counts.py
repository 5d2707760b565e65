"""Images, videos and frames of a call: how many tokens they have, and what is known of sets of them."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmrewrite.plan.budget import tokens_kept
from vlmrewrite.plan.call import Call
from vlmrewrite.plan.counts import PER, describe
from vlmrewrite.plan.tokens import All, Frame, Image, Images, Nothing, Text, Video, Videos, Vision, contains
from vlmrewrite.plan.vocabulary import Policy

SOME = Policy("some", print)


def videos():
    """An image of 3, a video of frames of 3 and 3, one of 2 and 2 with text between; a video of 5, two images of 2."""
    kinds = ["i i i t v v v v v v t w w t w w t".split(), "t t t v v v v v t i i t i i t t t".split()]
    of = torch.tensor([[x in "vw" for x in row] for row in kinds])
    return Call(
        torch.tensor([[x != "t" for x in row] for row in kinds]),
        None,
        [3, 2, 2],
        videos=of,
        video_lengths=[6, 4, 5],
        video_frames=[(3, 3), (2, 2), (2, 3)],
    )


FRAMES = videos()


def test_videos_are_counted():
    counts = FRAMES.counts
    assert counts.images == (3, 6, 4, 5, 2, 2)
    assert counts.videos == (False, True, True, True, False, False)
    assert counts.frames == ((3,), (3, 3), (2, 2), (2, 3), (2,), (2,))
    assert (counts.rows, counts.ordinals) == ((0, 0, 0, 1, 1, 1), (0, 0, 1, 0, 0, 1))
    assert counts.sizes("row") == (13, 9)
    assert FRAMES.frame.tolist() == [0] * 3 + [0] * 3 + [1] * 3 + [0, 0, 1, 1] + [0, 0, 1, 1, 1] + [0] * 4
    assert FRAMES.fact("ordinal", "frame").tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert describe(counts) == "2 rows of 17 tokens, 3 images, 3 videos, 22 vision tokens"


def test_grids_of_frames_and_of_videos():
    call = videos()
    call.grids = [(1, 3), (3, 1), (3, 1), (1, 2), (1, 2), (1, 2), (1, 3), (2, 1), (1, 2)]
    assert call.grid().tolist() == [list(x) for x in call.grids]
    assert call.fact("grid", "image").tolist() == [[1, 3], [6, 1], [2, 2], [2, 2], [2, 1], [1, 2]]


def test_features_and_tokens_of_videos_must_match():
    with pytest.raises(ValueError, match="video features and video tokens do not match: 15 video tokens, 4 features"):
        dataclasses.replace(FRAMES, video_lengths=[4])


def test_images_and_videos_are_the_vision_tokens():
    assert Images | Videos == Vision
    assert Vision - Images == Videos
    assert Images & Video(0) == Nothing
    assert contains(Videos, Frame(1))
    assert Frame(0) & Frame(1) == Nothing
    assert Text | Images | Videos == All


@st.composite
def selected(draw):
    """A set of vision tokens with selections of any grouping, and what each of these chose."""
    chosen = {}

    def base():
        return draw(st.sampled_from([Vision, Images, Videos, Image(0), Video(0), Video(1), Frame(0), Frame(1)]))

    def selection(source):
        per, keep = draw(st.sampled_from(PER)), draw(st.sampled_from([1, 2, 4, 0.5, 1.0]))
        s = source.select(SOME, keep, per=per)
        member = FRAMES.members(source, chosen)[FRAMES.vision]
        pieces = member.split(list(FRAMES.counts.sizes(per)))
        chosen[s] = torch.cat([p & (p.cumsum(0) <= tokens_kept(keep, len(p))) for p in pieces])
        return s

    s = base()
    for _ in range(draw(st.integers(0, 3))):
        other = selection(base()) if draw(st.booleans()) else base()
        s = draw(st.sampled_from([operator.or_, operator.and_, operator.sub]))(s, other)
        s = selection(s) if draw(st.booleans()) and s != Nothing else s
    return s, chosen


@given(selected())
def test_counts_of_frames_images_and_rows_are_upper_bounds_and_exact_where_they_say_so(drawn):
    s, chosen = drawn
    member = FRAMES.members(s, chosen)[FRAMES.vision]
    for per in PER:
        counted = [int(p.sum()) for p in member.split(list(FRAMES.counts.sizes(per)))]
        groups, exact = FRAMES.counts.per_group(s, per)
        assert all(n >= m for n, m in zip(groups, counted, strict=True))
        assert not exact or list(groups) == counted
    (rows, exact), counted = FRAMES.counts.per_row(s), FRAMES.members(s, chosen).sum(1).tolist()
    assert all(n >= m for n, m in zip(rows, counted, strict=True))
    assert not exact or list(rows) == counted


def test_what_is_chosen_of_sets_that_may_overlap_is_not_known_exactly():
    one, other = (Vision.select(Policy(name, print), 1, per="image") for name in ("one", "other"))
    for s in (one | other, (one | other).select(SOME, 2, per="image")):
        assert [FRAMES.counts.per_group(s, per)[1] for per in ("image", "row")] == [False, False]
