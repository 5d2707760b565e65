"""Models behind Dynamo: each captured graph is analysed once and outlives the recipe that first needed it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from vlmrewrite import capture
from vlmrewrite.admission import admit
from vlmrewrite.blocks import parameter_inputs
from vlmrewrite.cache import PositionCache
from vlmrewrite.call import Call
from vlmrewrite.choice import Kernels
from vlmrewrite.encode import Encoded, encode_images, encoded_images
from vlmrewrite.grid import grids
from vlmrewrite.inplace import InPlace
from vlmrewrite.lower import compiled, lower, positioned
from vlmrewrite.program import Program, program_of

Runner = Callable[["Graph", Sequence[Any]], Any]


class Graph:
    """One captured graph of a model; analysed once, rewritten once for each session."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.gm = gm
        self.parameters: dict[str, tuple[int, str]] | None = None

    @functools.cached_property
    def program(self) -> Program:
        """The graph's program without passes."""
        return replace(program_of(self.gm), parameters=self.parameters or {})

    @functools.cached_property
    def vision(self) -> torch.fx.GraphModule:
        """What computes the vision-token mask, bool [B, T], from the graph's inputs."""
        return self.program.vision_mask()


class Traced:
    """A model behind Dynamo. Outlives a session, so that applying again need not capture again.

    It owns its graphs; what Dynamo keeps refers to them weakly, so that they die with the model.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.call = capture.TracedCall(forward, capture.with_images, self._new_graph)
        self.text = capture.TracedCall(forward, capture.without_images, self._new_graph)
        self.runner: Runner | None = None
        self._graphs: list[Graph] = []
        self._compiled: dict[tuple[object, ...], tuple[InPlace, Callable[..., Any]]] = {}

    def _new_graph(self, gm: torch.fx.GraphModule) -> Callable[..., Any]:
        graph = Graph(gm)
        self._graphs.append(graph)
        me, this = weakref.ref(self), weakref.ref(graph)

        def run(*inputs: Any) -> Any:
            owner, graph = me(), this()
            assert owner is not None and graph is not None and owner.runner is not None
            return owner.runner(graph, inputs)

        return run

    @contextlib.contextmanager
    def _running(self, runner: Runner) -> Iterator[None]:
        before, self.runner = self.runner, runner
        try:
            yield
        finally:
            self.runner = before

    def run(
        self, runner: Runner, model: nn.Module, cache: PositionCache, images: Encoded, kwargs: dict[str, Any]
    ) -> Any:
        """Run the captured forward with images; ``runner(graph, inputs)`` does the work of each graph."""

        def named(graph: Graph, inputs: Sequence[Any]) -> Any:
            if graph.parameters is None:
                graph.parameters = parameter_inputs(model, graph.gm, inputs)
            return runner(graph, inputs)

        cache.contiguous()
        with self._running(named):
            return self.call(model, cache, kwargs, images.features, images.as_list)

    def run_text(self, model: nn.Module, cache: PositionCache, kwargs: dict[str, Any], kernels: Kernels) -> Any:
        """Run a call without images, a decode step say, behind Inductor: no token is dropped in it."""
        plain = kwargs.get("attention_mask") is None and not cache.holes()
        device = next(model.parameters()).device
        given = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        roomy = cache.reserve(given.shape[1])

        def runner(graph: Graph, inputs: Sequence[Any]) -> Any:
            key = graph, plain, kernels, device, roomy
            if key not in self._compiled:
                made = InPlace.of(positioned(graph.gm, plain), roomy)
                low = lower(made.graph_module, kernels, device)
                self._compiled[key] = made, compiled(low.graph_module)
            made, run = self._compiled[key]
            return made.run(run, cache, inputs, given.shape[1])

        if not roomy:
            cache.contiguous()
        with self._running(runner):
            return self.text(model, cache, kwargs)


TRACED: weakref.WeakKeyDictionary[nn.Module, Traced] = weakref.WeakKeyDictionary()


def traced(model: nn.Module) -> Traced:
    """The model's captures; new if its class's forward has been exchanged since."""
    forward = type(model).forward
    if model not in TRACED or TRACED[model].forward is not forward:
        TRACED[model] = Traced(forward)
    return TRACED[model]


@functools.lru_cache(maxsize=64)
def _argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def tidy(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name, images encoded.

    Raises:
        NotImplementedError: attentions or hidden states are asked for, or there is a video.
    """
    kwargs = dict(zip(_argument_names(type(model).forward), args, strict=False)) | kwargs
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise NotImplementedError(
                f"{name}=True is not available while a recipe is applied; restore the model first"
            )
        kwargs.pop(name, None)
    return encode_images(model, kwargs)


