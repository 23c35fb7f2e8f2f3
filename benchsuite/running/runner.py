"""The loop behind `benchsuite run`: refuse, order, launch, store; one cell after the other.

A refused cell becomes one `unsupported` row with rule and remedy; a failed one is recorded and the
rest runs. Cells are launched in blocks of one seed, in random order inside a block, so that a drift
of the machine favours no strategy; the seed of that order and the position stand in the run file.
What tuning must try comes first, as runs of their own (`tune.py`). The process that runs this has
no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import secrets
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchsuite.measure.load import num_cores
from benchsuite.plan.cell import Cell
from benchsuite.results.record import Run, Status, now_iso
from benchsuite.results.store import Store, code_of
from benchsuite.running import tune
from benchsuite.running.progress import Progress
from benchsuite.running.setting import Setting


@dataclass
class Tally:
    """What became of the cells of one command."""

    stored: int = 0  # were there already
    counts: dict[Status, int] = field(default_factory=lambda: dict.fromkeys(Status, 0))
    paths: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    interrupted: bool = False

    def add(self, run: Run, path: Path) -> None:
        """Counts a run that has been stored at `path`."""
        self.paths.append(path)
        self.counts[run.status] += 1
        if run.status in (Status.FAILED, Status.TIMEOUT):
            self.failures.append(
                f"{run.cell.label} seed {run.cell.seed}: {run.status}: {run.reason}"
            )

    @property
    def num_failed(self) -> int:
        """Runs that ended as failed or timeout."""
        return self.counts[Status.FAILED] + self.counts[Status.TIMEOUT]

    @property
    def exit_code(self) -> int:
        """0, 4 where some runs failed, 130 where interrupted."""
        if self.interrupted:
            return 130
        return 4 if self.num_failed else 0


def run_cells(
    cells: Iterable[Cell],
    store: Store,
    *,
    setting: Setting,
    launch: Callable[[Cell], Run],
    simulate: Callable[[Sequence[Cell]], Iterable[tuple[Cell, Run]]] | None = None,
    refused: Sequence[tuple[Cell, str]] = (),
    fresh: bool = False,
    progress: Progress | None = None,
) -> Tally:
    """Runs what is missing (all of it where `fresh`) and stores every run as soon as it ends.

    cells: resolved, each with its seed. refused: cells that are not launched, each with reason and
    remedy in one line. launch: starts the ranks of a cell, waits for them, and makes a run of what
    they left (`starters.launch`). simulate: does so for cells of the virtual clock, several at once
    and in any order (`starters.simulate`); it is called when all others are done, so that nothing
    disturbs what is measured. Trials of tuned cells come before all cells. Ctrl-C keeps the
    finished runs and returns with `interrupted`.
    """
    progress = progress or Progress()
    store.check_writable()
    launched = list(cells)
    recorded = [cell for cell, _ in refused]
    num_cells = len(launched) + len(recorded)
    recorded = store.missing(recorded, None, setting.rules_id)
    if not fresh:
        launched = store.missing(launched, None, setting.code_id)
    tally = Tally(stored=num_cells - len(launched) - len(recorded))
    order_seed = secrets.randbelow(2**32)
    tuner = tune.Tuner(launched, store, setting, fresh=fresh)
    trials = interleaved(tuner.untried, order_seed)
    launched = interleaved(launched, order_seed)
    seconds = _Estimate(store, [*trials, *launched])
    progress.start(
        total=len(trials) + len(launched),
        stored=tally.stored,
        refused=len(refused),
        trials=len(trials),
    )
    try:
        reasons = {cell.id: reason for cell, reason in refused}
        for cell in {cell.id: cell for cell, _ in refused}.values():
            progress.refuse(cell, reasons[cell.id])
        for cell in recorded:
            run = _unsupported(cell, reasons[cell.id], setting)
            tally.add(run, store.write(run))
        started = time.monotonic()
        tuned = tuner.launching(launch), simulate and tuner.simulating(simulate)
        order = itertools.chain(_launches(trials, launch, simulate), _launches(launched, *tuned))
        for position, (cell, launching) in enumerate(order):
            progress.begin(cell, position, seconds.left())
            run = launching()
            run = dataclasses.replace(
                run, extra={**run.extra, "order": {"seed": order_seed, "position": position}}
            )
            tally.add(run, store.write(run))
            seconds.took(cell, time.monotonic() - started)
            progress.end(cell, run, position, seconds.left())
            started = time.monotonic()
    except KeyboardInterrupt:
        tally.interrupted = True
    finally:
        progress.stop()
    return tally


def _launches(
    cells: Sequence[Cell],
    launch: Callable[[Cell], Run],
    simulate: Callable[[Sequence[Cell]], Iterable[tuple[Cell, Run]]] | None,
) -> Iterator[tuple[Cell, Callable[[], Run]]]:
    """Cell by cell in `cells`' order; those of the virtual clock at the end, as they are done."""
    virtual = [cell for cell in cells if cell.clock == "virtual"] if simulate is not None else []
    for cell in cells:
        if cell.clock == "wall" or simulate is None:
            yield cell, functools.partial(launch, cell)
    if simulate is not None and virtual:
        for cell, run in simulate(virtual):
            yield cell, functools.partial(lambda run: run, run)


