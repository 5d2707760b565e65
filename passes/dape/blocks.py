"""Parameters of DAPE's trained blocks: the match between text and regions, and the detail of one stage."""

from __future__ import annotations

import torch
from torch import nn

from vlmrewrite.passes.dape.regions import SCALES

WIDTH = 64


class Matching(nn.Module):
    """Parameters of the match between text tokens and regions.

    ``query`` and ``key`` start as the same random projection, the rest at zero: about the training-free match.
    """

    NAMES = ("query", "key", "text", "bias", "scale", "slope", "visual")

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(WIDTH, hidden) * hidden**-0.5)
        self.key = nn.Parameter(self.query.detach().clone())
        self.text = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(1))
        self.scale, self.slope = nn.Parameter(torch.zeros(len(SCALES))), nn.Parameter(torch.zeros(len(SCALES)))
        self.visual = nn.Parameter(torch.zeros(1))


class Detail(nn.Module):
    """Parameters of one detail stage; ``gate`` starts at 0, which makes it do nothing."""

    NAMES = ("query", "key", "value", "out", "gate")

    def __init__(self, hidden: int) -> None:
        super().__init__()
        for name in self.NAMES[:3]:
            self.register_parameter(name, nn.Parameter(torch.randn(WIDTH, hidden) * hidden**-0.5))
        self.out = nn.Parameter(torch.randn(hidden, WIDTH) * WIDTH**-0.5)
        self.gate = nn.Parameter(torch.zeros(1))
