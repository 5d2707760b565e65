"""A hand-written loop over a decoder's own layer modules, on the tokens that a recipe's plan kept in a call.

It is what somebody would write who knew beforehand which tokens are kept: selecting costs it nothing. It walks the plan
(which tokens each layer runs on, sees, and takes through the MLP; edits; branches), not the passes, and calls the
model's own modules with transformers' own sdpa attention, and a plain list of keys and values. How long it takes beside
the rewritten model says what the rewrite costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmrewrite.bench.steps import Places, Set, Step, steps_of
from vlmrewrite.runtime import session_of

DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
"""Modules that the loop knows: of a decoder, of its layers and of their attention, where the norms are optional."""

Rope = tuple[Tensor, Tensor]


@dataclass
class Keys:
    """Keys and values [B, Hk, m, D] of each layer, and which of them are real, bool [B, m] (None: all)."""

    length: int = 0
    layers: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def get_seq_length(self, *_: Any) -> int:
        """Tokens of the prompt and behind it, kept or not: what positions of a next one go by."""
        return self.length


class NativeLoop:
    """The loop for the last call of a rewritten model.

    Args:
        model: a model at work under a recipe, that made a call with an image.

    Raises:
        ValueError: the decoder has other modules than the loop knows, the prompt is padded, or the plan has something
            that the loop has no meaning for.
    """

    def __init__(self, model: Any) -> None:
        last = session_of(model).last()
        self.model, self.decoder = model, model.get_decoder()
        _refuse_unknown(self.decoder)
        call, chosen = last.call, last.result.chosen
        if call.past or (call.padding is not None and not bool(call.padding.all())):
            raise ValueError("the native loop expects a whole prompt without padding")
        self.groups: list[tuple[Tensor | None, list[Step]]] = []
        """Rows that followed one plan, int64 [b] (None: all), and what each layer does with them."""
        for plan, rows in last.followed:
            at = rows.nonzero()[:, 0]
            some = {s: x[call.tokens_of(at)] for s, x in chosen.items()}
            whole = bool(rows.all())
            steps = steps_of(plan, call if whole else call.of_rows(at), some, last.program.blocks)
            self.groups.append((None if whole else at, steps))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """While the block runs, the model's decoder is the loop; the model must not be under a recipe."""
        own = vars(self.decoder)
        own["forward"] = self._forward
        try:
            yield self.model
        finally:
            del own["forward"]

    def _forward(
        self, inputs_embeds: Tensor, position_ids: Tensor | None = None, past_key_values: Any = None, **_: Any
    ) -> Any:
        """The decoder's forward: normed hidden states of the last token, [B, 1, H]."""
        known = isinstance(past_key_values, _Caches)  # or an empty cache that the model made
        caches = past_key_values.parts if known else [Keys() for _ in self.groups]
        past = caches[0].length
        if position_ids is None:
            columns = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = columns.expand(len(inputs_embeds), -1)
        if position_ids.dim() == 3 and len(position_ids) == 4:
            position_ids = position_ids[1:]  # time, height and width; what stands before them is for masks
        out = inputs_embeds.new_empty(len(inputs_embeds), 1, inputs_embeds.shape[2])
        for (rows, steps), cache in zip(self.groups, caches, strict=True):
            x = inputs_embeds if rows is None else inputs_embeds[rows]
            positions = position_ids if rows is None else position_ids[..., rows, :]
            rope = self.decoder.rotary_emb(x, position_ids=positions)
            x = self._prefill(x, rope, steps, cache) if not past else self._decode(x, rope, cache)
            cache.length += inputs_embeds.shape[1]
            if rows is None:
                out = x
            else:
                out[rows] = x
        held = _Caches(past + inputs_embeds.shape[1])
        held.parts = caches
        return BaseModelOutputWithPast(last_hidden_state=self.decoder.norm(out), past_key_values=held)  # type: ignore[arg-type]

    def _prefill(self, merged: Tensor, rope: Rope, steps: Sequence[Step], cache: Keys) -> Tensor:
        x, away = merged.clone(), dict[int, Tensor]()
        ropes, masks = _once(lambda s: tuple(s.of(part) for part in rope)), _once(_mask)
        for module, step in zip([*self.decoder.layers, None], steps, strict=True):
            x = step.held.take(x)
            for branch, places in step.back:
                x = places.put(x, away.pop(branch))
            for edit, places in step.edits:
                x = places.put(x, edit(places.take(x), x, merged))
            for branch, places, block, at_once in step.leave:
                hidden, whole = places.take(x), Places(places.tokens, None)
                if block is not None:
                    hidden, _ = _layer(
                        block, hidden, whole, whole, None, None, ropes, masks(places.tokens, places.tokens)
                    )
                away[branch] = hidden
                if at_once:
                    x = places.put(x, away.pop(branch))
            if module is None:
                return x
            mask = masks(step.run.tokens, step.keys.tokens)
            hidden, held = _layer(module, x, step.run, step.keys, step.inner, step.mlp, ropes, mask)
            x = step.run.put(x, hidden)
            cache.layers.append((*held, step.keys.tokens.valid))
        raise AssertionError("steps end behind the last layer")

    def _decode(self, x: Tensor, rope: Rope, cache: Keys) -> Tensor:
        if x.shape[1] != 1:
            raise ValueError(f"the native loop decodes one token at a time, got {x.shape[1]}")
        everything = Places(Set(torch.arange(x.shape[1], device=x.device).expand(len(x), -1), None, True), None)
        for i, (module, (k, v, valid)) in enumerate(zip(self.decoder.layers, cache.layers, strict=True)):
            if valid is not None:
                valid = torch.cat([valid, valid.new_ones(len(x), x.shape[1])], 1)
            mask = None if valid is None else valid[:, None, None]
            x, held = _layer(module, x, everything, everything, None, None, lambda _: rope, mask, (k, v))
            cache.layers[i] = (*held, valid)
        return x


