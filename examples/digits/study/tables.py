"""What the study found, as Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmrewrite.evaluate import UNMODIFIED

from .methods import CONTROLS

NAMES = {
    "random": "Random (control)",
    "stride": "Stride (control)",
    "downsample": "Downsample (control)",
    "sts": "STS",
    "divprune": "DivPrune",
    "dape": "DAPE",
    "fastv": "FastV",
    "vtw": "VTW",
    "shortv": "ShortV",
    "vica": "ViCA",
    "visor": "VISOR",
    "dpvr": "DPVR",
    UNMODIFIED: "unmodified",
}


def name_of(row: dict[str, Any]) -> str:
    """A row's name for people."""
    name = NAMES[row["technique"]]
    if row["technique"] == "visor" and row["blocks"]:
        return f"{name}, router ({row['blocks']})"
    return f"{name}, {row['blocks']}" if row["blocks"] else name


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _moved(pair: dict[str, Any] | None) -> str:
    """A difference with its interval; bold where the interval leaves 0 out."""
    if pair is None:
        return ""
    low, high = pair["interval"]
    text = f"{100 * pair['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def overall(found: dict[str, Any]) -> str:
    """Accuracy of each row, its difference to the unmodified model and to the controls at its share, and its costs."""
    head = [
        "at most",
        "method",
        "accuracy %",
        "to unmodified",
        *(f"to {c}" for c in CONTROLS),
        "FLOPs",
        "K/V",
        "prefill",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in _sorted(found["rows"]):
        own = row["technique"] == UNMODIFIED
        to = None if own else {"difference": row["difference"], "interval": row["difference_interval"]}
        cells = ["" if own else row["share"], name_of(row)]
        cells.append(f"{_percent(row['accuracy'])} ({' to '.join(map(_percent, row['interval']))})")
        cells += [_moved(to), *(_moved(row["versus"].get(c)) for c in CONTROLS)]
        cells += [f"{row['flops']:.2f}", f"{row['kv']:.2f}"]
        cells.append("" if row["prefill"] is None else f"× {row['prefill']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def by_kind(found: dict[str, Any]) -> str:
    """Accuracy of each row by kind of question, percent; bold where it is worse than the unmodified model's."""
    asked = {kind: scored["n"] for kind, scored in found["rows"][0]["kinds"].items()}
    kinds = [kind for kind in found["kinds"] if kind in asked]
    head = ["at most", "method", *(f"{kind} ({asked[kind]})" for kind in kinds)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in _sorted(found["rows"]):
        cells = ["" if row["technique"] == UNMODIFIED else row["share"], name_of(row)]
        for kind in kinds:
            scored = row["kinds"][kind]
            text = _percent(scored["accuracy"])
            cells.append(f"**{text}**" if scored["difference_interval"][1] < 0 else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def absent(found: dict[str, Any]) -> str:
    """What has no row, and why."""
    lines = []
    for row in found["absent"]:
        at = f" at {row['share']}" if row["share"] else ""
        lines.append(f"- {name_of(row)}{at}: {row['reason']}")
    return "\n".join(lines) + "\n" if lines else "- nothing\n"


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By share, the largest first, controls before techniques."""
    techniques, shares = list(NAMES), ["1", "1/2", "1/4", "1/8"]
    return sorted(rows, key=lambda r: (shares.index(r["share"]), techniques.index(r["technique"]), r["blocks"]))


def plot(found: dict[str, Any], path: Path) -> None:
    """Accuracy with intervals against FLOPs, a line a technique; SVG, or what the name's ending says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(9, 5))
        base = next(row for row in found["rows"] if row["technique"] == UNMODIFIED)
        axes.axhline(100 * base["accuracy"], color="gray", linewidth=0.8, linestyle=":")
        for i, technique in enumerate(t for t in NAMES if t != UNMODIFIED):
            rows = [r for r in found["rows"] if r["technique"] == technique]
            for trained in (False, True):
                some = sorted((r for r in rows if (r["blocks"] == "trained") is trained), key=lambda r: r["flops"])
                if not some:
                    continue
                x, y = [r["flops"] for r in some], [100 * r["accuracy"] for r in some]
                off = [[abs(100 * r["interval"][j] - v) for r, v in zip(some, y, strict=True)] for j in (0, 1)]
                look: dict[str, Any] = {"linewidth": 2.2} if technique in CONTROLS else {"linewidth": 1.0}
                look |= {"linestyle": "--"} if technique in CONTROLS else {}
                axes.errorbar(
                    x, y, off, label=name_of(some[0]), marker="*" if trained else "o", markersize=10 if trained else 4,
                    color=plt.get_cmap("tab20")(i), capsize=2, elinewidth=0.7, **look,
                )  # fmt: skip
        axes.set(xlabel="FLOPs of the prefill, share of the unmodified model's", ylabel="accuracy, %")
        axes.set_title(f"{found['task']}: {found['n']} held-out questions, 95 % intervals")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
