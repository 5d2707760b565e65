"""A prompt with images as a module that can be exported: the model's arguments in, logits and keys out."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from vlmrewrite import hf
from vlmrewrite.analysis import sizes
from vlmrewrite.compat import assert_tensor
from vlmrewrite.export.facts import FixedCall, listed
from vlmrewrite.hf import EncoderOutput
from vlmrewrite.plan import Call, Extra

ENCODED = "mm_encoder_outputs"

PAST = "past_key_values"

Past = Sequence[tuple[Tensor, Tensor, Tensor]]
"""Of each layer the keys [B, Hk, m, D], values [B, Hk, m, Dv] and logical positions int64 [B, m], -1 in empty slots."""


class Source(NamedTuple):
    """Where an input of a captured graph comes from.

    Attributes:
        kind: "parameter" by its name, "argument" or "feature" by its path; "size" of another input, or a "number".
        at: the name, the path, the input's place and axis, or the number.
    """

    kind: str
    at: Any


def prepared(model: nn.Module, kwargs: dict[str, Any], positions: bool) -> dict[str, Any]:
    """A call's arguments with images encoded and, where asked for, the positions that ``generate()`` would give it."""
    if positions:
        mask = kwargs["attention_mask"]
        kwargs = kwargs | {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
    if kwargs.get(ENCODED) is not None:
        outputs = {m: EncoderOutput(x) if m in hf.MODALITIES else x for m, x in kwargs[ENCODED].items()}
        return kwargs | {ENCODED: outputs}
    return hf.encode_images(model, kwargs)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Tensor]]:
    """The tensors in nested mappings, sequences and encoder outputs, with the path to each."""
    if isinstance(tree, Tensor):
        return [(path, tree)]
    if isinstance(tree, EncoderOutput):
        tree = vars(tree)
    if isinstance(tree, Mapping):
        return [found for name, x in tree.items() for found in leaves(x, (*path, name))]
    if isinstance(tree, (list, tuple)):
        return [found for i, x in enumerate(tree) for found in leaves(x, (*path, i))]
    return []


