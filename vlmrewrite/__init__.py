"""vlmrewrite: a compiler for the vision tokens of vision-language models.

    import vlmrewrite as vr

    vr.apply(model, "sts-128")
    model.generate(**inputs)
    print(vr.report(model))
    vr.restore(model)

Everything else is in the README and in docs/.
"""

from vlmrewrite import moved
from vlmrewrite.api import applied, apply, calibrate, report, restore, verify
from vlmrewrite.checkpoint import from_pretrained, load_blocks, push_to_hub, save_blocks
from vlmrewrite.compiler import rewrite
from vlmrewrite.plan import Budget, Depth, Pass, Plan
from vlmrewrite.recipe import Recipe
from vlmrewrite.report import Report
from vlmrewrite.rewrite import Program
from vlmrewrite.runtime import Stage, kept_tokens, trace

__version__ = "0.1.0"
moved.register(__name__)
__all__ = [
    "Budget",
    "Depth",
    "Pass",
    "Plan",
    "Program",
    "Recipe",
    "Report",
    "Stage",
    "applied",
    "apply",
    "calibrate",
    "from_pretrained",
    "kept_tokens",
    "load_blocks",
    "push_to_hub",
    "report",
    "restore",
    "rewrite",
    "save_blocks",
    "trace",
    "verify",
]
