"""What belongs to one call and to nobody else: its prompt, what it was given, and what came of it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmrewrite import hf
from vlmrewrite.capture import Graph
from vlmrewrite.compiler import program_of
from vlmrewrite.hf import Encoded, Encoding
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.lower import Executable
from vlmrewrite.plan import Call, Plan, TokenSet, Vision
from vlmrewrite.rewrite import Program, RunResult

ARGUMENT = "vlmrewrite_prompt"
"""The keyword under which a generation hands its :class:`Prompt` to its own forwards."""


@dataclass(eq=False)
class Prompt:
    """What a generation knows and its forwards cannot see.

    Attributes:
        end: column of each row's last prompt token, int64 [B], or None. (Without a cache the sequence grows past it.)
            Columns are counted from the start of the sequence, what a cache holds of it included.
        sizes: what its arguments say about sizes of images and videos.
        columns: where the prompt ends in the sequence, as long as its end is not that of a mask; then 0.
        encodings: the runs of the vision tower that it made.
        adopted: caches that it was given, with what they were before; see :func:`vlmrewrite.kvcache.adopt`.
        follows: of a dispatch, the plan that all rows follow, or None; see :func:`vlmrewrite.runtime.following`.
        made: the last call with images in it, None if no rewritten forward ran.
    """

    end: Tensor | None = None
    sizes: hf.Sizes = field(default_factory=hf.Sizes)
    columns: int = 0
    encodings: list[Encoding] = field(default_factory=list)
    adopted: list[Any] = field(default_factory=list)
    follows: int | None = None
    made: LastCall | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
        """That of a call of ``generate``."""
        last, columns = hf.prompt_end(args, kwargs)
        prompt = cls(last, hf.Sizes.of(kwargs), columns)
        prompt.see(kwargs.get("attention_mask"))
        return prompt

    def see(self, mask: Any) -> None:
        """Take the end from a mask over the prompt and what follows it, [B * copies, T]; the first one counts.

        Without one among its arguments, ``generate()`` makes it: tokens that pad are none of the prompt.
        """
        if self.end is None or not self.columns or not isinstance(mask, Tensor) or mask.dim() != 2:
            return
        rows, columns = len(self.end), self.columns
        if mask.shape[1] >= columns and not len(mask) % rows:
            at, mask = torch.arange(columns, device=mask.device), hf.with_tokens(mask[:: len(mask) // rows, :columns])
            self.end, self.columns = (at * mask.to(at)).amax(1), 0


_PROMPTS: ContextVar[tuple[tuple[object, Prompt], ...]] = ContextVar("vlmrewrite_prompts", default=())


@contextmanager
def prompt_of(owner: object, prompt: Prompt) -> Iterator[None]:
    """While the block runs, in this context, ``owner``'s innermost prompt is this one.

    Owners are sessions: a session alone stands for its generations, which hand the prompt on themselves; with
    ``"forward"``, for forwards that no generation called.
    """
    token = _PROMPTS.set((*_PROMPTS.get(), (owner, prompt)))
    try:
        yield
    finally:
        _PROMPTS.reset(token)


def current_prompt(owner: object) -> Prompt | None:
    """The innermost prompt of ``owner``, in this context."""
    return next((prompt for who, prompt in reversed(_PROMPTS.get()) if who == owner), None)


def encoded_in(kwargs: dict[str, Any]) -> dict[str, Encoded]:
    """The images and videos, by modality, in a forward's arguments that :func:`vlmrewrite.hf.tidy` made."""
    outputs = kwargs.get("mm_encoder_outputs") or {}
    return {m: hf.encoded_images(outputs[m]) for m in hf.MODALITIES if outputs.get(m) is not None}


