"""Turns of a conversation on a kept cache: what is chosen does not go by how much of it a call is given again."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import vlmrewrite as vr
from vlmrewrite.hf import Sizes
from vlmrewrite.passes import FastV
from vlmrewrite.runtime import last_call
from vlmrewrite.runtime.facts import Given
from vlmrewrite.runtime.session import _at_the_end
from vlmrewrite.testing.models import Row

TURNS = {
    "one row": ([[Row(1, 2, 3)], [Row(1, 2, 8)], [Row(1, 1, 1)]], "left"),
    "a short turn first": ([[Row(0, 1, 2)], [Row(2, 2, 8)]], "left"),
    "padded on the left": ([[Row(1, 2, 3), Row(1, 1, 9)], [Row(1, 6, 8), Row(1, 1, 2)]], "left"),
    "padded on the right": ([[Row(1, 2, 3), Row(1, 1, 9)], [Row(1, 6, 8), Row(1, 1, 2)]], "right"),
}

WAYS = {
    "whole ids": lambda _, ids, past: {"input_ids": ids},
    "new ids": lambda _, ids, past: {"input_ids": ids[:, past:]},
    "by position": lambda _, ids, past: {"inputs": ids[:, past:]},
    "embeddings": lambda model, ids, _: {"inputs_embeds": model.get_input_embeddings()(ids)},
}


def chat(model, turns, given, new=2, **how):
    """A conversation: of each turn with an image the tokens, the last prompt token and what was kept."""
    cache, said, mask, told = DynamicCache(), None, None, []
    how |= {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "past_key_values": cache}
    for x in turns:
        ids, real = x["input_ids"], x["attention_mask"]
        said, mask = (ids, real) if said is None else (torch.cat([said, ids], 1), torch.cat([mask, real], 1))
        rest = {k: v for k, v in x.items() if k != "input_ids"} | {"attention_mask": mask}
        tokens = model.generate(**WAYS[given](model, said, cache.get_seq_length()), **rest, **how)[:, -new:]
        said, mask = torch.cat([said, tokens], 1), torch.nn.functional.pad(mask, (0, new), value=1)
        if "pixel_values" in x:
            told.append([tokens, last_call(model)[1].last, *(s.vision for s in vr.kept_tokens(model))])
    return told


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:inputs_embeds were given without images")
@pytest.mark.parametrize("name", TURNS)
def test_new_tokens_on_a_kept_cache_are_as_the_whole_conversation(llava, name):
    rows, side = TURNS[name]
    turns = [llava.inputs(x, side=side, seed=i) for i, x in enumerate(rows)]
    with vr.applied(llava.model, [FastV(keep=2, at=1)]):
        whole = chat(llava.model, turns, "whole ids")
        for x, (_, last, *_) in zip([t for t in turns if "pixel_values" in t], whole, strict=True):
            end = (torch.arange(x["attention_mask"].shape[1]) * x["attention_mask"]).amax(1)
            assert set((last[:, 0] - end).tolist()) in ({0}, {1})  # behind the last token of the turn before
        for given in ("new ids", "by position", "embeddings"):
            for got, expected in zip(chat(llava.model, turns, given), whole, strict=True):
                assert all(map(torch.equal, got, expected))


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize("name", TURNS)
def test_every_beam_keeps_what_the_row_keeps_alone(llava, name):
    """The beams of a turn have one past: what they add, a token, is in no cache yet.

    Only new ids are given: of whole ones, transformers gives beams the wrong images, of the unmodified model too.
    """
    rows, side = TURNS[name]
    turns = [llava.inputs(x, side=side, seed=i) for i, x in enumerate(rows)]
    with vr.applied(llava.model, [FastV(keep=2, at=1)]):
        alone, beams = (chat(llava.model, turns, "new ids", new=1, num_beams=n) for n in (1, 2))
    for (tokens, *got), (expected_tokens, *expected) in zip(beams, alone, strict=True):
        assert torch.equal(tokens, expected_tokens)
        for one, x in zip(got, expected, strict=True):
            assert torch.equal(one, x.repeat_interleave(2, 0))


@pytest.mark.slow
def test_where_a_prompt_ends_is_counted_with_what_the_cache_holds():
    given = Given({}, None, past=5, held=(), sizes=Sizes(), end=torch.tensor([8]), encodings=[])
    for keep, there in ((1, False), (2, False), (3, True), (6, True)):
        assert _at_the_end({"input_ids": torch.zeros(1, 6)}, given, keep) is there