def without_full_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments, with None in place of a mask without padding.

    Not for calls without a cache: there, transformers takes a missing mask as leave to look for packed sequences.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_meta and bool(mask.all()):
        return kwargs | {"attention_mask": None}
    return kwargs


def refuse_packed(kwargs: dict[str, Any]) -> None:
    """Refuse packed sequences: transformers would mask each from the others, and a rewritten graph does not.

    The condition is that of :func:`transformers.masking_utils.find_packed_sequence_indices`, which counts without a
    cache and without a mask: positions of a row that do not go up by one. Multimodal rope positions ([3, B, T], and
    all but the first of [4, B, T]) are not looked at.

    Raises:
        ValueError: the call, which is one without a cache, has such positions.
    """
    at = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or not isinstance(at, Tensor) or at.is_meta:
        return
    at = at[0] if at.dim() == 3 and at.shape[0] == 4 else at
    if at.dim() != 2 or bool((at.diff(dim=-1) == 1).all()):
        return
    row, column = (at.diff(dim=-1) != 1).nonzero()[0].tolist()
    raise ValueError(
        f"position_ids go from {int(at[row, column])} to {int(at[row, column + 1])} at token {column + 1} of row {row},"
        " in a call with images, without a cache and without an attention_mask: transformers takes that for packed"
        " sequences, which are not rewritten; pass one sequence a row, or an attention_mask if these tokens are one"
        " sequence"
    )


class _Captured(Exception):
    """Raised in place of running a graph that is only to be captured."""


def trace(model: nn.Module, inputs: dict[str, Any]) -> Program:
    """Capture a model's forward for some inputs; nothing is installed, and the decoder is not run.

    Args:
        model: an unmodified model, on any device (the meta device too).
        inputs: what the model's forward takes, with an image.

    Raises:
        ValueError: the inputs hold no image, or the graph could not be recognised.
        RuntimeError: the forward could not be captured as one graph.
    """
    admit(model)
    capture.register()
    found: list[tuple[Graph, Sequence[Any]]] = []

    def runner(graph: Graph, flat: Sequence[Any]) -> Any:
        found.append((graph, tuple(flat)))
        raise _Captured

    with capture.attention_swapped(model), torch.no_grad():
        kwargs = tidy(model, (), dict(inputs))
        encoded = kwargs.pop("mm_encoder_outputs", None) or {}
        output, thw = encoded.get("image"), encoded.get("image_grid_thw", kwargs.get("image_grid_thw"))
        if output is None:
            raise ValueError(f"the inputs hold no image: {', '.join(inputs)}; expected pixel_values or the like")
        if kwargs.get("use_cache") is False:
            refuse_packed(kwargs)
        kwargs = without_full_mask(kwargs)
        for name in ("past_key_values", "use_cache", "return_dict"):
            kwargs.pop(name, None)
        images = encoded_images(output)
        with contextlib.suppress(_Captured):
            traced(model).run(runner, model, PositionCache(), images, kwargs)
    graph, flat = found[0]
    mask = kwargs.get("attention_mask")
    vision = graph.vision(*flat)
    padding = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    call = None if vision.is_meta else Call(vision, padding, images.lengths)
    missing = {"encoder_features": "a traced program does not hold them"}
    grid = grids(model.config, images.lengths if call is None else call.census.images, None if vision.is_meta else thw)
    if isinstance(grid, str):
        missing["grid"] = grid
    elif call is not None:
        call.grid = grid
    return replace(graph.program.lacking(missing), call=call, inputs=tuple(flat), model=model)
