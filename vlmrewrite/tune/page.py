"""The page about a search: one HTML file that needs nothing else."""

from __future__ import annotations

from typing import Any

from vlmrewrite.evaluate import STYLE, pareto
from vlmrewrite.markup import document, escape, folded, listing, table
from vlmrewrite.tune.results import Tuned


def page(found: Tuned) -> str:
    """The HTML."""
    judged, searched = found.held_out.cells(), found.cells()
    tried = [[x["passes"], f"{x['flops']:.3f}", f"{x['kv']:.3f}", f"{x['kl']:.4g}", str(x["n"])] for x in found.tried]
    layers = zip(found.profile.freeze_kl, found.profile.hide_kl, strict=True)
    kl = [[str(i), *(f"{x:.4g}" for x in pair)] for i, pair in enumerate(layers)]
    [by] = found.provenance["budget"]
    held_out = (
        "samples that the search did not see. Intervals are 95 %, differences are paired with the unmodified model."
    )
    plotted = (
        "The best of the search, and the same kinds of recipes for other budgets. The dashed line joins those that no"
        " other beats in both. These scores are the search's own; those that count stand above."
    )
    parts = [
        "<h1>A recipe for a budget</h1>",
        f"<p><b>{escape(found.verdict)}</b></p>",
        *(f"<p><b>Note:</b> {escape(note)}</p>" for note in found.notes),
        f"<h2>{'The recipe' if found.met else 'The nearest recipe, which does not meet the wish'}</h2>",
        listing("\n".join(map(repr, found.best.passes))),
        "<h2>On held-out samples</h2>",
        f"<p>{found.held_out.rows[0].n} {held_out}</p>",
        table(judged[0], judged[1:]),
        "<h2>On the searched samples</h2>",
        pareto([point.row for point in found.points], by),
        f"<p>{escape(plotted)}</p>",
        table(searched[0], searched[1:]),
        "<h2>What was tried</h2>",
        "<p>KL of the first token to the unmodified model, nats, over the prompts that a recipe saw.</p>",
        folded(f"{len(tried)} recipes", table(["passes", "FLOPs", "K/V", "KL", "prompts"], tried)),
        "<h2>Layers</h2>",
        table(["layer", "KL frozen", "KL hidden"], kl),
        "<h2>Settings</h2>",
        table(["", ""], [[key, _plain(value)] for key, value in found.provenance.items()]),
    ]
    return document("vlmrewrite tune", f"<style>{STYLE}</style>{''.join(parts)}")


def _plain(value: Any) -> str:
    return "; ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
