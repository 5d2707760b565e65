"""Token grids of images, their covers, and what DAPE's operators take."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from vlmrewrite.ops import selection
from vlmrewrite.passes.dape import regions


def spare(member, lengths):
    return [int((~part).sum()) for part in member.split(lengths.tolist())]


@st.composite
def covers(draw, most=11, images=3):
    """Grids, lengths, and a cover of all images."""
    grid = torch.tensor(
        draw(st.lists(st.tuples(st.integers(1, most), st.integers(1, most)), min_size=1, max_size=images))
    )
    lengths = grid.prod(1)
    base = regions.coarsest(lengths, grid, lengths.tolist())
    more = [draw(st.integers(0, n)) for n in spare(base, lengths)]
    priority = torch.rand(3, len(base), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return grid, lengths, base | regions.refined(base, lengths, grid, priority, more)


class Batch:
    """Two rows with images; a set of their vision tokens, and whatever the operators want."""

    def __init__(self, cover, device, dtype=torch.float32, channels=21, text=7, seed=0):
        torch.manual_seed(seed)
        self.grid, self.lengths, self.member = cover
        rows = sorted(torch.randint(0, 2, (len(self.grid),)).tolist())
        counts = [sum(n for n, r in zip(self.lengths.tolist(), rows, strict=True) if r == row) for row in range(2)]
        vision = torch.zeros(2, max(counts) + text, dtype=torch.bool)
        for row, n in enumerate(counts):
            vision[row, min(2, text) : min(2, text) + n] = True
        kept = selection.member(None, vision, self.member)
        index, valid = selection.token_index(kept, None, int(kept.sum(1).max()))
        self.index, self.valid, self.vision = index.to(device), valid.to(device), vision.to(device)
        self.prompt, self.flat = (~vision).to(device), vision.flatten().nonzero()[:, 0].to(device)
        self.member = self.member.to(device)

        def random(*shape):
            return torch.randn(*shape).to(device, dtype)

        self.stream, self.hidden = random(*vision.shape, channels), random(*index.shape, channels)
        self.features, self.attention = random(len(self.flat), channels), torch.rand(len(self.flat)).to(device)
        shapes = [(64, channels)] * 3 + [(channels, 64)]
        self.detail = [random(*shape) * shape[1] ** -0.5 for shape in shapes] + [random(1).fill_(0.7)]
        shapes = [*shapes[:2], (channels,), (1,), (3,), (3,), (1,)]
        self.matching = [torch.randn(*shape).to(device) * shape[-1] ** -0.5 for shape in shapes]

    def pool(self):
        return self.hidden, self.index, self.valid, self.stream, self.flat, self.lengths, self.grid

    def inject(self, share):
        found = (self.hidden, self.index, self.valid, self.attention, self.features, self.prompt, self.flat)
        return *found, self.lengths, self.grid, *self.detail, share

    def cover(self, keep, *weights):
        found = (self.features, self.stream, self.prompt, self.flat, self.grid, torch.ones_like(self.member))
        return *found, self.lengths, torch.tensor(keep), *weights
