"""A user's prompts as programs, and what whole plans answer on them and cost, before one of them is chosen."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmrewrite.compiler import rewritten
from vlmrewrite.hf import check_support, encode_images, on_base_model
from vlmrewrite.plan import Call, Pass
from vlmrewrite.rewrite import Program
from vlmrewrite.runtime import trace


@contextlib.contextmanager
def programs_on(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Iterator[list[Program]]:
    """The program of each batch with an image; while the block runs, the model is in eval mode.

    Arguments and errors are those of :func:`profile`.
    """
    check_support(model)
    batches = [inputs] if isinstance(inputs, Mapping) else inputs
    if not isinstance(batches, Sequence) or not all(isinstance(batch, Mapping) for batch in batches):
        raise TypeError(
            f"expected a mapping of the forward's inputs or a sequence of them, got {type(inputs).__name__}"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"this {type(model).__name__} is on the meta device; expected a model with weights")
    with _evaluating(model):
        programs = []
        for i, batch in enumerate(batches):
            progress(f"capture {i + 1} of {len(batches)}", 0, 1)
            programs += captured(model, batch)
        if not programs:
            number = f"{len(batches)} batch{'es' * (len(batches) != 1)}"
            raise ValueError(f"no image in {number} of inputs; expected at least one row with an image")
        yield programs


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def captured(model: nn.Module, batch: Mapping[str, Any]) -> list[Program]:
    """The batch's program, or nothing if no row has an image."""
    kwargs = encode_images(model, {k: v for k, v in batch.items() if k not in ("labels", "logits_to_keep")})
    if (kwargs.get("mm_encoder_outputs") or {}).get("image") is None:
        return []
    mask = kwargs.get("attention_mask")
    ends = not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask[:, -1].all())
    if ends and "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        kwargs["logits_to_keep"] = 1
    program = trace(model, kwargs)
    call = _call(program)
    wrong = call.vision.gather(1, call.last)[:, 0].nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(f"row {wrong[0]} ends in an image; expected prompts that end in text")
    return [program]


def next_token(program: Program, outputs: Sequence[Any]) -> Tensor:
    """Log-probabilities behind the last prompt token of each row with an image, fp64 [R, V], on the CPU.

    ``outputs`` are the captured graph's; the logits are [B, t, V] of the last t tokens.
    """
    call, logits = _call(program), outputs[program.anatomy.logits]
    columns = call.last[:, 0] - (call.length - logits.shape[1])
    rows = call.vision.any(1).nonzero()[:, 0]
    chosen: Tensor = logits[rows, columns[rows]]
    return chosen.cpu().double().log_softmax(-1)


def _call(program: Program) -> Call:
    assert program.call is not None
    return program.call


def under(passes: Sequence[Pass]) -> Callable[[Program], Program]:
    """A function that gives a program under some passes; those of one graph and the same facts share its rewrite."""
    made = dict[Any, Program]()

    def of(program: Program) -> Program:
        kind = program.captured, frozenset(program.plan.features)
        if kind not in made:
            made[kind] = rewritten(program, passes, propagate=False)
        return made[kind]

    return of


class Tried(NamedTuple):
    """A plan on some prompts.

    Attributes:
        likeliest: the probability of the most likely first token of each row with an image, fp64 [R].
        flops: matmul FLOPs of each layer for each of these rows, fp64 [R, L]. Rows of a batch cost the same.
    """

    likeliest: Tensor
    flops: Tensor


@on_base_model
@torch.no_grad()
def tried(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], plans: Sequence[Sequence[Pass]]
) -> list[Tried]:
    """Run the prompts under each of several plans, by their passes.

    Args:
        model: an unmodified model with weights.
        inputs: as for :func:`vlmrewrite.profile`.
        plans: their passes.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`vlmrewrite.profile`.
    """
    found = []
    with programs_on(model, inputs) as programs:
        for passes in plans:
            changing, sure, flops = under(passes), list[Tensor](), list[Tensor]()
            for p in programs:
                assert p.call is not None
                changed = changing(p)
                out, _ = changed.run(*p.inputs, call=p.call)
                sure.append(next_token(p, out).amax(1).exp())
                of_layers = [cost.flops / len(p.call.vision) for cost in changed.costs(p.call.counts, p.call.past)]
                flops.append(torch.tensor(of_layers, dtype=torch.float64).expand(len(sure[-1]), -1))
            found.append(Tried(torch.cat(sure), torch.cat(flops)))
    return found
