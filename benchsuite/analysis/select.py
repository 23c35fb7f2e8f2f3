"""Which runs speak for which cell: what a plan expects against what is stored.

The five words are `ok`, `failed`, `timeout`, `unsupported` and, where there is no file, `not run`.
A run whose code differs from the newest code of its cell is stale: listed, never drawn with new
ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchsuite.plan.cell import Cell
from benchsuite.results.record import Run, Status

NOT_RUN = "not run"
# The better word wins where one seed has several runs; among equals the newest.
_RANK = {Status.FAILED: 0, Status.UNSUPPORTED: 1, Status.TIMEOUT: 2, Status.OK: 3}


@dataclass(frozen=True)
class Absence:
    """A (cell, seed) that the plan asks for and that has no `ok` run."""

    cell: Cell
    seed: int
    status: str  # failed, timeout, unsupported, not run
    reason: str


@dataclass(frozen=True)
class Selection:
    """The runs of a plan: at most one per (cell, seed), of one machine and the current code."""

    runs: tuple[Run, ...]  # status ok, in the order of the plan's cells, then by seed
    absent: tuple[Absence, ...]
    stale: tuple[Run, ...]  # of other code than the current one
    elsewhere: tuple[Run, ...]  # of another machine
    repeats: int  # further runs of the same cell, seed and code, which are not used
    machine: str


def select(
    cells: Sequence[Cell],
    seeds: Collection[int],
    runs: Iterable[Run],
    *,
    code_ids: Mapping[str, str] | None = None,
    machine: str | None = None,
) -> Selection:
    """Sorts `runs` for a plan.

    `code_ids`: cell id -> current code id; a cell that is not in it counts its newest run as
    current. `machine`: default the machine of the newest run.
    """
    wanted = {cell.id: cell for cell in cells}
    mine = sorted(
        (run for run in runs if run.cell_id in wanted and run.cell.seed in seeds), key=_age
    )
    if machine is None:
        machine = mine[-1].machine if mine else ""
    here = [run for run in mine if run.machine == machine]
    newest = {run.cell_id: run.code_id for run in here} | dict(code_ids or {})
    stale = tuple(run for run in here if run.code_id != newest[run.cell_id])
    best: dict[tuple[str, int], Run] = {}
    repeats = 0

    for run in here:
        if run.code_id != newest[run.cell_id]:
            continue
        key = (run.cell_id, run.cell.seed)
        repeats += key in best
        if key not in best or _RANK[run.status] >= _RANK[best[key].status]:
            best[key] = run

    chosen = []
    absent = []

    for cell_id, cell in wanted.items():
        for seed in sorted(seeds):
            run_or_none = best.get((cell_id, seed))
            if run_or_none is None:
                absent.append(Absence(cell, seed, NOT_RUN, "no run of the current code is stored"))
            elif run_or_none.status is Status.OK:
                chosen.append(run_or_none)
            else:
                absent.append(
                    Absence(
                        cell,
                        seed,
                        str(run_or_none.status),
                        run_or_none.reason or "no reason recorded",
                    )
                )

    elsewhere = tuple(run for run in mine if run.machine != machine)
    return Selection(tuple(chosen), tuple(absent), stale, elsewhere, repeats, machine)


def _age(run: Run) -> tuple[str, str]:
    return run.started_at, run.run_id
