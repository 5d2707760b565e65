"""Decode steps on a static cache as CUDA graphs run them: what the first one was given is read at every one.

There is no GPU here. What Inductor hands over to be recorded as a CUDA graph, if it finds nothing against that, is run
on a CPU as a recorded graph is: at the addresses and with the numbers of the first step, whatever is given later.
Static inputs are read where they are; all else that is a tensor is copied to where the first step had it.
"""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
from torch._inductor import cudagraph_utils

import vlmrewrite as vr
from tests.small import long
from vlmrewrite.passes import STS
from vlmrewrite.runtime import executables
from vlmrewrite.testing.models import FAMILIES, Row

Policy = getattr(cudagraph_utils, "CUDAGraphPolicy", None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(Policy is None, reason="this torch has no CUDAGraphPolicy")]

TOLD = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 6}
CASES = [("llava", "inductor"), ("llava", "inductor-whole"), ("gemma3", "inductor")]


class Recorded:
    """One compiled piece, and what each of its graphs was recorded with: one for each choice of places and numbers."""

    def __init__(self, call, static, mutated):
        assert set(mutated) <= set(static), "what is written to may move, and is not recorded"
        self.call, self.static, self.graphs, self.calls = call, set(static), {}, 0

    def __call__(self, inputs):
        self.calls += 1
        given, tensors = [*inputs], {i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)}
        inputs.clear()
        moving = tensors - self.static
        key = tuple(x.data_ptr() if i in self.static else x for i, x in enumerate(given) if i not in moving)
        if key not in self.graphs:
            self.graphs[key] = [x.clone() if i in moving else x for i, x in enumerate(given)]
        held = self.graphs[key]
        for i in moving:
            held[i].copy_(given[i])
        return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in self.call([*held]))


@pytest.fixture
def recorded(monkeypatch, unshared):
    """The pieces that are handed over; prefills run without a compiler."""
    made = []

    class Replayed(Policy):
        def should_wrap(self, compiled_graph):
            compiled_graph.device_idxs = {0}
            return True

        def cudagraphify(self, model, example_inputs, static_input_idxs, *, mutated_input_idxs, **_):
            made.append(Recorded(model, static_input_idxs, mutated_input_idxs))
            return made[-1]

    monkeypatch.setattr(executables, "resolve", lambda *_: "eager")
    monkeypatch.setattr(cudagraph_utils, "check_lowering_disable_cudagraph", lambda _: None)  # the device alone
    how = {"triton.cudagraphs": True, "graph_partition": False, "cudagraph_policy": Replayed(), "fx_graph_cache": False}
    with torch._inductor.config.patch(how):
        yield made


@pytest.mark.parametrize(("name", "backend"), CASES if long() else CASES[:2])
def test_a_step_that_is_recorded_once_is_every_step(name, backend, recorded):
    tiny = FAMILIES[name](layers=4)
    tiny.model.to(torch.float64).requires_grad_(False)
    inputs = tiny.inputs([Row(1, 2, 3), Row(2, 1, 4)], side="left")
    recipe = [STS(keep=6, refine=3, at=1)]
    with torch.no_grad(), vr.applied(tiny.model, recipe, backend="eager"):
        expected = tiny.model.generate(**inputs, **TOLD)
    with torch.no_grad(), vr.applied(tiny.model, recipe, backend=backend):
        for turns in (1, 2):  # another cache lies elsewhere: its graphs are others
            got = tiny.model.generate(**inputs, **TOLD, cache_implementation="static")
            assert torch.equal(got.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)
            for piece in recorded:
                assert piece.calls == 5 * turns * (a_step := piece.calls // (5 * turns))
                assert len(piece.graphs) <= a_step * turns
    assert (len(recorded) == 1) == (backend == "inductor-whole")
