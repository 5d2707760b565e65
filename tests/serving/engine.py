"""Engines of vLLM in a process of their own: ``python -m tests.serving.engine FOLDER``.

vLLM changes classes of transformers, so that a process with an engine cannot judge it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LIMIT = 900
"""Seconds that the engines of one call may take; a test's take up to 300 on two cores."""

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "vlmrewrite",
}

SECOND_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
"""vLLM's second model runner, which needs Triton: on a CPU its kernels run in Triton's interpreter (see ``site``)."""


@contextlib.contextmanager
def started(
    folder: Path, engines: list[dict[str, Any]], *, apart: bool, settings: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process with engines; as the block ends, it and all of its processes are killed, if they are still there.

    They end as well if this process is killed: what is written to the other's standard input comes to an end then.
    """
    folder.mkdir(exist_ok=True)
    (folder / "asked.pickle").write_bytes(pickle.dumps(engines))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/serving/site"), os.environ.get("PYTHONPATH", "")])
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart)), "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.serving.engine", str(folder)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | SETTINGS | own | dict(settings or {}),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(LIMIT)
            process.stdin.close()  # type: ignore[union-attr]


def ask(
    folder: Path, engines: list[dict[str, Any]], *, apart: bool = False, settings: Mapping[str, str] | None = None
) -> list[Any]:
    """What engines answer, one engine after the other.

    Args:
        folder: for the files.
        engines: of each ``model``, ``args`` of ``vllm.LLM`` and ``batches`` of requests; optionally ``tokens``, how
            many are generated, ``ignore_eos``, and ``metrics``, whether the engine's counters are wanted.
        apart: each engine has a process of its own, as `vllm serve` has; what is kept is not seen then.
        settings: further variables of the environment.

    Returns:
        Of each engine ``batches``; ``kept``, the places that are kept of each image that was encoded; and ``runner``,
        the module of what runs the model; or ``error``.
    """
    with started(folder, engines, apart=apart, settings=settings) as process:
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no answer after {LIMIT} s: {(folder / 'log').read_text()[-8000:]}") from None
    assert code == 0, (code, (folder / "log").read_text()[-8000:])
    found: list[Any] = pickle.loads((folder / "answered.pickle").read_bytes())
    return found


def _answers(engine: dict[str, Any], folder: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from vlmrewrite.serving import BeforeDecoder

    kept, choose = list[list[int]](), BeforeDecoder.choose

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = choose(self, *args, **kwargs)
        kept.extend(x.indices.tolist() for x in found)
        return found

    BeforeDecoder.choose = noted  # type: ignore[method-assign]
    args = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_num_seqs": 8, "seed": 0}
    try:
        llm = LLM(str(engine["model"]), **args | engine["args"])
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"}
    finally:
        BeforeDecoder.choose = choose  # type: ignore[method-assign]
    BeforeDecoder.choose = noted  # type: ignore[method-assign]
    kept.clear()
    batches: list[Any] = []
    how = SamplingParams(temperature=0, max_tokens=engine.get("tokens", 8), ignore_eos=engine.get("ignore_eos", True))
    for i, requests in enumerate(engine["batches"]):
        if i:
            (folder / f"batch-{i - 1}").touch()
        try:
            made = llm.generate(requests, how, use_tqdm=False)
        except Exception as e:
            batches.append(f"{type(e).__name__}: {e}")
            continue
        batches.append(
            [
                {
                    "tokens": list(x.outputs[0].token_ids),
                    "text": x.outputs[0].text,
                    "prompt": len(x.prompt_token_ids),
                    "cached": x.num_cached_tokens,
                }
                for x in made
            ]
        )
    BeforeDecoder.choose = choose  # type: ignore[method-assign]
    metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()} if engine.get("metrics") else {}
    worker = getattr(getattr(llm.llm_engine, "model_executor", None), "driver_worker", None)
    runner = None if worker is None else type(worker.worker.model_runner).__module__
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return {"batches": batches, "kept": kept, "metrics": metrics, "runner": runner}


def _end_with_the_test() -> None:
    """Kill this process and its own when there is nobody left to ask it."""
    with open(0, "rb", closefd=False) as nothing:
        nothing.read()
    os.killpg(0, signal.SIGKILL)


def _main() -> None:
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    folder = Path(sys.argv[1])
    found = [_answers(engine, folder) for engine in pickle.loads((folder / "asked.pickle").read_bytes())]
    (folder / "answered.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    _main()
