"""The names that ``vlmrewrite`` itself has: it imports this module, and torch with it, when the first is asked for."""

from vlmrewrite.api import applied, apply, calibrate, report, restore, verify
from vlmrewrite.checkpoint import from_pretrained, load_blocks, push_to_hub, save_blocks
from vlmrewrite.compiler import rewrite
from vlmrewrite.evaluate import evaluate
from vlmrewrite.export import Exported, export, load_export
from vlmrewrite.plan import Budget, Depth, Pass, Plan
from vlmrewrite.progress import disable_progress_bars, enable_progress_bars
from vlmrewrite.recipe import Recipe
from vlmrewrite.report import Report
from vlmrewrite.rewrite import Program
from vlmrewrite.runtime import Stage, kept_tokens, trace
from vlmrewrite.training import train, trainable_blocks
from vlmrewrite.tune import Tuned, tune

__all__ = [
    "Budget",
    "Depth",
    "Exported",
    "Pass",
    "Plan",
    "Program",
    "Recipe",
    "Report",
    "Stage",
    "Tuned",
    "applied",
    "apply",
    "calibrate",
    "disable_progress_bars",
    "enable_progress_bars",
    "evaluate",
    "export",
    "from_pretrained",
    "kept_tokens",
    "load_blocks",
    "load_export",
    "push_to_hub",
    "report",
    "restore",
    "rewrite",
    "save_blocks",
    "trace",
    "train",
    "trainable_blocks",
    "tune",
    "verify",
]
