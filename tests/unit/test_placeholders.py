"""Placeholders and positions of prompts from which vision tokens are left out before the images are encoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlmrewrite.serving.placeholders import Layout, Span, original, resolved, rows_of, table_of, with_columns

IMAGE, MARK = 7, 8


def layouts() -> st.SearchStrategy[Layout]:
    """Images of one to three runs of placeholders, with and without text around and between them."""
    runs = st.lists(st.integers(1, 5), min_size=1, max_size=3)

    def made(runs: list[int], lead: int, tail: int, tile: int | None) -> Layout:
        content = [MARK] * lead
        for i, n in enumerate(runs):
            content += [MARK] * (i > 0) + [IMAGE] * n
        content += [MARK] * tail
        return Layout.of(content, torch.tensor(content) == IMAGE, tile)

    return st.builds(made, runs, st.integers(0, 2), st.integers(0, 2), st.none() | st.integers(1, 3))


@st.composite
def whole_prompts(draw: st.DrawFn) -> tuple[list[int], list[Any], list[Tensor]]:
    """Tokens of a prompt with fewer placeholders, its spans, and the features that are kept of each span."""
    tokens, spans, kept = [MARK] * draw(st.integers(0, 2)), list[Span](), list[Tensor]()
    for layout in draw(st.lists(layouts() | st.none(), max_size=3)):
        if layout is None:  # a video
            spans.append(Span(len(tokens), 3, torch.tensor([True, False, True]), None))
            kept.append(torch.empty(0, dtype=torch.int64))
            tokens += [9, MARK, 9]
        else:
            counts = [draw(st.integers(1, n)) for n in layout.lengths]
            short, mask = layout.shrunk(counts)
            spans.append(Span(len(tokens), len(short), mask, layout))
            indices, first = list[int](), 0
            for n, k in zip(layout.lengths, counts, strict=True):
                indices += sorted(first + i for i in draw(st.permutations(range(n)))[:k])
                first += n
            kept.append(torch.tensor(indices))
            tokens += short
        tokens += [MARK] * draw(st.integers(0, 2))
    return tokens or [MARK], spans, kept


def positions_of(tokens: list[int], axes: int) -> tuple[Tensor, int]:
    """Positions that differ by axis, as a rope of several axes has them: some tokens share one."""
    flat = torch.arange(len(tokens))
    return torch.stack([flat // (i + 1) for i in range(axes)]), len(tokens)


@given(prompt=whole_prompts(), axes=st.integers(1, 3), data=st.data())
def test_positions_are_those_of_the_whole_prompt(prompt: Any, axes: int, data: st.DataObject) -> None:
    """Whatever is encoded at a time, and done again after that."""
    tokens, spans, kept = prompt
    whole = original(tokens, spans)
    table = table_of(whole, *positions_of(whole.tokens, axes))
    assert table.shape == (rows_of(axes), len(tokens))
    expected, embeddings = torch.empty(axes, len(tokens), dtype=torch.int64), list[Tensor]()
    at = positions_of(whole.tokens, axes)[0]
    expected[:] = at[:, whole.places]
    for span, there, indices in zip(spans, whole.spans, kept, strict=True):
        if span.layout is None:
            embeddings.append(torch.zeros(2, 4))
            continue
        places = there.slots[indices]
        expected[:, span.slots] = at[:, places]
        relative = at[:, places] - at[:, there.slots[:1]]
        embeddings.append(with_columns(torch.randn(len(indices), 4).to(torch.bfloat16), relative))
    computed = 0
    for end in [*sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=2))), len(tokens), len(tokens)]:
        computed = 0 if computed == len(tokens) else computed
        chunk = []
        for span, rows in zip(spans, embeddings, strict=True):
            here = (span.slots >= computed) & (span.slots < end)
            if bool(here.any()):
                chunk.append(rows[here])
        clean, table, delta = resolved(table, chunk, computed)
        assert all(x.shape[1] == 4 for x in clean) and sum(map(len, clean)) == sum(map(len, chunk))
        assert len(tokens) + delta == len(whole.tokens)
        computed = end
    if spans:
        _, table, _ = resolved(table, embeddings, 0)
    assert torch.equal(table[:axes], expected)


@given(layout=layouts(), earlier=st.integers(0, 9))
def test_a_layout_travels_as_numbers(layout: Layout, earlier: int) -> None:
    assert Layout.from_tensor(layout.behind(earlier).to_tensor()) == layout.behind(earlier)
    tokens, mask = layout.shrunk(layout.lengths)
    assert tuple(tokens) == layout.content and torch.equal(mask, layout.mask)


def test_the_places_of_an_image() -> None:
    layout = Layout.of([MARK, IMAGE, IMAGE, MARK, IMAGE], torch.tensor([0, 1, 1, 0, 1]))
    assert (layout.starts, layout.lengths, layout.places.tolist()) == ([1, 4], [2, 1], [1, 2, 4])
    tokens, mask = layout.shrunk([1, 1])
    assert (tokens, mask.tolist()) == ([MARK, IMAGE, MARK, IMAGE], [False, True, False, True])
    assert Layout.of([IMAGE] * 3, None).pieces == ((0, 3),)
    assert Layout.of([IMAGE] * 6, None, 2).pieces == ((0, 2), (2, 2), (4, 2))
    assert Layout.of([IMAGE] * 5, None, 2).pieces == ((0, 5),), "what is no whole number of tiles has none"


def test_two_images_may_share_a_token_of_text() -> None:
    """As two line breaks, one behind an image and one in front of the next, become a token of two."""
    layout = Layout.of([MARK, IMAGE, IMAGE, MARK], torch.tensor([0, 1, 1, 0]))
    short, mask = layout.shrunk([1])
    spans = [Span(0, 3, mask, layout), Span(2, 3, mask, layout)]
    found = original([*short, *short[1:]], spans)
    assert found.tokens == [MARK, IMAGE, IMAGE, MARK, IMAGE, IMAGE, MARK]
    assert found.places.tolist() == [0, 1, 3, 4, 6] and [s.offset for s in found.spans] == [0, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_are_exact_in_all_dtypes(dtype: torch.dtype) -> None:
    relative = torch.tensor([[0, 127, 128, 16383, 16384, 2097151]])
    rows = with_columns(torch.zeros(6, 2, dtype=dtype), relative)
    layout = Layout.of([IMAGE] * 6, None)
    table = table_of(original([IMAGE] * 6, [Span(0, 6, None, layout)]), torch.arange(6)[None], 6)
    assert torch.equal(resolved(table, [rows], 0)[1][:1], relative)
    with pytest.raises(ValueError, match="^expected places of features from 0 to 2097151, got 0 to 2097152$"):
        with_columns(torch.zeros(2, 2), torch.tensor([[0, 2097152]]))


def test_what_does_not_fit() -> None:
    layout = Layout.of([IMAGE, MARK, IMAGE], torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="^expected to keep 1 to 1 of 1 tokens of an image, got 0$"):
        layout.shrunk([0, 1])
    with pytest.raises(ValueError, match="^expected a mask of the 2 tokens that an image becomes, got 3$"):
        Layout.of([1, 2], torch.ones(3))
    with pytest.raises(ValueError, match="^2 placeholders at 0 do not stand for an image of 2$"):
        original([IMAGE, IMAGE], [Span(0, 2, None, layout)])
    table = table_of(original([MARK, MARK], []), torch.arange(2)[None], 2)
    with pytest.raises(ValueError, match="^expected embeddings of at most 0 placeholders, got 1$"):
        resolved(table, [torch.zeros(1, 4)], 0)
