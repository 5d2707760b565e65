"""A model under a recipe as two exported programs: a prompt with its images, and a step behind it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vlmrewrite import hf
from vlmrewrite.api import applied
from vlmrewrite.compat import generation_positions
from vlmrewrite.compiler import rewrite
from vlmrewrite.export.decode import Decode
from vlmrewrite.export.exported import Exported, plain
from vlmrewrite.export.policies import without_operators
from vlmrewrite.export.prefill import ENCODED, PAST, Prefill, prepared, sources
from vlmrewrite.hf import on_base_model
from vlmrewrite.lower import lower
from vlmrewrite.ops import mixers_swapped
from vlmrewrite.plan import blocks_of
from vlmrewrite.rewrite import Program
from vlmrewrite.runtime import SESSIONS, Session, install_session, remove_session, session_of, trace
from vlmrewrite.saving import METHODS

_CONSTANT = ("use_cache", "return_dict")


@on_base_model
def export(model: nn.Module, inputs: Mapping[str, Any], recipe: Any = None, **options: Any) -> Exported:
    """Export a model under a recipe: two ``ExportedProgram`` without any operator of this package in them.

        exported = vr.export(model, inputs, recipe)
        out = exported.prefill.module()(**exported.arguments(inputs))
        out["logits"], out["past_key_values"]

    ``prefill`` takes the tensors that ``inputs`` holds, by the same names, and ``decode`` one token of each row; both
    give ``logits`` and ``past_key_values``: of each layer its keys [B, Hk, m, D], its values [B, Hk, m, Dv] and their
    logical positions int64 [B, m], -1 in empty slots. Layers hold as many tokens as the recipe lets them see.

    The number of tokens is dynamic, and so is where rows are padded. The number of rows, the images of each row and the
    vision tokens of each image are those of ``inputs``; another prompt is refused as it runs. A row with fewer vision
    tokens than the others keeps all rows longer, for any of its text may be as long as the whole prompt.

    Positions are made from the attention mask as ``generate()`` makes them, unless ``inputs`` holds ``position_ids``.
    While it is exported the model is unmodified, for all threads.

    Args:
        model: in eval mode; without ``recipe``, one that a recipe is applied to, which stays applied.
        inputs: what its forward takes, with ``input_ids``, and with an image: pixels, or ``mm_encoder_outputs``. Of a
            vision tower that looks at sizes of images the pixels cannot be exported.
        recipe, options: as for :func:`vlmrewrite.apply`.

    Returns:
        both programs. ``save(folder)`` keeps them, and :func:`vlmrewrite.load_export` finds them again.

    Raises:
        ValueError: there is no recipe, the inputs hold no image, the model is in training mode, or the positions that
            it needs are not given.
        NotImplementedError: the recipe or the model does what cannot be exported; the message says what.
    """
    if recipe is not None:
        with applied(model, recipe, **options):
            return export(model, inputs)
    if options:
        raise ValueError(f"expected {', '.join(options)} with a recipe to export, got no recipe")
    if model not in SESSIONS:
        raise ValueError(
            f"no recipe for this {type(model).__name__}; expected export(model, inputs, recipe), or a model that a"
            " recipe is applied to"
        )
    _checked(model, inputs)
    if model.training:
        raise ValueError(
            f"this {type(model).__name__} is in training mode; expected model.eval() before it is exported"
        )
    if hf.language_model(model) is not None:
        raise NotImplementedError(
            f"{type(model).__name__} leaves generation to a language model inside: expected a model whose own forward"
            " takes the images and gives the logits"
        )
    with _taken_off(model) as (session, blocks), torch.no_grad():
        return _export(model, inputs, session, blocks)


@contextmanager
def _taken_off(model: nn.Module) -> Iterator[tuple[Session, nn.ModuleDict | None]]:
    """While the block runs, a rewritten model is the unmodified one; its session, and the blocks in use."""
    session, blocks = session_of(model), blocks_of(model)
    remove_session(model)
    try:
        yield session, blocks
    finally:
        install_session(model, session, METHODS)


def _checked(model: nn.Module, inputs: Any) -> None:
    """Raise where inputs are not what a model's forward takes by name, or what an export gives nothing for."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs is a {type(inputs).__name__}; expected what the model's forward takes, by name")
    if inputs.get("labels") is not None:
        raise ValueError("inputs hold labels, and an export gives logits and no loss; leave them out")
    kind, base = type(model), cast(Any, type(model.base_model))
    methods = [kind.forward, base.forward, *(getattr(base, f"get_{m}_features", None) for m in hf.MODALITIES)]
    known = {ENCODED, PAST, *(name for method in methods if method is not None for name in hf.argument_names(method))}
    if strange := sorted(inputs.keys() - known - {*_CONSTANT}):
        raise ValueError(
            f"inputs hold {', '.join(strange)}, which {type(model).__name__}.forward does not take; expected some of"
            f" {', '.join(sorted(known - {'self', 'labels', 'kwargs'}))}"
        )
    plain_types = (Tensor, Mapping, bool, int, float, str, type(None))
    for name, x in inputs.items():
        if not isinstance(x, plain_types) and name not in (PAST, ENCODED):
            raise TypeError(f"inputs hold {name} as a {type(x).__name__}; expected a tensor")