class Given(NamedTuple):
    """What a call with an image was given, as far as the captured graph's inputs do not say.

    Attributes:
        images: the encoded images and videos, by modality.
        padding: 1 for real tokens, [B, past + T]; None without padding, or with a mask of another form.
        past: logical length of the cache before the call.
        held: keys that each layer held before the call.
        sizes: what is known about sizes of images and videos.
        end: column of each row's last prompt token, as in :class:`Prompt`, or None: the last real token.
        encodings: runs of the vision tower that the images may come from.
        follows: of a dispatch, the plan that all rows follow, or None.
    """

    images: dict[str, Encoded]
    padding: Tensor | None
    past: int
    held: tuple[int, ...]
    sizes: hf.Sizes
    end: Tensor | None
    encodings: list[Encoding]
    follows: int | None = None

    @classmethod
    def of(cls, kwargs: dict[str, Any], cache: PositionCache, prompt: Prompt) -> tuple[Given | None, dict[str, Any]]:
        """What a call was given, None without an image, and its other arguments.

        Args:
            kwargs: a forward's arguments, images encoded; see :func:`vlmrewrite.hf.tidy`.
        """
        images = encoded_in(kwargs)
        rest = {name: x for name, x in kwargs.items() if name != "mm_encoder_outputs"}
        if not images:
            return None, rest
        rest = hf.without_full_mask(rest)
        return cls.at(images, rest, cache, prompt), rest

    @classmethod
    def at(cls, images: dict[str, Encoded], kwargs: dict[str, Any], cache: PositionCache, prompt: Prompt) -> Given:
        """What a call with these images was given; its other arguments, without a full mask, are ``kwargs``."""
        held, mask = tuple(cache.kv_lengths()), kwargs.get("attention_mask")
        padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        known = prompt.sizes, prompt.end, prompt.encodings, prompt.follows
        return cls(images, padding, cache.get_seq_length(), held, *known)

    def call(
        self, graph: Graph, inputs: Sequence[Any], asks: Collection[str], reads_last: bool, model: Any
    ) -> tuple[Call | None, dict[str, str]]:
        """The call as its plan needs it, and which of the facts asked for are missing, with the reason.

        On the meta device, where it is not known which tokens are vision, there is no call.

        Args:
            graph, inputs: what was captured, and its flat inputs.
            asks: what the recipe's policies and edits ask for.
            reads_last: whether something is read at the last prompt token.
            model: whose call it is.

        Raises:
            ValueError: the encoder's features are wanted, and the images were encoded elsewhere; or the prompts whose
                end is known are not the call's.
        """
        merges = (program := program_of(graph)).anatomy.merges
        masks = {m.modality: x for m, x in zip(merges, program.vision_masks(*inputs), strict=True)}
        vision = functools.reduce(operator.or_, masks.values())
        names = {merge.modality: merge.name for merge in merges}
        whole = {m: self.images[m].lengths[name] for m, name in names.items()}
        found: dict[str, Any] = {}
        taken: dict[str, Tensor] = {}
        for m, name in names.items() if "encoder_features" in asks else ():
            one = hf.encoder_features(self.encodings, self.images[m].candidates[name], whole[m])
            if isinstance(one, str):
                found["encoder_features"] = one
            else:
                taken[m] = one
        if vision.is_meta:
            found["grid"] = hf.grids(model.config, whole.get("image", ()), None, queries=_queries(graph, model))
            return None, {name: fact for name, fact in found.items() if isinstance(fact, str)}
        end = ends = None
        padding = None if self.padding is None else self.padding[:, -vision.shape[1] :].bool().to(vision.device)
        if self.end is not None:
            end, here = hf.prompt_end_in(self.end.to(vision.device), len(vision), vision.shape[1], self.past)
            ends, end = None if reads_last else here, end if bool(here.all()) else None
        picked = hf.picked_of({m: sum(n) for m, n in whole.items()}, [(m, gm(*inputs)) for m, gm in program.picks])
        taken = {m: x[picked[m]] if m in picked else x for m, x in taken.items()}
        images, videos = hf.frames_of(whole, self.sizes.video_frames(), picked)
        call = Call(
            vision,
            padding,
            [*map(sum, images)],
            self.past,
            end,
            ends=ends,
            videos=masks.get("video"),
            video_lengths=[*map(sum, videos)],
            video_frames=videos,
            follows=self.follows,
            picked=any(len(places) < sum(whole[m]) for m, places in picked.items()),
        )
        if taken and "encoder_features" not in found:
            call.encoder_features = hf.in_order(taken, call.of_videos)
        if "grid" in asks:
            counts = call.counts
            given = counts.each, counts.are_videos, counts.rows, len(vision), self.sizes, call.picked
            found["grid"] = hf.frame_grids(model.config, *given, _queries(graph, model))
            call.grids = None if isinstance(found["grid"], str) else found["grid"]
        return call, {name: fact for name, fact in found.items() if isinstance(fact, str)}


