"""What an engine does with prompts: caches, chunks, preemption, processes that die. Answers stay transformers's."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT, load
from examples.digits.scenes import held_out_questions
from tests.serving.engine import SECOND_RUNNER, ask, started
from tests.serving.test_vllm_families import CLOSE, RECIPES, STEPS, clear_rows, generated, picture, prompt, requests
from vlmrewrite.passes import DivPrune
from vlmrewrite.recipe import Recipe
from vlmrewrite.serving.vllm import overrides

RECIPE = Recipe(name="half", passes=(DivPrune(0.5),))
ARGS = {"model_impl": "transformers", "max_model_len": 256, "hf_overrides": overrides(RECIPE)}
LONG, ROWS = 48, 96
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


@pytest.fixture(scope="module")
def asked() -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Requests about scenes, several of each, and what transformers generates."""
    model, processor = load()
    scenes, found = held_out_questions(12), []
    model.generation_config.eos_token_id = None
    with vr.applied(model, RECIPE):
        for scene in scenes:
            inputs = processor(images=scene.image, text=f"<image> {scene.question}", return_tensors="pt")
            made = model.generate(**inputs, max_new_tokens=LONG, do_sample=False)
            found.append(made[0, inputs["input_ids"].shape[1] :].tolist())
    return [{"prompt": f"<image> {s.question}", "multi_modal_data": {"image": s.image}} for s in scenes], found


def tokens(batch: Any) -> list[list[int]]:
    assert not isinstance(batch, str), batch
    return [x["tokens"] for x in batch]


def same_start(found: list[list[int]], expected: list[list[int]]) -> bool:
    """Whether answers are alike up to their end; what a model says behind it is forced, and not looked at."""
    end = 2
    cut = [[x[: x.index(end) + 1] if end in x else x for x in rows] for rows in (found, expected)]
    return cut[0] == cut[1]


def test_prefixes_that_are_cached(asked: Any, tmp_path: Path) -> None:
    requests, expected = asked
    other = [{**requests[1], "multi_modal_data": requests[0]["multi_modal_data"]}]  # a known image, asked otherwise
    engine = {"model": CHECKPOINT, "args": ARGS | {"enable_prefix_caching": True}, "tokens": 4}
    plain = {**engine, "args": engine["args"] | {"enable_prefix_caching": False}}
    batches = [requests, requests, other]
    with_cache, without = ask(tmp_path, [{**engine, "batches": batches}, {**plain, "batches": batches}])
    first, second, asked_otherwise = with_cache["batches"]
    assert same_start(tokens(first), [x[:4] for x in expected]) and tokens(second) == tokens(first)
    assert all(x["cached"] >= 64 for x in second + asked_otherwise) and not any(
        x["cached"] for x in without["batches"][1]
    )
    assert [tokens(x) for x in without["batches"]] == [tokens(x) for x in with_cache["batches"]]


def test_chunks_in_a_process_of_its_own(asked: Any, tmp_path: Path) -> None:
    """Chunks of 40 tokens, so that an image of 72 tokens is cut into two or three."""
    requests, expected = asked
    args = ARGS | {"max_num_batched_tokens": 40, "enable_chunked_prefill": True, "max_num_seqs": 4}
    [found] = ask(tmp_path, [{"model": CHECKPOINT, "args": args, "batches": [requests], "tokens": 4}], apart=True)
    assert same_start(tokens(found["batches"][0]), [x[:4] for x in expected])


