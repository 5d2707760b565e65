"""What vision tokens do in each decoder layer of a model, measured on given inputs.

    found = profile(model, processor(images=image, text=prompt, return_tensors="pt"))
    print(found)                                          # a row for each layer
    found.saturation(), found.rank_self(), found.rank_cross()

The compiler measures itself: one layer at a time, its own rewrite freezes or hides the vision tokens there, and the
change of the next-token distribution says what that layer did with them. Attention and hidden states are read off the
captured graph while an fx interpreter runs it. Nothing is hooked into the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from vlmrewrite.compiler import rewritten
from vlmrewrite.hf import on_base_model
from vlmrewrite.plan import All, Plan, Text, TokenSet
from vlmrewrite.report.observe import observe
from vlmrewrite.report.plot import check_plot
from vlmrewrite.report.programs import next_token, programs_on
from vlmrewrite.rewrite import Program
from vlmrewrite.text import table

_COLUMNS = {
    "attention_mass": "attention to image",
    "vision_cosine": "cosine vision",
    "text_cosine": "cosine text",
    "freeze_kl": "KL frozen",
    "hide_kl": "KL hidden",
}


@dataclass(frozen=True)
class LayerProfile:
    """What the vision tokens do in each decoder layer: one value a layer, over all prompts that hold an image.

    Attributes:
        attention_mass: share of the softmax weight that text tokens behind the first vision token of their row put on
            vision tokens, mean over heads and those tokens; 0 to 1.
        vision_cosine: cosine between a vision token's hidden state before and after the layer, mean over the tokens.
        text_cosine: the same of the text tokens.
        freeze_kl: KL(original || modified), in nats, of the next-token distribution at the last prompt token, mean
            over the prompts, when vision tokens bypass this one layer and text still sees them there:
            ``run_on(Text).attend_to(All)`` (the layer contribution of arXiv 2504.00502). What comes out of the
            last layer at vision tokens is never read, so that its value is 0 but for rounding.
        hide_kl: the same when text does not see them there either: ``run_on(Text).attend_to(Text)``. A layer attends
            to one set for all its queries, so that hiding vision from text is making the layer text-only.
        rows: how many prompts with an image there were.
        key_share: share of a layer's matrix products per token that makes keys and values.
    """

    attention_mass: tuple[float, ...]
    vision_cosine: tuple[float, ...]
    text_cosine: tuple[float, ...]
    freeze_kl: tuple[float, ...]
    hide_kl: tuple[float, ...]
    rows: int
    key_share: tuple[float, ...] = ()

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.freeze_kl)

    def saturation(self, share: float = 0.05) -> int:
        """The first layer from which on updating vision tokens hardly matters.

        That is the smallest s with ``sum(freeze_kl[s:]) <= share * sum(freeze_kl)``. Ours: arXiv 2606.09131
        takes the layer where the answer first shows in the logit lens, less 4.

        Args:
            share: of the effect of all layers, in [0, 1).

        Returns:
            a layer, 0 to L - 1.

        Raises:
            ValueError: ``share`` is not in [0, 1).
        """
        if not 0 <= share < 1:
            raise ValueError(f"expected a share in [0, 1), got {share!r}")
        limit, last = share * math.fsum(self.freeze_kl), self.depth - 1
        return next((s for s in range(last) if math.fsum(self.freeze_kl[s:]) <= limit), last)

    def rank_self(self) -> list[int]:
        """All layers, those first where updating the vision tokens matters most (largest ``freeze_kl``)."""
        return _descending(self.freeze_kl)

    def rank_cross(self) -> list[int]:
        """All layers, those first where seeing the vision tokens matters most (largest ``hide_kl``)."""
        return _descending(self.hide_kl)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the columns, ``rows``, and what follows from them."""
        columns = {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}
        ranks = {"rank_self": self.rank_self(), "rank_cross": self.rank_cross()}
        return columns | {"saturation": self.saturation()} | ranks

    def __str__(self) -> str:
        columns = [[f"{x:.4g}" for x in getattr(self, name)] for name in _COLUMNS]
        cells = [["layer", *_COLUMNS.values()], *map(list, zip(map(str, range(self.depth)), *columns, strict=True))]
        about = f"mean over {self.rows} prompt{'s' * (self.rows != 1)} with images; KL in nats"
        ranks = [
            f"{what}: {', '.join(map(str, order))}"
            for what, order in (
                ("layers by effect of updating vision tokens (KL frozen)", self.rank_self()),
                ("layers by effect of having vision tokens (KL hidden)", self.rank_cross()),
            )
        ]
        return "\n".join([*table(cells), about, f"saturation layer: {self.saturation()}", *ranks])

    def plot(self, path: Path | str) -> None:
        """Draw all columns over the layers and write the picture; the suffix names the format.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the folder does not exist, or matplotlib does not write this format.
        """
        check_plot(path)
        from matplotlib.figure import Figure

        figure, layers = Figure(figsize=(max(6.0, 0.25 * self.depth + 2), 7.5), layout="constrained"), range(self.depth)
        mass, cosines, kl = figure.subplots(3, 1, sharex=True)
        mass.plot(layers, self.attention_mass, marker="o", color="C0")
        mass.set_ylabel("attention to image")
        mass.set_ylim(bottom=0)
        cosines.plot(layers, self.vision_cosine, marker="o", color="C1", label="vision tokens")
        cosines.plot(layers, self.text_cosine, marker="s", color="C2", label="text tokens")
        cosines.set_ylabel("cosine, before and after")
        kl.plot(layers, self.freeze_kl, marker="o", color="C1", label="vision frozen")
        kl.plot(layers, self.hide_kl, marker="s", color="C3", label="vision hidden")
        if any(self.freeze_kl + self.hide_kl):
            kl.set_yscale("log", nonpositive="mask")
        kl.axvline(self.saturation() - 0.5, color="grey", linestyle="--", label="saturation")
        kl.set_ylabel("KL of next token, nats")
        kl.set_xlabel("decoder layer")
        kl.locator_params(axis="x", integer=True)
        for axes in (cosines, kl):
            axes.legend(fontsize="small")
        figure.savefig(path, dpi=150)