def _export(model: nn.Module, inputs: Mapping[str, Any], session: Session, blocks: nn.ModuleDict | None) -> Exported:
    given = {name: x for name, x in inputs.items() if x is not None and name not in _CONSTANT}
    if PAST in given or not isinstance(given.get("input_ids"), Tensor):
        raise ValueError(f"inputs hold {', '.join(given)}; expected input_ids of a whole prompt, and no {PAST}")
    positions = _makes_positions(model, given)
    if given.get(ENCODED) is not None:
        given[ENCODED] = plain(given[ENCODED])
    takes = {name: plain(x) for name, x in given.items() if isinstance(x, Tensor) or name == ENCODED}
    kwargs = _with_padding(model, prepared(model, given, positions))
    program = rewrite(trace(model, kwargs), session.recipe.passes, strict=session.strict, blocks=blocks)
    _check(program, session.recipe.name)
    prefill = _prefill(model, program, kwargs, positions, list(takes))
    rows, tokens = given["input_ids"].shape
    along = {name: _token_axes(name, x, (rows, tokens)) for name, x in takes.items()}
    with hf.attention_swapped(model), mixers_swapped(model):
        first = _exported(prefill, takes, along, "the prompt")
        out = first.module()(**takes)
        step = _step(given, out[PAST])
        shapes: dict[str, Any] = {name: {1: Dim.DYNAMIC} if name == "attention_mask" else {} for name in step}
        shapes[PAST] = [({2: Dim.DYNAMIC}, {2: Dim.DYNAMIC}, {1: Dim.DYNAMIC}) for _ in out[PAST]]
        more = _exported(Decode(model, positions, list(step)), step, shapes, "a step behind the prompt")
    assert program.call is not None
    return Exported(
        first, more, tuple(takes), type(model).__name__, session.recipe.name, tuple(program.call.counts.images)
    )


