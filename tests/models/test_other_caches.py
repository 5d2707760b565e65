"""Caches of other kinds that `generate()` of a rewritten model is asked to make."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import vlmrewrite as vr
from vlmrewrite.passes import STS
from vlmrewrite.testing.models import Row

ONE, SOME = [Row(1, 2, 3)], [STS(keep=6, refine=3, at=2)]
GREEDY = {"do_sample": False, "max_new_tokens": 3}


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static", "quantized", "paged"])
@pytest.mark.parametrize("where", ["call", "config of the call", "config"])
def test_caches_that_generate_would_make_are_refused_before_they_are(llava, name, where, monkeypatch):
    """Made, they ask for a GPU, or for packages that would not help."""
    model, how = llava.model, GREEDY | llava.inputs(ONE, seed=13)
    if where == "call":
        how["cache_implementation"] = name
    elif where == "config of the call":
        how["generation_config"] = GenerationConfig(cache_implementation=name)
    else:
        monkeypatch.setattr(model.generation_config, "cache_implementation", name)
    with vr.applied(model, SOME):
        with pytest.raises(NotImplementedError, match=f"^cache_implementation='{name}': .*; leave it out"):
            model.generate(**how)
        if where == "config":
            monkeypatch.undo()
            model.generate(**how, cache_implementation="static")


def test_an_implementation_without_a_cache_plays_no_part(llava):
    how = GREEDY | llava.inputs(ONE, seed=13)
    with vr.applied(llava.model, SOME):
        expected = llava.model.generate(**how, use_cache=False)
        assert torch.equal(llava.model.generate(**how, use_cache=False, cache_implementation="offloaded"), expected)


def test_continuous_batching_is_refused(llava):
    with vr.applied(llava.model, SOME), pytest.raises(ValueError, match="continuous batching shares one"):
        llava.model.generate_batch([[5, 6]], max_new_tokens=1)
