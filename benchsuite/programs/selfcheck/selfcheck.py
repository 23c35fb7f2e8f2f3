"""`benchsuite selfcheck`: what the suite itself costs on this machine, compared with its bars.

There is one value per fresh launch or process; medians are given with intervals, and whatever is
compared takes turns. No change is refused for these figures: a busy machine is no defect of the
suite, and says `too noisy`. This process imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.measure.load import CONTENDED_ABOVE
from benchsuite.plan import plugins
from benchsuite.programs import bars
from benchsuite.programs.bars import Figure
from benchsuite.programs.bench import Bench
from benchsuite.programs.selfcheck import (
    cells,
    compression,
    files,
    parallel,
    virtual,
)
from benchsuite.programs.selfcheck import (
    collectives as selfcheck_collectives,
)
from benchsuite.programs.selfcheck.cells import Effort
from benchsuite.programs.selfcheck.items import ITEMS
from benchsuite.report import text

TRAINS = {**cells.CHECKS, **parallel.CHECKS}
WITH_RANKS = (*TRAINS, *selfcheck_collectives.CHECKS, *compression.CHECKS)
NUM_RUNS = 10_000  # of the results folder that is loaded

Say = Callable[[str], None]


def run(
    only: str | None = None,
    launches: int = 5,
    *,
    results: str | Path = "results",
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measures the items and returns `{"figures": [..], "exit_code"}`.

    All items take about twenty minutes on two cores. `only` is one of ITEMS, `launches` the number
    of fresh launches per quantity (at least 2); `say` is told what is being measured.
    """
    if only is not None and only not in ITEMS:
        raise UsageError(plugins.unknown("item", only, ITEMS, of="selfcheck"))
    if launches < 2:
        raise UsageError(f"--launches {launches}: a spread needs at least 2")
    items = ITEMS if only is None else (only,)
    figures = list(_figures(items, Effort(launches=launches), results, say))
    return {
        "figures": [figure.to_json() for figure in figures],
        "exit_code": bars.exit_code([figure.verdict for figure in figures]),
    }


def _figures(
    items: Sequence[str], effort: Effort, results: str | Path, say: Say
) -> Iterator[Figure]:
    if "commands" in items:
        say("commands")
        yield from files.commands(3 * effort.launches)

    if wanted := [item for item in items if item in WITH_RANKS]:
        with Bench((*cells.MODULES, *parallel.MODULES)) as bench:
            for item in wanted:
                say(item)
                if item in TRAINS:
                    yield from TRAINS[item](bench, effort)
                elif item in compression.CHECKS:
                    yield from compression.CHECKS[item](bench, effort.launches)
                else:
                    collectives = selfcheck_collectives.CollectiveEffort()
                    yield from selfcheck_collectives.CHECKS[item](
                        bench, effort.launches, collectives
                    )

    if "virtual" in items:
        say("virtual")
        yield from virtual.virtual(effort.launches)

    if "store" in items:
        say("store")
        yield from files.store(NUM_RUNS)

    if "report" in items:
        say("report")
        yield from files.page(results)


def table(document: Mapping[str, Any]) -> str:
    """Plain text: quantity, median, interval or range, n, bar, verdict; notes below their line."""
    rows = [("quantity", "median", "low .. high", "n", "bar", "verdict")]
    notes = [""]

    for figure in document["figures"]:
        rows.append(_row(figure))
        notes.append(figure["note"])

    lines = []

    for line, note in zip(text.aligned(rows, right=(1, 2, 3, 4)), notes, strict=True):
        lines.append(line)
        lines += [f"    {note}"] if note else []

    return "\n".join([*lines, "", _caption(document)])


def _row(figure: Mapping[str, Any]) -> tuple[str, str, str, str, str, str]:
    unit = figure["unit"]
    bar = figure["bar"]
    sign = "<=" if figure["better"] == "lower" else ">="
    limit = "" if bar is None else f"{sign} {text.plain(bar)} {unit}".rstrip()
    if figure["median"] is None:
        return figure["quantity"], "", "", "0", limit, figure["verdict"]
    spread = (
        f"{text.plain(figure['low'])} .. {text.plain(figure['high'])}" if figure["n"] > 1 else ""
    )
    mark = "*" if figure["contended"] else ""
    median = f"{text.plain(figure['median'])} {unit}".rstrip()
    return figure["quantity"], median, spread, str(figure["n"]), limit, figure["verdict"] + mark


def _caption(document: Mapping[str, Any]) -> str:
    shares = [figure["foreign"] for figure in document["figures"] if figure["foreign"] is not None]
    load = f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %" if shares else "an unknown share"
    return (
        "low .. high: 95 % interval over fresh launches (n < 5: range). "
        f"Other programs used {load} of the cores; * = more than {text.percent(CONTENDED_ABOVE)} "
        "during that item."
    )
