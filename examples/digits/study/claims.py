"""What the papers say, measured on a pretrained model with data sets of lmms-eval: for whoever has both.

    python -m examples.digits.study.claims llava-hf/llava-1.5-7b-hf --output claims-out --dtype float16 --device cuda

It reads the data sets by ``datasets`` (pip install datasets), with the prompts of lmms-eval, asks ``-n`` questions of
each by ``vlmrewrite.evaluate``, which goes on where a run was cut off, and writes ``claims.md``: of every claim the
paper's number and the one found. ``--blocks`` names a folder that ``vlmrewrite train --recipe dpvr`` wrote.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlmrewrite as vr
from vlmrewrite.evaluate import Evaluation, write_whole
from vlmrewrite.passes import VISOR

from .configurations import CONFIGURATIONS, LAYERS, at_depth

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
Row = dict[str, Any]
Load = Callable[[str, str | None, str], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True)
class Source:
    """A data set: where it is, its metric, and how a document of it becomes a row (None: it is left out)."""

    path: str
    config: str | None
    split: str
    metric: str
    row: Callable[[Mapping[str, Any]], Row | None]


def _asked(doc: Mapping[str, Any], prompt: str, **answer: Any) -> Row:
    return {"image": doc["image"].convert("RGB"), "prompt": prompt, **answer}


def _science(doc: Mapping[str, Any]) -> Row | None:
    if doc["image"] is None:
        return None
    options = "\n".join(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(doc["choices"]))
    context = f"Context: {doc['hint']}\n" if doc["hint"] else ""
    answer = chr(65 + doc["answer"])
    return _asked(doc, f"{context}{doc['question']}\n{options}{LETTER}", choices=list(doc["choices"]), answer=answer)


def _short(doc: Mapping[str, Any]) -> Row:
    return _asked(doc, doc["question"].strip() + SHORT, answer=doc["answer"])


def _several(doc: Mapping[str, Any]) -> Row:
    return _asked(doc, doc["question"].capitalize() + SHORT, answers=list(doc["answers"]))


SOURCES = {
    "gqa": Source("lmms-lab/GQA", "testdev_balanced_instructions", "testdev", "exact", _short),
    "pope": Source("lmms-lab/POPE", None, "test", "exact", _short),
    "textvqa": Source("lmms-lab/textvqa", None, "validation", "vqa", _several),
    "scienceqa": Source("lmms-lab/ScienceQA", "ScienceQA-IMG", "test", "choice", _science),
    "docvqa": Source("lmms-lab/DocVQA", "DocVQA", "validation", "anls", _several),
}

STS = {"sts-128": 0.994, "sts-64": 0.980, "sts-32": 0.960}
"""Share of the unmodified score that is retained, arXiv 2606.03569, LLaVA-1.5-7B."""
DPVR = 1.009
"""The same, arXiv 2606.09131: .663 to .657, mean of six benchmarks."""
CLOCK = 0.96
"""Share of the FLOP ratio that AnchorPrune reaches by the clock."""


def rows_of(name: str, n: int, load: Load) -> list[Row]:
    """The first ``n`` rows of a data set of ``SOURCES`` that have a picture.

    Args:
        name: a key of ``SOURCES``.
        n: rows.
        load: of a path, a configuration and a split gives the documents, as ``datasets.load_dataset`` does.
    """
    source = SOURCES[name]
    pictures: dict[Any, Any] = {}
    if name == "gqa":
        pictures = {d["id"]: d["image"] for d in load(source.path, "testdev_balanced_images", source.split)}
    found: list[Row] = []
    for doc in load(source.path, source.config, source.split):
        if len(found) == n:
            break
        row = source.row({**doc, "image": pictures[doc["imageId"]]} if pictures else doc)
        if row is not None:
            found.append(row | {"kind": name})
    return found


def visor(depth: int) -> list[vr.Recipe]:
    """The thirteen configurations at this depth, all other layers cross layers."""
    out = []
    for layers in CONFIGURATIONS:
        own = at_depth(layers, depth)
        passes = (VISOR(self_layers=own, cross_layers=tuple(i for i in range(depth) if i not in own)),)
        out.append(vr.Recipe(name="visor-" + "-".join(map(str, layers)), passes=passes))
    return out


def retained(done: Mapping[str, Evaluation], recipe: str) -> float | None:
    """Mean over the data sets of a recipe's score as a share of the unmodified model's; None if it was not asked."""
    shares = []
    for one in done.values():
        found = next((row for row in one.rows if row.recipe == recipe), None)
        if found is None or not one.rows[0].accuracy:
            return None
        shares.append(found.accuracy / one.rows[0].accuracy)
    return sum(shares) / len(shares)


def clock(done: Mapping[str, Evaluation], recipe: str) -> float | None:
    """Speed of the prefill as a share of the FLOP ratio, mean over the data sets; None if it was not asked."""
    rows = [row for one in done.values() for row in one.rows if row.recipe == recipe]
    shares = [row.prefill * row.flops for row in rows if row.prefill is not None and row.flops is not None]
    return sum(shares) / len(shares) if shares else None


def table(done: Mapping[str, Evaluation], blocks: str | None) -> str:
    """Every claim beside what was found, in Markdown."""

    def told(x: float | None) -> str:
        return "not measured" if x is None else f"{100 * x:.1f} %"

    lines = ["| claim | paper | here |", "|---|---|---|"]
    lines += [
        f"| `{name}`: score retained | {told(paper)} | {told(retained(done, name))} |" for name, paper in STS.items()
    ]
    found = None if blocks is None else retained(done, blocks)
    lines.append(f"| DPVR, trained: score retained | {told(DPVR)} | {told(found)} |")
    names = [row.recipe for row in next(iter(done.values())).rows if row.recipe.startswith("visor-")]
    lines += [
        f"| VISOR, self layers {n[6:]} of {LAYERS}: score retained | | {told(retained(done, n))} |" for n in names
    ]
    lines.append(f"| prefill by the clock, share of the FLOP ratio | {told(CLOCK)} | {told(clock(done, 'sts-64'))} |")
    return "\n".join(lines) + "\n"


def _hub(path: str, config: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise ImportError("the data sets are read by datasets: pip install datasets") from None
    found: Iterable[Mapping[str, Any]] = datasets.load_dataset(path, config, split=split)
    return found


def claims(args: argparse.Namespace, load: Load = _hub) -> str:
    """Ask, and write ``claims.md`` and ``claims.json``."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model, processor = model.to(args.device).eval(), AutoProcessor.from_pretrained(args.model)
    depth = model.config.get_text_config().num_hidden_layers
    recipes: list[Any] = [*STS, "stride-half", *visor(depth), *([args.blocks] if args.blocks else [])]
    done = {}
    for name in args.data:
        done[name] = vr.evaluate(
            model,
            processor,
            rows_of(name, args.n, load),
            recipes,
            metric=SOURCES[name].metric,
            max_new_tokens=args.max_new_tokens,
            output=args.output / name,
            batch=args.batch,
        )
        print(done[name], flush=True)
    found = table(done, None if args.blocks is None else args.blocks.resolve().name)
    write_whole(args.output / "claims.md", found)
    write_whole(args.output / "claims.json", json.dumps({n: e.to_dict() for n, e in done.items()}, indent=1) + "\n")
    return found


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a checkpoint")
    parser.add_argument("--data", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("-n", type=int, default=1000, help="questions of each data set")
    parser.add_argument("--blocks", type=Path, help="trained blocks of DPVR")
    parser.add_argument("--output", type=Path, default=Path("claims-out"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float16")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(given)


if __name__ == "__main__":
    print(claims(arguments()))