def _queries(graph: Graph, model: Any) -> frozenset[int]:
    return graph.once("queries", lambda: hf.learned_queries(model))


class Layout(NamedTuple):
    """What a tensor is but for its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Any) -> Any:
        """The layout of a tensor; anything else as it is."""
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x

    @classmethod
    def of_all(cls, graph: Graph, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """That of each input of a graph; a parameter's is looked at once, since Dynamo makes another for another."""
        fixed = graph.once("layouts", lambda: [cls.of(x) if isinstance(x, nn.Parameter) else None for x in inputs])
        return tuple(cls.of(x) if known is None else known for known, x in zip(fixed, inputs, strict=True))


class LastCall(NamedTuple):
    """A call with an image that has run: what ran, what came out of it, the call, and what it was given.

    ``inputs`` are the captured graph's flat inputs, a :class:`Layout` for each tensor;
    ``autocast`` the dtype that operators were cast to, or None.
    """

    executable: Executable
    result: RunResult
    call: Call
    given: Given
    inputs: tuple[Any, ...]
    autocast: torch.dtype | None

    @property
    def program(self) -> Program:
        """What ran; of a dispatch, the program of the most demanding plan that a row followed."""
        whole, plan = self.executable.program, self.result.plan
        if whole.dispatch is None:
            return whole
        rewritten = (r for r, x in zip(whole.variants, whole.plan.variants, strict=True) if x is plan)
        return replace(whole, plan=plan, variants=tuple(rewritten), dispatch=None)

    @property
    def plans(self) -> list[Plan]:
        """Those that rows followed."""
        variants = self.executable.program.plan.variants
        return [variants[run.variant] for run in self.result.runs if run.kept] or [self.result.plan]

    @property
    def followed(self) -> list[tuple[Plan, Tensor]]:
        """The same, and which rows did, bool [B]; each row followed one."""
        rows = self.call.with_images
        kept = [torch.tensor(run.kept, device=rows.device) for run in self.result.runs if run.kept]
        masks = [torch.zeros_like(rows).index_fill(0, at, True) for at in kept] or [torch.ones_like(rows)]
        return list(zip(self.plans, masks, strict=True))

    def stages(self) -> list[Stage]:
        """Which vision tokens each run of layers worked on; see :func:`vlmrewrite.kept_tokens`."""
        of_layers = [tuple(plan.layers[i].run_set for plan in self.plans) for i in range(self.result.plan.depth)]
        return [
            Stage(
                " / ".join(dict.fromkeys(plan.render(s) for plan, s in zip(self.plans, sets, strict=True))),
                tuple(i for i, x in enumerate(of_layers) if x == sets),
                self.members(Vision & s for s in sets),
            )
            for sets in dict.fromkeys(of_layers)
        ]

    def members(self, sets: Iterable[TokenSet]) -> Tensor:
        """A set of each plan of ``followed``, in the rows that did, bool [B, T]."""
        each = zip(self.followed, sets, strict=True)
        return functools.reduce(
            operator.or_, (self.call.members(s, self.result.chosen) & rows[:, None] for (_, rows), s in each)
        )


@dataclass(frozen=True)
class Stage:
    """Vision tokens that a run of layers works on: ``vision`` bool [B, T], in the logical sequence."""

    name: str
    layers: tuple[int, ...]
    vision: Tensor
