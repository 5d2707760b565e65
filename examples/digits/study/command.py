"""The study: every technique, trained and untrained, and the controls at equal FLOPs, on digits, or documents too.

    python -m examples.digits.study                          # from the root of the repository: hours; resumable
    python -m examples.digits.study --quick                  # the same with 60 questions at 1/4 of the FLOPs: minutes
    python -m examples.digits.study --task digits documents -n 500

For each share of the FLOPs (1/2, 1/4, 1/8) every technique is the recipe that costs most within it; nothing is chosen
by accuracy. All are asked the same held-out questions, by ``vlmrewrite.evaluate``. The output folder gets, for each
task, a folder with all that ``vlmrewrite eval`` writes, and beside it NAME.json, NAME.md, NAME-kinds.md,
NAME-absent.md and NAME.svg. Trained blocks are taken from the folder blocks beside this file; ``--train`` trains what
is not there. The model that reads documents was made by python -m examples.digits.documents.train.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from vlmrewrite.evaluate import write_whole

from ..documents.fonts import FACES, IN_MATPLOTLIB
from ..documents.model import CHECKPOINT
from .blocks import FOLDERS, train
from .methods import PROFILED, SHARES, methods, trained
from .run import ask, kept
from .tables import absent, by_kind, overall, plot
from .tasks import task_of

TASKS = ("digits", "documents")
BLOCKS = Path(__file__).parent / "blocks"
QUICK = 60


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["digits"], help="digits alone, if not said")
    parser.add_argument("-n", type=int, help=f"held-out questions of each task (3000; with --quick {QUICK})")
    parser.add_argument("--quick", action="store_true", help="few questions, at 1/4 of the FLOPs alone")
    parser.add_argument("--share", nargs="+", choices=list(SHARES), help="of the FLOPs (all three; with --quick 1/4)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TECHNIQUE", help="these alone, without trained blocks"
    )
    parser.add_argument("--output", type=Path, default=Path("study-out"), help="folder; a run in it goes on")
    parser.add_argument("--blocks", type=Path, default=BLOCKS, help="folder of trained blocks")
    parser.add_argument("--train", action="store_true", help="train the blocks that are not there")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--fonts", choices=["all", "matplotlib"], default="all", help="faces of the pages: all, or those in matplotlib"
    )
    parser.add_argument("--documents", type=Path, default=CHECKPOINT, help="folder of the model that reads pages")
    return parser.parse_args(given)


def study(args: argparse.Namespace, console: Console) -> None:
    """Run the tasks, one after another, and write what was found."""
    shares = args.share or (["1/4"] if args.quick else list(SHARES))
    n = args.n or (QUICK if args.quick else 3000)
    torch.set_num_threads(args.threads)
    faces = tuple(FACES) if args.fonts == "all" else IN_MATPLOTLIB
    for task in [task_of(name, faces, args.documents) for name in args.task]:
        name = task.name
        model, processor = task.load()
        with console.status(f"{name}: recipes of equal cost"):
            rows = methods(model, processor, task.learn(PROFILED, 7), shares, args.only)
        if args.train:
            with console.status(f"{name}: training blocks"):
                train(task, model, processor, rows, args.blocks / name)
        if not args.only:
            rows += trained(args.blocks / name, {k: v for k, v in FOLDERS.items() if v in shares})
        with console.status(name) as status:
            found = ask(
                task,
                model,
                processor,
                rows,
                n,
                args.output / name,
                args.batch,
                lambda text, name=name, status=status: status.update(f"{name}: {text}"),  # type: ignore[misc]
            )
        kept(found, args.output / f"{name}.json")
        for ending, text in (("", overall(found)), ("-kinds", by_kind(found)), ("-absent", absent(found))):
            write_whole(args.output / f"{name}{ending}.md", text)
        plot(found, args.output / f"{name}.svg")
        console.print(f"{args.output / name}.json, .md, .svg: {found['n']} questions, {len(found['rows'])} rows")


def main() -> None:
    """As a command."""
    study(arguments(), Console(stderr=True))