def interleaved(cells: Sequence[Cell], order_seed: int) -> list[Cell]:
    """Blocks of one seed, in the order the seeds appear; inside a block a random order fixed by
    `order_seed`."""
    blocks: dict[int, list[Cell]] = {}
    for cell in cells:
        blocks.setdefault(cell.seed, []).append(cell)
    ordered = []
    for seed, block in blocks.items():
        random.Random(f"{order_seed}:{seed}").shuffle(block)
        ordered += block
    return ordered


def estimated_seconds(store: Store) -> dict[str, float]:
    """Cell id -> median seconds of its stored runs (the training loop; launching adds some tenths).

    Of a simulation its share of a core's time: one runs on each core.
    """
    seconds: dict[str, list[float]] = {}
    for row in store.rows():
        simulated = row["simulation_s"]
        if (took := row["wall_s"] if simulated is None else simulated / num_cores()) is not None:
            seconds.setdefault(row["cell_id"], []).append(took)
    return {cell_id: statistics.median(values) for cell_id, values in seconds.items()}


def timed_as(cell: Cell) -> tuple[str, str]:
    """Ids of cells that take as long, its own first."""
    return cell.id, tune.as_long(cell).id


def known_seconds(known: Mapping[str, float], ids: Iterable[str]) -> float | None:
    """The first of `ids` that is known."""
    return next((known[cell_id] for cell_id in ids if cell_id in known), None)


class _Estimate:
    """Seconds left: stored runs of the same cell, else this command's, else the mean of this
    command's."""

    def __init__(self, store: Store, launched: Sequence[Cell]) -> None:
        self.known: dict[str, float] = estimated_seconds(store)
        self.waiting = {(cell.id, cell.seed): timed_as(cell) for cell in launched}
        self.taken: list[float] = []

    def took(self, cell: Cell, seconds: float) -> None:
        self.taken.append(seconds)
        own, other = timed_as(cell)
        self.known[own] = seconds
        self.known.setdefault(other, seconds)
        self.waiting.pop((cell.id, cell.seed), None)

    def left(self) -> float | None:
        """None while nothing is known of a cell that is still to run."""
        guess = statistics.fmean(self.taken) if self.taken else None
        known = [known_seconds(self.known, ids) for ids in self.waiting.values()]
        left = [guess if seconds is None else seconds for seconds in known]
        return None if None in left else sum(value for value in left if value is not None)


def _unsupported(cell: Cell, reason: str, setting: Setting) -> Run:
    return Run(
        cell=cell,
        code_id=code_of(setting.rules_id, cell),
        status=Status.UNSUPPORTED,
        reason=reason,
        started_at=now_iso(),
        machine=setting.machine,
        environment_id=setting.environment_id,
    )