class _Caches(Keys):
    """What the model carries from call to call: a cache for each group of rows."""

    parts: list[Keys]


def _layer(
    module: Any,
    x: Tensor,
    run: Places,
    keys: Places,
    inner: Places | None,
    mlp: Places | None,
    ropes: Callable[..., Any],
    mask: Tensor | None,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer: what becomes of the tokens that it runs on [B, n, H], and its keys and values."""
    attn, hidden = module.self_attn, run.take(x)
    if run.tokens is keys.tokens:
        asks = answers = module.input_layernorm(hidden)
    else:
        answers = module.input_layernorm(keys.take(x))
        asks = module.input_layernorm(hidden) if inner is None else inner.take(answers)
    q = _rotated(_heads(attn, "q", asks), ropes(run.tokens))
    k, v = _rotated(_heads(attn, "k", answers), ropes(keys.tokens)), _heads(attn, "v", answers)
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](attn, q, k, v, mask, dropout=0.0, scaling=attn.scaling)
    hidden = hidden + attn.o_proj(out.flatten(2))
    if mlp is None:
        return hidden + module.mlp(module.post_attention_layernorm(hidden)), (k, v)
    some = mlp.take(hidden)
    return mlp.put(hidden, some + module.mlp(module.post_attention_layernorm(some))), (k, v)


def _heads(attn: Any, name: str, x: Tensor) -> Tensor:
    """Queries, keys or values of some tokens, [B, H, n, D]."""
    made = getattr(attn, f"{name}_proj")(x).unflatten(-1, (-1, attn.head_dim))
    norm = getattr(attn, f"{name}_norm", None)
    return (made if norm is None else norm(made)).transpose(1, 2)  # type: ignore[no-any-return]


def _rotated(x: Tensor, rope: Rope) -> Tensor:
    """Rotary positions on x [B, H, n, D], the halves of D turned against each other."""
    cos, sin = (part[:, None] for part in rope)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _mask(run: Set, keys: Set) -> Tensor | None:
    """Which keys each query sees, bool [B, 1, n, m]; None: plain causal."""
    if run is keys and keys.valid is None:
        return None
    seen = keys.columns[:, None, None] <= run.columns[:, None, :, None]
    return seen if keys.valid is None else seen & keys.valid[:, None, None]


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes what it makes of the same sets once."""
    known: dict[tuple[int, ...], Any] = {}

    def made(*sets: Set) -> Any:
        key = tuple(map(id, sets))
        if key not in known:
            known[key] = make(*sets)
        return known[key]

    return made


def _refuse_unknown(decoder: Any) -> None:
    """Raise ValueError for a decoder that is not made of the modules that the loop knows."""
    _refuse_others(decoder, DECODER)
    for layer in decoder.layers:
        _refuse_others(layer, LAYER)
        _refuse_others(layer.self_attn, ATTENTION, {"q_norm", "k_norm", "rotary_emb"})


def _refuse_others(module: nn.Module, known: set[str], optional: Iterable[str] = ()) -> None:
    found = {name for name, _ in module.named_children()}
    if wrong := (known - found - {*optional}) | (found - known):
        raise ValueError(
            f"the native loop expects {type(module).__name__} to be made of {', '.join(sorted(known))};"
            f" {', '.join(sorted(wrong))} is not as expected, found {', '.join(sorted(found))}"
        )
