"""Shipped recipes that drop tokens, against the unmodified model and the native loop, in each setting of a plan: JSON.

    python -m benchmarks.run cpu --out benchmarks/cpu.json
    python -m benchmarks.run tiny --out /tmp/tiny.json         # the same in a minute, to try it

One thread, whose process time other load on the machine moves little. The file is written behind each setting, so that
a run that is stopped leaves what it has; what it held of the same setting is replaced. ``python -m benchmarks.table``
makes tables of it, ``python -m benchmarks.compare`` compares two.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from benchmarks.compare import read
from vlmrewrite.bench import bench
from vlmrewrite.cli.loading import with_random_weights
from vlmrewrite.cli.prompt import Shape, captured_prompt
from vlmrewrite.recipe import Recipe, shipped_recipes

CONFIG = Path(__file__).parents[1] / "examples" / "configs" / "llava-16x1024.json"
GRID = {576: 24, 64: 8, 16: 4}
"""Sides of the images' grids of tokens; where there is none, an image has no grid that the model knows of."""


@dataclass(frozen=True)
class Setting:
    """A LLaVA of some layers and hidden size, a prompt, and how often it is measured.

    Time goes with the number of layers, so that what takes long is measured with fewer.
    """

    layers: int
    rows: int
    images: int
    image_tokens: int
    repeat: int
    new_tokens: int = 8
    text: int = 64
    hidden: int = 1024

    def config(self) -> LlavaConfig:
        """The model's configuration, whose images have the grid that their tokens make."""
        config = LlavaConfig(**json.loads(CONFIG.read_text()))
        text: Any = config.text_config
        tower: Any = config.vision_config
        text.num_hidden_layers = self.layers
        if self.hidden != text.hidden_size:
            text.hidden_size, text.intermediate_size = self.hidden, self.hidden * 11 // 4
            text.num_attention_heads = text.num_key_value_heads = self.hidden // text.head_dim
        tower.image_size = tower.patch_size * GRID.get(self.image_tokens, 24)
        return config

    def made(self) -> tuple[Any, dict[str, Any]]:
        """The model with random weights, on a CPU in fp32, and the prompt."""
        model = with_random_weights(self.config(), CONFIG, torch.float32, torch.device("cpu"))
        _, inputs = captured_prompt(model, self.shape())
        return model, inputs

    def shape(self) -> Shape:
        """That of the prompt."""
        return Shape(self.image_tokens, self.text, self.images, self.rows)

    def model(self) -> str:
        """Its name."""
        return f"LLaVA {self.layers}x{self.hidden}"


PLANS = {
    "cpu": [
        Setting(16, 1, 1, 576, 4),
        Setting(16, 4, 1, 576, 2),
        Setting(8, 1, 16, 64, 1),
        Setting(4, 4, 16, 64, 1),
        Setting(8, 1, 1, 2880, 1, hidden=512),
        Setting(4, 4, 1, 2880, 1, hidden=512),
    ],
    "tiny": [
        Setting(16, 1, 1, 16, 2, 2, 8, 64),
        Setting(16, 4, 1, 16, 2, 2, 8, 64),
        Setting(16, 1, 4, 16, 1, 2, 8, 64),
    ],
}


def measured(setting: Setting, recipes: list[Recipe]) -> dict[str, Any]:
    """What :func:`vlmrewrite.bench.bench` returns for a setting, with the setting."""
    model, inputs = setting.made()
    begun = time.process_time()
    found = bench(
        model,
        inputs,
        recipes,
        backend="eager",
        repeat=setting.repeat,
        new_tokens=setting.new_tokens,
        native=True,
        progress=lambda text: print(f"  {time.process_time() - begun:6.0f} s {text}", file=sys.stderr, flush=True),
    )
    return {"model": setting.model(), "prompt": str(setting.shape()), **found}


def one_setting(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **defaults: int
) -> tuple[Any, Setting]:
    """The options of a script that measures one setting, an image a row, on one thread; and the setting.

    Args:
        parser: with what other options it has.
        arguments: of the command line; None: the process's.
        **defaults: of whole numbers: layers, rows, image_tokens, hidden, and any others.
    """
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    return options, Setting(options.layers, options.rows, 1, options.image_tokens, 1, hidden=options.hidden)


def name_of(run: dict[str, Any]) -> tuple[str, str]:
    """The setting of a measurement."""
    return run["model"], run["prompt"]


def main() -> None:
    """Measure all settings of a plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", action="append", help="measure these alone; may be given several times")
    parser.add_argument("--setting", type=int, action="append", help="of the plan, from 0; may be given several times")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shipped = shipped_recipes()
    for name in options.recipe or ():
        if name not in shipped or shipped[name].sets_processor:
            parser.error(f"--recipe: expected one that is shipped and makes no pictures smaller, got {name!r}")
    recipes = [r for r in shipped.values() if not r.sets_processor and r.name in (options.recipe or shipped)]
    found = {name_of(run): run for run in read(options.out)} if options.out.exists() else {}
    for i, setting in enumerate(PLANS[options.plan]):
        if options.setting and i not in options.setting:
            continue
        print(setting, file=sys.stderr, flush=True)
        run = measured(setting, recipes)
        found[name_of(run)] = run
        options.out.write_text(json.dumps([*found.values()], indent=1) + "\n")


if __name__ == "__main__":
    main()
