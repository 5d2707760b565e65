"""Engines of vLLM in a process of their own: ``python -m tests.serving.engine ASKED ANSWERED``, both pickles.

vLLM changes classes of transformers, so that a process with an engine cannot judge it.
"""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "vlmrewrite",
}


def ask(folder: Path, engines: list[dict[str, Any]], *, apart: bool = False, check: bool = True) -> list[Any]:
    """What engines answer, one engine after the other.

    Args:
        folder: for the files.
        engines: of each ``model``, ``args`` of ``vllm.LLM`` and ``batches`` of requests; optionally ``tokens``, how many
            are generated.
        apart: each engine has a process of its own, as `vllm serve` has; what is kept is not seen then.
        check: whether the process must end well.

    Returns:
        Of each engine ``batches``, and ``kept``, the places that are kept of each image that was encoded; or ``error``.
    """
    asked, answered = folder / "asked.pickle", folder / "answered.pickle"
    asked.write_bytes(pickle.dumps(engines))
    answered.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.serving.engine", str(asked), str(answered)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/serving/site"), os.environ.get("PYTHONPATH", "")])
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart)), "PYTHONPATH": path}
    done = subprocess.run(command, env=os.environ | SETTINGS | own, capture_output=True, text=True, cwd=ROOT)
    if not answered.exists() and check:
        raise AssertionError(f"{done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    found: list[Any] = pickle.loads(answered.read_bytes())
    for one in found:
        one["log"] = done.stdout + done.stderr
    return found


def _answers(engine: dict[str, Any]) -> dict[str, Any]:
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
    for requests in engine["batches"]:
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
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return {"batches": batches, "kept": kept, "metrics": metrics}


def _main() -> None:
    asked, answered = map(Path, sys.argv[1:])
    found = [_answers(engine) for engine in pickle.loads(asked.read_bytes())]
    answered.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    _main()