def _makes_positions(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether positions are to be made from the mask.

    Raises:
        ValueError: the model makes them otherwise, and they are not given.
    """
    if given.get("position_ids") is not None or "position_ids" not in hf.argument_names(type(model).forward):
        return False
    ids, mask = given["input_ids"], given.get("attention_mask")
    own = generation_positions(model, ids, dict(given))
    real = torch.ones_like(ids) if mask is None else mask.long()
    made = (real.cumsum(-1) - 1).clamp(min=0)
    if own.dim() != 2 or not torch.equal(own.expand_as(made)[real.bool()], made[real.bool()]):
        raise ValueError(
            f"{type(model).__name__} makes positions of its own, {tuple(own.shape)}, that cannot be exported: expected"
            " position_ids among the inputs, as prepare_inputs_for_generation() gives them"
        )
    return mask is not None


def _token_axes(name: str, x: Any, shape: tuple[int, int]) -> Any:
    """The axes of an argument that hold tokens, as ``torch.export`` takes them."""
    if not isinstance(x, Tensor):
        return {k: _token_axes(k, y, (-1, -1)) for k, y in x.items()} if isinstance(x, dict) else _lists(x)
    if not x.is_floating_point() and tuple(x.shape[-2:]) == shape:
        return {x.dim() - 1: Dim.DYNAMIC}
    return {}


def _lists(x: Any) -> Any:
    return [_token_axes("", y, (-1, -1)) for y in x] if isinstance(x, list) else None


def _with_padding(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a token that pads, if there is a mask: a call without one is captured without the mask."""
    mask, shape = kwargs.get("attention_mask"), tuple(kwargs["input_ids"].shape)
    if mask is None or not bool(mask.all()):
        return kwargs
    special = {x for name, x in vars(model.config).items() if name.endswith(("_token_id", "_token_index"))}
    pad = next(i for i in range(len(special) + 1) if i not in special)
    longer = {name: x for name, x in kwargs.items() if _token_axes(name, x, shape) and isinstance(x, Tensor)}
    values = dict.fromkeys(longer, 0) | {"input_ids": pad}
    return kwargs | {name: F.pad(x, (1, 0), value=values[name]) for name, x in longer.items()}


def _check(program: Program, recipe: str) -> None:
    """Raise NotImplementedError for what cannot be exported."""
    call = program.call
    assert call is not None
    reasons = {
        "chooses among plans while it runs": program.dispatch is not None,
        "meets a decoder with layers that keep no keys, or select them by an index": bool(program.plan.kinds),
        "meets a model that takes some of the tower's features only": call.picked,
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotImplementedError(
                f"recipe {recipe!r} {reason}, which cannot be exported: expected one plan, whose"
                " numbers of tokens are known from the images"
            )


def _prefill(model: nn.Module, program: Program, kwargs: dict[str, Any], positions: bool, takes: list[str]) -> Prefill:
    """The prompt as a module."""
    call, anatomy, captured = program.call, program.anatomy, program.captured
    assert call is not None
    lowered = lower(program.graph_module, "reference", call.vision.device).graph_module
    outputs: Any = captured.graph.output_node().args[0]
    layers = []
    for append in (layer.append for layer in anatomy.layers if layer.append is not None and layer.owner == layer.index):
        items = {x.args[1]: i for i, x in enumerate(outputs) if x.target is operator.getitem and x.args[0] is append}
        layers.append((items[0], items[1], items[2]))
    return Prefill(
        model,
        without_operators(program, lowered, call),
        program.vision_masks,
        [merge.modality for merge in anatomy.merges],
        sources(model, captured.graph, program.inputs, kwargs),
        program.variants[0].extras if program.variants else (),
        call,
        (anatomy.logits, layers),
        positions,
        takes,
    )


def _step(given: Mapping[str, Any], past: Any) -> dict[str, Any]:
    """An example of what a step takes."""
    ids, mask, at = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
    step = {
        "input_ids": ids[:, -1:].contiguous(),
        "attention_mask": F.pad(torch.ones_like(ids) if mask is None else mask, (0, 1), value=1),
    }
    if at is not None:
        step["position_ids"] = (at[..., -1:] + 1).contiguous()
    return step | {PAST: past}


def _exported(module: nn.Module, kwargs: dict[str, Any], shapes: dict[str, Any], what: str) -> ExportedProgram:
    """A module exported.

    Raises:
        NotImplementedError: it cannot be, or there would be an operator of this package in it.
    """
    try:
        made = torch.export.export(module, (), kwargs, dynamic_shapes=shapes)
    except Exception as e:
        said = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        hint = "" if ENCODED in kwargs or PAST in kwargs else f" (images encoded, as {ENCODED}, leave the tower out)"
        raise NotImplementedError(f"{what} cannot be exported by torch.export{hint}: {said}") from e
    graphs = [m.graph for m in made.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = {n.target for graph in graphs for n in graph.nodes if n.op == "call_function"}
    tagged = {str(x) for x in targets if torch.Tag.nondeterministic_seeded in getattr(x, "tags", ())}
    if random := sorted(x for x in tagged if "attention" not in x and "dropout" not in x):  # none in eval mode
        raise NotImplementedError(f"{what} draws random numbers, by {', '.join(random)}: expected none to export")
    if left := sorted(str(x) for x in targets if str(x).startswith("vlm")):
        raise NotImplementedError(f"{what} cannot be exported: {', '.join(left)} would be left in it")
    return made