def test_prompts_that_are_preempted(tmp_path: Path) -> None:
    """Room for about three answers in the cache and eight at a time: some are put off and computed again.

    A model that never ends; the rows whose choices are the clearest, of several. In both of the engine's model runners.
    """
    from tests.serving.folders import saved

    model, processor, image = saved("qwen2_5_vl", tmp_path / "model")
    rows = [prompt(image, 1 + seed % 2, " w19 ", seed) for seed in range(ROWS)]
    with vr.applied(model, RECIPE):
        made = [generated(model, processor(images=i, text=t, return_tensors="pt"), LONG) for t, i in rows]
    clear = sorted(range(ROWS), key=lambda i: -made[i][2])[:8]
    assert made[clear[-1]][2] > CLOSE, [margin for *_, margin in made]
    asked, expected = requests([rows[i] for i in clear]), [made[i][1] for i in clear]
    assert len({tuple(x) for x in expected}) == 8 and all(len(x) == LONG for x in expected)
    small = {"num_gpu_blocks_override": 14, "disable_log_stats": False, "enable_prefix_caching": False}
    chunks = {"max_num_batched_tokens": 40, "enable_chunked_prefill": True}
    args = {"max_model_len": 256, "hf_overrides": overrides(RECIPE)}
    roomy = {"model": tmp_path / "model", "args": args, "batches": [asked], "tokens": LONG}
    tight = [roomy | {"args": args | small | more, "metrics": True} for more in ({}, chunks)]
    cached = roomy | {"args": args | {"enable_prefix_caching": True}, "batches": [asked, asked]}
    for settings in ({}, SECOND_RUNNER):
        found, again, *others = ask(tmp_path, [roomy, cached, *tight], settings=settings)
        assert tokens(found["batches"][0]) == expected
        assert [tokens(x) for x in again["batches"]] == [expected] * 2
        assert [any(x["cached"] for x in batch) for batch in again["batches"]] == [False, True]
        for other in others:
            assert other["metrics"]["vllm:num_preemptions"] > 0
            assert tokens(other["batches"][0]) == expected


@pytest.mark.skipif(len(CORES) < 2, reason="two processes want a core each")
def test_tensors_over_two_processes(tmp_path: Path) -> None:
    """Each has half of the heads, and chooses the same tokens as the other."""
    from tests.serving.folders import saved

    model, processor, image = saved("qwen2_5_vl", tmp_path / "model")
    rows, expected = clear_rows(model, processor, image, False, RECIPES[2:])
    args = {"max_model_len": 256, "tensor_parallel_size": 2}
    given = [args, args | {"hf_overrides": overrides(RECIPES[2])}]
    engines = [{"model": tmp_path / "model", "args": a, "batches": [requests(rows)], "tokens": STEPS} for a in given]
    found = ask(tmp_path, engines, apart=True, settings={"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, CORES[:2]))})
    for one, rows_expected in zip(found, expected, strict=True):
        assert "error" not in one, one.get("error")
        assert tokens(one["batches"][0]) == [made for _, made, _ in rows_expected]


def test_an_engine_that_is_killed_and_started_again(asked: Any, tmp_path: Path) -> None:
    """With all of its processes, while it answers."""
    requests, expected = asked
    engine = {"model": CHECKPOINT, "args": ARGS, "batches": [requests], "tokens": 4}
    long = engine | {"batches": [requests, requests * 100], "tokens": 150}
    with started(tmp_path / "killed", [long], apart=True) as process:
        while not (tmp_path / "killed" / "batch-0").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "answered.pickle").exists()
    [after] = ask(tmp_path, [engine], apart=True)
    assert same_start(tokens(after["batches"][0]), [x[:4] for x in expected])


def test_videos_are_left_as_they_are(tmp_path: Path) -> None:
    """As in an engine without a recipe; also beside images from which tokens are left out."""
    from tests.serving.folders import saved

    _, _, image = saved("qwen2_5_vl", tmp_path / "model")
    video = image.replace("image_pad", "video_pad")
    frames = np.stack([np.asarray(picture(i, (32, 32))) for i in range(4)])
    about = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3], "video_backend": "own"}
    text = f"w20 {video} w21 w22"
    data = {"video": [(frames, about | {"do_sample_frames": False})]}
    alone = {"prompt": text, "multi_modal_data": data}
    both = {"prompt": f"w23 {image} {text}", "multi_modal_data": data | {"image": picture(9, (48, 32))}}
    args = {"max_model_len": 256}
    few, most, every = (Recipe(name="some", passes=(DivPrune(keep),)) for keep in (0.25, 0.99, 1.0))
    engine = {"model": tmp_path / "model", "batches": [[alone, both]]}
    given = [args, *(args | {"hf_overrides": overrides(r)} for r in (few, most, every))]
    found = [x["batches"][0] for x in ask(tmp_path, [engine | {"args": a} for a in given])]
    assert [tokens(x)[0] for x in found] == [tokens(found[0])[0]] * 4
    plain, fewer, _, same = (x[1] for x in found)
    assert plain["tokens"] == same["tokens"] and plain["prompt"] == same["prompt"] > fewer["prompt"]