def inside(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a captured graph may read of prepared arguments: these, and the images as the decoder takes them."""
    outputs = kwargs.get(ENCODED) or {}
    images = {m: hf.encoded_images(outputs[m]).output for m in hf.MODALITIES if outputs.get(m) is not None}
    return {"argument": {k: x for k, x in kwargs.items() if k != ENCODED}, "feature": images}


def sources(model: nn.Module, graph: fx.Graph, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Source]:
    """Where each input of a captured graph comes from.

    Args:
        model: whose graph it is.
        graph, inputs: what was captured, and the flat inputs of that call.
        kwargs: the arguments of that call, prepared.

    Raises:
        NotImplementedError: an input is neither of the model nor of the call.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = {id(x): name for name, x in reversed(named)}
    given = [(kind, path, y) for kind, tree in inside(kwargs).items() for path, y in leaves(tree)]
    nodes = graph.find_nodes(op="placeholder")
    axes: dict[Any, Source] = {}
    for i, (node, x) in enumerate(zip(nodes, inputs, strict=True)):
        if isinstance(x, Tensor):
            axes |= {size: Source("size", (i, d)) for d, size in enumerate(sizes(node)) if size not in axes}
    found = []
    for node, x in zip(nodes, inputs, strict=True):
        if not isinstance(x, Tensor):
            found.append(axes.get(sizes(node)[0], Source("number", x)))
        elif id(x) in names:
            found.append(Source("parameter", names[id(x)]))
        else:
            same = [(rank, kind, path) for kind, path, y in given if (rank := _alike(x, y)) is not None]
            if not same:
                raise NotImplementedError(
                    f"the captured forward of {type(model).__name__} reads a tensor {tuple(x.shape)}, {node.name}, that"
                    " is neither its parameter nor an argument of the call: expected a model whose whole forward is"
                    " captured, and position_ids among its inputs"
                )
            found.append(Source(*min(same, key=lambda one: one[0])[1:]))
    return found


def _alike(x: Tensor, y: Tensor) -> int | None:
    """Whether two tensors are one: 0 for the very same, 1 for the same memory, 2 for equal numbers, else None."""
    if x is y:
        return 0
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return None
    if x.data_ptr() == y.data_ptr() and x.stride() == y.stride():
        return 1
    return 2 if torch.equal(x, y) else None


class Called(nn.Module):
    """A module that takes keyword arguments of some names; ``run`` says what it does with them.

    Args:
        names: the arguments that it takes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()

        def forward(**kwargs: Any) -> Any:
            return self.run(kwargs)

        made: Any = forward
        made.__signature__ = inspect.Signature([inspect.Parameter(name, _KEYWORD) for name in names])
        self.forward = made

    def run(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What it returns for its arguments."""
        raise NotImplementedError


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


class Prefill(Called):
    """A prompt with images, by a rewritten graph.

    Args:
        model: whose prompt it is.
        graph: the rewritten graph, without operators of this package.
        vision: the parts of the captured graph that say which tokens are vision tokens, with each one's modality.
        reads: where the captured graph's inputs come from.
        extras: what it takes besides.
        call: the call that was captured.
        shown: where among its outputs the logits stand, and each layer's keys, values and positions.
        positions: whether positions are made from the mask.
        names: the arguments that it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: nn.Module,
        vision: nn.Module,
        modalities: Sequence[str],
        reads: Sequence[Source],
        extras: Sequence[Extra],
        call: Call,
        shown: tuple[int, Sequence[tuple[int, int, int]]],
        positions: bool,
        names: Sequence[str],
    ) -> None:
        super().__init__(names)
        self.model, self.rewritten, self.vision = model, graph, vision
        self._modalities, self._reads, self._extras = modalities, reads, extras
        self._call, self._shown, self._positions = call, shown, positions
        self._listed = listed(call, extras)

    def run(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Logits [B, T, V] and what each layer keeps; see :func:`vlmrewrite.export`."""
        given = inside(prepared(self.model, kwargs, self._positions))
        flat = self._flat(given)
        masks = dict(zip(self._modalities, self.vision(*flat), strict=True))
        call = self._fixed(masks, kwargs.get("attention_mask"))
        out, _ = self.rewritten(*flat, *map(call.fill, self._extras))
        logits, layers = self._shown
        return {"logits": out[logits], PAST: [tuple(out[i].contiguous() for i in places) for places in layers]}

    def _flat(self, given: Mapping[str, Any]) -> list[Any]:
        """The captured graph's inputs."""
        flat: list[Any] = []
        for kind, at in self._reads:
            if kind == "parameter":
                *path, name = at.split(".")
                flat.append(getattr(self.model.get_submodule(".".join(path)), name))
            elif kind in given:
                x = given[kind]
                for step in at:
                    x = vars(x)[step] if isinstance(x, EncoderOutput) else x[step]
                flat.append(x)
            else:
                flat.append(at)
        sized = zip(flat, self._reads, strict=True)
        return [flat[at[0]].shape[at[1]] if kind == "size" else x for x, (kind, at) in sized]

    def _fixed(self, masks: Mapping[str, Tensor], mask: Tensor | None) -> FixedCall:
        """The call as the graph's other inputs are made from it; it is checked as it runs."""
        example, vision = self._call, functools.reduce(operator.or_, masks.values())
        padding = None if mask is None else mask[:, -vision.shape[1] :].bool()
        call = FixedCall(
            vision,
            padding,
            example.feature_lengths,
            videos=masks.get("video"),
            video_lengths=example.video_lengths,
            video_frames=example.video_frames,
            grids=example.grids,
            example=example,
            listed=self._listed,
        )
        expected = call.row_tokens()
        right = vision.sum(1) == torch.tensor(expected, device=vision.device)
        assert_tensor(
            right.all(), f"expected {expected} vision tokens in the rows, as in the inputs that were exported"
        )
        if not example.counts.overlap:
            ends = vision.gather(1, call.last).any()
            assert_tensor(~ends, "a row ends in a vision token: expected text behind it, as in what was exported")
        return call
