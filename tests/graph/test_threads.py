"""Threads on rewritten models: each gets what it gets alone, and no setting of the process changes."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import queue
import sys
import threading

import pytest
import torch
import torch._dynamo
import torch.fx.experimental._config
from torch._dynamo.variables import lazy

import vlmrewrite as vr
from vlmrewrite.passes import DAPE, STS, FastV, Stride
from vlmrewrite.runtime import last_call, prompt_ends
from vlmrewrite.testing.models import FAMILIES, Row

pytestmark = pytest.mark.usefixtures("unshared")

HOW = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
RECIPES = {
    "fastv": [FastV(keep=2, at=1)],
    "sts": [STS(keep=6, refine=3, at=2, features="encoder")],
    "dispatch": "visor-policy",
}


def logits(model, inputs):
    return torch.stack(model.generate(**inputs, **HOW).logits, 1)


def settings():
    kind = getattr(lazy, "LazySymNodeFormatString", None)
    return (
        os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK"),
        torch._dynamo.config.specialize_float,
        torch._dynamo.config.assume_static_by_default,
        torch.compiler.is_compiling(),
        torch._dynamo.config.skip_nnmodule_hook_guards,
        torch._dynamo.config.recompile_limit,
        torch.fx.experimental._config.use_duck_shape,
        None if kind is None else kind.__repr__,
    )


def at_once(*jobs):
    """Run the jobs, functions without arguments, at once; their results, or the errors that they raised."""
    start, results, before = threading.Barrier(len(jobs)), [None] * len(jobs), sys.getswitchinterval()

    def run(i):
        try:
            start.wait()
            results[i] = jobs[i]()
        except BaseException as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    sys.setswitchinterval(1e-5)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(before)
    for error in (r for r in results if isinstance(r, BaseException)):
        raise error
    return results


@pytest.fixture(scope="module")
def tiny():
    return FAMILIES["llava"]()


@pytest.fixture(scope="module")
def prompts(tiny):
    few = [tiny.inputs([Row(1, 2, 3 + i)], seed=i) for i in range(3)]
    many = [tiny.inputs([Row(2, 5, 20 + i)], seed=10 + i) for i in range(3)]
    return few, many


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_thread_gets_what_it_gets_alone(tiny, prompts, recipe):
    model = tiny.model
    with vr.applied(model, RECIPES[recipe]):
        alone = [[logits(model, x) for x in xs] for xs in prompts]
        before = settings()

        def job(xs):
            return lambda: [[logits(model, x) for x in xs] for _ in range(4)]

        for got, expected in zip(at_once(*map(job, prompts)), alone, strict=True):
            for rounds in got:
                for a, b in zip(rounds, expected, strict=True):
                    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert settings() == before


@pytest.mark.slow
def test_what_was_kept_is_that_of_the_thread_that_asks(tiny, prompts):
    model = tiny.model

    def kept(x):
        with torch.no_grad():
            model(**x)
        return [s.vision for s in vr.kept_tokens(model)]

    with vr.applied(model, RECIPES["fastv"]):
        alone = [kept(xs[0]) for xs in prompts]
        rounds = at_once(*(lambda xs=xs: [kept(xs[0]) for _ in range(10)] for xs in prompts))
        for got, expected in zip(rounds, alone, strict=True):
            assert all(torch.equal(a, b) for one in got for a, b in zip(one, expected, strict=True))


def run(job):
    """Run a job in a thread that is started now, to its end."""
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()


class Worker:
    """A thread that stays, and does one job after another."""

    def __init__(self):
        self.jobs, self.done = queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        while (job := self.jobs.get()) is not None:
            self.done.put(job())

    def __call__(self, job):
        self.jobs.put(job)
        return self.done.get(timeout=300)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("asks", ["main", "another"])
def test_the_last_call_is_also_that_of_a_thread_started_since(tiny, prompts, asks):
    model, (x, y, z) = tiny.model, prompts[0]

    def told():
        stages, report = vr.kept_tokens(model), vr.report(model)
        assert report.call["length"] == stages[0].vision.shape[1]
        return stages[0].vision.shape[1]

    def check():
        length = {name: inputs["input_ids"].shape[1] for name, inputs in zip("xyz", (x, y, z), strict=True)}
        model(**x)
        run(lambda: model.generate(**y, **HOW))  # as a streamer does
        assert told() == length["y"]
        worker = Worker()  # as a streamer does, whose thread is not waited for
        worker(lambda: model.generate(**z, **HOW))
        assert told() == length["z"]
        model(**x)
        assert told() == length["x"]
        worker(lambda: model(**y))  # beside this thread since before its call
        assert told() == length["x"]
        assert worker(told) == length["y"]
        run(lambda: run(lambda: model(**z)))
        assert told() == length["z"]
        worker.jobs.put(None)

    with vr.applied(model, RECIPES["fastv"]):
        if asks == "main":
            check()
        else:
            at_once(torch.no_grad()(check))


@torch.no_grad()
def test_a_thread_that_made_no_call_is_told_of_the_newest(tiny, prompts):
    model, found = tiny.model, []
    with vr.applied(model, RECIPES["fastv"]):
        for x in prompts[0][:2]:
            model(**x)
            run(lambda: found.append(vr.kept_tokens(model)[0].vision.shape[1]))
    assert found == [x["input_ids"].shape[1] for x in prompts[0][:2]]


@torch.no_grad()
def test_the_ends_of_prompts_reach_another_thread_in_a_copy_of_the_context(tiny, prompts):
    model, x, found = tiny.model, prompts[0][0], []
    end = torch.tensor([x["input_ids"].shape[1] - 3])

    def job():
        with torch.no_grad():
            model(**x)
        found.append(last_call(model)[1].last.item())

    with vr.applied(model, RECIPES["fastv"]), prompt_ends(model, end):
        job()
        run(job)
        run(functools.partial(contextvars.copy_context().run, job))
        asyncio.run(asyncio.to_thread(job))  # which copies the context
    assert found == [int(end), int(end) + 2, int(end), int(end)]


@pytest.mark.slow
def test_first_calls_at_once_capture_and_rewrite_once(prompts):
    tiny = FAMILIES["llava"]()
    with vr.applied(tiny.model, [Stride(keep=4)]):
        got = at_once(*(lambda xs=xs: logits(tiny.model, xs[0]) for xs in prompts))
        for one, xs in zip(got, prompts, strict=True):
            torch.testing.assert_close(one, logits(tiny.model, xs[0]), atol=1e-5, rtol=1e-5)
        assert vr.report(tiny.model).graphs["captured"] <= 2


@pytest.mark.slow
def test_threads_on_models_of_their_own(prompts):
    models, before = {"llava": [FastV(keep=2, at=1)], "qwen2_5_vl": [DAPE(budget=0.5)]}, settings()
    made = {name: FAMILIES[name](layers=3) for name in models}
    inputs = {name: t.inputs([Row(1, 2, 3), Row(2, 1, 4)], seed=3) for name, t in made.items()}
    alone = {}
    for name, recipe in models.items():
        twin = FAMILIES[name](layers=3)
        twin.model.load_state_dict(made[name].model.state_dict())
        with vr.applied(twin.model, recipe):
            alone[name] = logits(twin.model, inputs[name])
        vr.apply(made[name].model, recipe)
    got = at_once(*(lambda n=n: [logits(made[n].model, inputs[n]) for _ in range(3)] for n in models))
    for name, rounds in zip(models, got, strict=True):
        for one in rounds:
            torch.testing.assert_close(one, alone[name], atol=1e-5, rtol=1e-5)
    assert settings() == before


def test_nothing_changes_while_a_captured_call_runs(tiny, prompts):
    model, before, done, seen = tiny.model, settings(), threading.Event(), set()

    def work():
        for x in prompts[0] * 3:
            logits(model, x)
        done.set()

    def watch():
        while not done.is_set():
            seen.add(settings())

    with vr.applied(model, [Stride(keep=4)]):
        for x in prompts[0]:
            logits(model, x)
        captured = vr.report(model).graphs["captured"]
        at_once(work, watch)
        assert vr.report(model).graphs["captured"] == captured
    assert seen == {before}