@on_base_model
@torch.no_grad()
def profile(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> LayerProfile:
    """Measure what the vision tokens do in each decoder layer.

    Takes 1 + 2L forwards of each batch, and 2L rewrites of each graph that the batches need; padding and rows without
    images are left out of every mean. The model is put into eval mode, and left as it was found.

    Args:
        model: an unmodified model with weights.
        inputs: what the model's forward takes, one batch or several; ``labels`` are not looked at.
        progress: called before each step with what is measured, how many steps are done, and how many there are.

    Raises:
        TypeError: ``model`` is not a Hugging Face model, or ``inputs`` are not of these types.
        ValueError: the model cannot be rewritten or has no weights, no row has an image, a prompt ends in an image, or
            a result is not finite.
        RuntimeError: the forward could not be captured.
    """
    with programs_on(model, inputs, progress) as programs:
        return measure(programs, progress)


def calibration(model: nn.Module, inputs: Any, who: str) -> LayerProfile:
    """The profile that a pass chooses its layers by.

    Raises:
        ValueError: ``inputs`` is None; the message names ``who``, the pass. Or as :func:`profile`.
    """
    if inputs is None:
        raise ValueError(
            f"{who} measures the layers; expected calibration=inputs, or vlmrewrite.calibrate(model, recipe, inputs)"
        )
    return profile(model, inputs)


def measure(programs: list[Program], progress: Callable[[str, int, int], None]) -> LayerProfile:
    """The profile of programs that :func:`captured` made; ``progress`` as for :func:`profile`."""
    depth = programs[0].plan.depth
    total, done = len(programs) * (1 + 2 * depth), 0
    seen, original = [], []
    for program in programs:
        progress("unmodified", done, total)
        outputs, observed = observe(program)
        seen.append(observed)
        original.append(next_token(program, outputs))
        done += 1
    columns = {name: _mean([(o.sums[name], o.tokens[name]) for o in seen]) for name in seen[0].sums}
    graphs: dict[torch.fx.GraphModule, list[int]] = {}  # batches that share a graph share its rewrites
    for i, program in enumerate(programs):
        graphs.setdefault(program.captured, []).append(i)
    rows = sum(map(len, original))
    for name, keys in (("freeze_kl", All), ("hide_kl", Text)):
        kl = [0.0] * depth
        for graph, layer in itertools.product(graphs, range(depth)):
            changed = rewritten(programs[graphs[graph][0]], [_Bypass(layer, keys)], propagate=False)
            for i in graphs[graph]:
                progress(f"{_COLUMNS[name]} in layer {layer}", done, total)
                outputs, _ = changed.run(*programs[i].inputs, call=programs[i].call)
                kl[layer] += float(first_token_kl(original[i], next_token(programs[i], outputs)).sum())
                done += 1
        columns[name] = tuple(x / rows for x in kl)
    progress("done", done, total)
    for name, column in columns.items():
        for layer, x in enumerate(column):
            if not math.isfinite(x):
                raise ValueError(f"{name} of layer {layer} is {x}; expected finite hidden states and logits")
    layers = programs[0].anatomy.layers
    made = [sum((x.keys | x.values).values()) for x in layers]
    whole = [sum((x.queries | x.keys | x.values | x.behind).values()) for x in layers]
    share = tuple(k / n for k, n in zip(made, whole, strict=True))
    return LayerProfile(**columns, rows=rows, key_share=share)


def _mean(batches: Sequence[tuple[list[float], int]]) -> tuple[float, ...]:
    """Of each layer, from sums over tokens and numbers of tokens."""
    tokens = sum(n for _, n in batches)
    return tuple(math.fsum(layer) / tokens for layer in zip(*(sums for sums, _ in batches), strict=True))


@dataclass(frozen=True)
class _Bypass:
    """In layer ``at`` vision tokens bypass the layer, and text attends to ``keys``."""

    name: ClassVar[str] = "bypass"

    at: int
    keys: TokenSet

    def refuse(self, plan: Plan) -> str | None:
        """Never."""
        return None

    def change(self, plan: Plan) -> None:
        """One layer."""
        plan.layer(self.at).run_on(Text).attend_to(self.keys)


def first_token_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [R, V], in nats, [R]."""
    return (p.exp() * (p - q)).sum(1).clamp(min=0)


def _descending(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])
