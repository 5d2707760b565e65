"""`vlmrewrite families`: which technique works with which family of models, as a run found it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import Json, at_least, unset
from vlmrewrite.cli.terminal import as_json, check_json

if TYPE_CHECKING:
    from vlmrewrite.testing.matrix.cells import Record


@app.command()
def families(
    family: Annotated[list[str] | None, typer.Option(help="All about this family; may be given several times.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Measure, and keep what comes out in place of the table.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Measure, keep nothing, and fail where it is worse than the table.")
    ] = False,
    fifth: Annotated[int | None, typer.Option(help="Measure every fifth family, from this one (0 to 4) on.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Families measured at a time [1].")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for each family [300].")] = None,
    json: Json = None,
) -> None:
    """Show which technique works with which family of models, in which kind of call: a table that a run made.

    The models are tiny and have random weights; a run needs some ten seconds of one core for each.
    """
    from vlmrewrite.testing.matrix import table

    check_json(json)
    measured = {"fifth": fifth, "jobs": jobs, "timeout": timeout}
    if run and check:
        raise ValueError("expected --run or --check, got both")
    if not run and not check:
        unset(measured, "--run or --check with")
        kept = table.read(table.KEPT)
        some = table.chosen(family or list(kept), kept, "the table has no family")
        shown = {name: kept[name] for name in some}
        if as_json(json, {name: table.record_data(record) for name, record in shown.items()}):
            return
        if family:
            print(*(line for name, record in shown.items() for line in table.details(name, record)), sep="\n")
        else:
            print(*table.marks(shown), sep="\n")
        return
    if fifth is not None and family:
        raise ValueError("expected --family or --fifth, got both")
    if fifth is not None and not 0 <= fifth < 5:
        raise ValueError(f"--fifth: expected 0 to 4, got {fifth}")
    at_least("--jobs", jobs := 1 if jobs is None else jobs, 1)
    if timeout is not None and not timeout > 0:
        raise ValueError(f"--timeout: expected a number of seconds above 0, got {timeout:g}")
    from vlmrewrite.testing.models import ZOO

    names = table.chosen(family or list(ZOO), ZOO, "there is no tiny model of")
    if fifth is not None:
        names = table.fifth(names, fifth)
    found = _measured(names, jobs, timeout, keep=run)
    if not as_json(json, {name: table.record_data(record) for name, record in found.items()}):
        print(*table.marks(found), sep="\n")
    worse = [] if run else [f"{name}: {line}" for name in found for line in table.worse(name, found[name], table.KEPT)]
    for line in worse:
        print("worse:", line, file=sys.stderr)
    if worse:
        raise ValueError(f"{len(worse)} cells are worse than in the kept table; mend them, or keep them with --run")


def _measured(names: list[str], jobs: int, timeout: float | None, *, keep: bool) -> dict[str, Record]:
    """Records of families, which are told, and kept if that is asked for, as they come."""
    from vlmrewrite.testing.matrix import table
    from vlmrewrite.testing.matrix.run import TIMEOUT
    from vlmrewrite.testing.matrix.run import run as measure

    begun, found = time.monotonic(), {}
    for done, (name, record) in enumerate(measure(names, jobs=jobs, timeout=timeout or TIMEOUT), start=1):
        found[name] = record
        if keep:
            table.write(table.read_if_there(table.KEPT) | {name: record}, table.KEPT)
        counts = ", ".join(f"{n} {status}" for status, n in table.counts({name: record}).items() if n)
        print(f"[{time.monotonic() - begun:5.0f} s] {done} of {len(names)}: {name}: {counts}", file=sys.stderr)
    return dict(sorted(found.items()))
