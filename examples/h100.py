"""End to end on a GPU: LLaVA-1.5-7B and LLaVA-NeXT-7B, randomly initialised, with and without recipes.

    python examples/h100.py --json h100.json     # an H100 with 80 GB: both models, batch 1 and 8, bf16, Inductor
    python examples/h100.py --dry                # anywhere: the same on tiny models

What is measured (prefill and decoding under the same backend, taking turns; peak memory; K/V bytes; the repulsion
sampling on its own) is held against what it should be, memory against what the report predicts, and the exit status is
1 if something falls short; with --dry, where sizes are too small for speed to mean anything, only K/V bytes count.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import vlmrewrite as vr
from vlmrewrite.bench import bench, bench_kernels
from vlmrewrite.bench.clock import peak_of
from vlmrewrite.cli.config import read_config
from vlmrewrite.cli.loading import with_random_weights
from vlmrewrite.cli.prompt import Shape, captured_prompt
from vlmrewrite.compat import tree_leaves
from vlmrewrite.passes import STS
from vlmrewrite.plan import tokens_kept
from vlmrewrite.recipe import Recipe

CONFIGS = Path(__file__).parent / "configs"
MODELS = {"llava-1.5-7b": (576, "llava-1.5"), "llava-next-7b": (2880, "llava-next")}
"""Vision tokens of an image, and the name under which the kernels of such a model are measured."""
RECIPES = ("sts-64", "visor-cross")
TEXT = 64


@dataclass(frozen=True)
class Check:
    """A measurement held against what it should be."""

    what: str
    measured: float
    relation: Literal["<=", "==", ">="]
    expected: float

    @property
    def holds(self) -> bool:
        """Whether it is as it should be."""
        compare = {"<=": operator.le, "==": operator.eq, ">=": operator.ge}[self.relation]
        return bool(compare(self.measured, self.expected))


def finite(x: float) -> float | None:
    """None for infinity, which JSON does not know."""
    return x if math.isfinite(x) else None


def build(name: str, device: torch.device, dry: bool) -> Any:
    """The model with random weights, bf16; with ``dry``, a tiny one in fp32."""
    file = CONFIGS / f"{name}.json"
    config, _ = read_config(file)
    if dry:
        text, vision = config.text_config, config.vision_config
        text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads = 32, 64, 2, 2
        text.head_dim, text.num_hidden_layers = 16, 8
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads = (
            32,
            64,
            2,
            2,
        )
    return with_random_weights(config, file, torch.float32 if dry else torch.bfloat16, device)


@dataclass(frozen=True)
class Predicted:
    """What the report says of a prefill, in bytes: ``(without, with)`` the recipe.

    ``peak`` counts the images' features, which are joined before the decoder's graph begins. ``eager_peak`` is what
    that prefill was seen to take with the recipe, not compiled; None without a GPU.
    """

    kv: tuple[int, int]
    peak: tuple[int, int]
    eager_peak: int | None


def predicted(model: Any, inputs: dict[str, Any], recipe: Recipe) -> Predicted:
    """What the report says, and whether it is so where nothing is fused."""
    with vr.applied(model, recipe, backend="eager"), torch.no_grad():
        model(**inputs, logits_to_keep=1)
        report = vr.report(model, memory=True)
        eager = None
        if model.device.type == "cuda":
            _, eager = peak_of(lambda: model(**inputs, logits_to_keep=1), model.device)
    kv = (report.totals["before"]["kv_bytes"], report.totals["after"]["kv_bytes"])
    features = sum(x.nbytes for x in tree_leaves(inputs["mm_encoder_outputs"]) if isinstance(x, torch.Tensor))
    return Predicted(kv, (report.memory["before"] + features, report.memory["after"] + features), eager)


def checks(measured: dict[str, Any], said: dict[str, Predicted], batch: int) -> Iterator[Check]:
    """What should hold of one model at one batch size."""
    plain, *rows = measured["rows"]
    for row in rows:
        name = f"{row['name']}, batch {batch}"
        of = said[row["name"]]
        before, after = of.kv
        yield Check(f"{name}: K/V bytes without it, as the report says", plain["kv_bytes"], "==", before)
        yield Check(f"{name}: K/V bytes with it, as the report says", row["kv_bytes"], "==", after)
        yield Check(f"{name}: decoding, times unmodified", row["decode_speedup"], ">=", 1.0)
        if batch >= 8:
            reached = row["prefill_speedup_of_flop_ratio"]
            yield Check(f"{name}: prefill speed-up, of the FLOP ratio", reached, ">=", 0.9)
        if of.eager_peak is not None:
            off = abs(of.eager_peak / of.peak[1] - 1)
            yield Check(f"{name}: peak bytes of eager prefill, how far from what the report says", off, "<=", 0.05)
        if of.eager_peak is not None:
            for how, x, most in (("without", plain, of.peak[0]), ("with", row, of.peak[1])):
                what = f"{name}: peak bytes of prefill {how} it, of what the report says without fusion"
                yield Check(what, x["peak_bytes"], "<=", 1.05 * most)
            yield Check(f"{name}: peak bytes of prefill, of unmodified's", row["peak_bytes"], "<=", plain["peak_bytes"])


def sampling(size: str, device: torch.device, batch: int, keep: int, repeat: int) -> float:
    """Seconds that repulsion sampling of ``keep`` tokens takes for the images of a batch; infinite if it failed."""
    result = bench_kernels(
        device, sizes=[size], batches=[batch], families=["sample"], against=[], repeat=repeat, sampled=keep
    )
    base = "triton" if device.type == "cuda" else "reference"
    for row in result["rows"]:
        if row["case"] == "repulsion" and base in row.get("milliseconds", {}):
            return float(row["milliseconds"][base]) / 1e3
    print(f"sampling was not measured: {result['rows']}", file=sys.stderr)
    return math.inf


def measure(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """One model at each batch size."""
    tokens, size = (144, "tiny") if options.dry else MODELS[name]
    model = build(name, device, options.dry)
    chosen = [Recipe.load(recipe) for recipe in options.recipe]
    for batch in options.batch:
        shape = Shape(tokens, text=TEXT, rows=batch)
        print(f"{name}: {shape}", file=sys.stderr)
        _, inputs = captured_prompt(model, shape)
        said = {recipe.name: predicted(model, inputs, recipe) for recipe in chosen}
        result = bench(
            model, inputs, chosen, backend=options.backend, repeat=options.repeat, new_tokens=options.new_tokens
        )
        found = list(checks(result, said, batch))
        seconds = {}
        for recipe, row in zip(chosen, result["rows"][1:], strict=True):
            for p in (p for p in recipe.passes if isinstance(p, STS)):
                keep = tokens_kept(p.keep, tokens)
                seconds[recipe.name] = sampling(size, device, batch, keep, options.repeat)
                share = seconds[recipe.name] / row["prefill_median"]
                found.append(Check(f"{row['name']}, batch {batch}: sampling, of its prefill", share, "<=", 0.03))
        yield (
            {"model": name, "prompt": str(shape), "batch": batch}
            | result
            | {
                "predicted": {recipe: asdict(x) for recipe, x in said.items()},
                "sampling_seconds": {name: finite(x) for name, x in seconds.items()},
                "checks": [asdict(c) | {"measured": finite(c.measured), "holds": c.holds} for c in found],
            }
        )


def main() -> int:
    """Measure, print what holds and what does not, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--backend", choices=["eager", "inductor"], default=None, help="inductor; with --dry eager")
    parser.add_argument("--repeat", type=int, default=None, help="counted rounds: 7; with --dry 1")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--dry", action="store_true", help="tiny models, on a CPU if there is no GPU")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args()
    options.backend = options.backend or ("eager" if options.dry else "inductor")
    options.repeat = options.repeat or (1 if options.dry else 7)
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; expected --dry")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs, failed = [], 0
    for run in (run for name in options.model for run in measure(name, options, device)):
        runs.append(run)
        if options.json is not None:
            options.json.write_text(json.dumps(runs, indent=2) + "\n")
        for check in run["checks"]:
            counts = not options.dry or "K/V" in check["what"]
            failed += counts and not check["holds"]
            verdict = "holds" if check["holds"] else "FALLS SHORT" if counts else "not so, which means nothing here"
            measured = "none" if check["measured"] is None else f"{check['measured']:.4g}"
            compared = f"{measured} {check['relation']} {check['expected']:.4g}"
            print(f"{run['model']}, {check['what']}: {compared}: {verdict}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
