"""Reads attention and hidden states off a captured graph while it runs, without hooks in the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from vlmrewrite.ops import visible
from vlmrewrite.rewrite import Program

_CHUNK = 128
"""Queries whose attention weights are in memory at a time: [H, 128, T] in fp32."""


@dataclass(frozen=True)
class Observed:
    """What the layers did with the tokens of rows that hold an image.

    Attributes:
        sums: of ``"attention_mass"`` (see :func:`attention_mass`), ``"vision_cosine"`` and ``"text_cosine"`` (between
            hidden states before and after the layer): one value a layer, summed over tokens. A recurrent
            layer has no mass: 0.
        tokens: how many tokens each of them is summed over.
    """

    sums: dict[str, list[float]]
    tokens: dict[str, int]


def observe(program: Program) -> tuple[Any, Observed]:
    """Run the captured graph of a program on the inputs it was captured from.

    Returns:
        the captured outputs, and what was seen.

    Raises:
        ValueError: the program has no inputs of its own, or its call is not known.
    """
    if program.call is None or not program.inputs:
        raise ValueError("expected a program with inputs of its own and a Call that describes them")
    observer = _Observer(program)
    outputs = observer.run(*program.inputs)
    return outputs, Observed(observer.sums, {name: int(x.sum()) for name, x in observer.members.items()})


class _Observer(torch.fx.Interpreter):
    def __init__(self, program: Program) -> None:
        super().__init__(program.captured)
        assert program.call is not None
        vision, text, layers = program.call.vision, program.call.text, program.anatomy.layers
        self.members = {
            "attention_mass": text & (vision.cumsum(1) > 0),
            "vision_cosine": vision,
            "text_cosine": text & vision.any(1, keepdim=True),
        }
        self.sums = {name: [0.0] * len(layers) for name in self.members}
        self._attentions = {layer.attention: layer.index for layer in layers if layer.kind == "attention"}
        self._entry, self._exits = layers[0].entry, {layer.exit: layer.index for layer in layers}
        self._before: Tensor | None = None

    def run_node(self, n: torch.fx.Node) -> Any:
        """One node; a layer's input is copied, for a residual add may be in place."""
        out = super().run_node(n)
        if n in self._attentions:
            q, k, _, mask, _, _, scale, _, softcap, *_ = self.fetch_args_kwargs_from_env(n)[0]
            queries, vision = self.members["attention_mass"], self.members["vision_cosine"]
            mass = attention_mass(q, k, mask, scale, softcap, queries, vision)
            self.sums["attention_mass"][self._attentions[n]] = mass
        if n in self._exits:
            assert self._before is not None
            for name in ("vision_cosine", "text_cosine"):
                before, after = (x[self.members[name]].float() for x in (self._before, out))
                cosine = F.cosine_similarity(before, after, dim=-1)
                self.sums[name][self._exits[n]] = float(cosine.double().sum())
        if n is self._entry or n in self._exits:
            self._before = out.clone()
        return out


def attention_mass(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    queries: Tensor,
    vision: Tensor,
) -> float:
    """Attention weight that query tokens put on vision tokens, mean over heads, summed over the query tokens.

    The softmax runs in fp32, over a few queries of one row at a time.

    Args:
        q: [B, H, T, D]. k: [B, Hk, T, D].
        mask: as :func:`vlmrewrite.ops.attention.visible` takes it; None is plain causal.
        scale: of the scores; None: 1 / sqrt(D).
        softcap: limit of the scores, or None.
        queries, vision: bool [B, T].
    """
    total, everywhere = 0.0, torch.arange(k.shape[2], device=k.device)[None]
    for row in queries.any(1).nonzero()[:, 0].tolist():
        keys = k[row].repeat_interleave(q.shape[1] // k.shape[1], 0).float()  # [H, T, D]
        own = mask if mask is None or mask.shape[0] == 1 else mask[row : row + 1]
        for at in queries[row].nonzero()[:, 0].split(_CHUNK):
            scores = q[row, :, at].float() @ keys.transpose(1, 2)  # [H, n, T]
            scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
            scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
            seen = visible(own, at[None], everywhere, False)
            assert seen is not None
            scores = scores.masked_fill(~seen[0], -math.inf) if seen.dtype == torch.bool else scores + seen[0]
            total += float(scores.softmax(-1)[..., vision[row]].double().sum()) / q.shape[1]
    return total
