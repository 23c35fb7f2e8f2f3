"""The loop behind `benchsuite run`: refuse, order, launch, store; one cell after the other.

A refused cell becomes one `unsupported` run with rule and remedy. A failed one is recorded, and the
rest runs. Cells are launched in blocks of one seed, in random order inside a block, so that a drift
of the machine favours no strategy; the seed of that order and the position stand in the run file.
What tuning must try comes first, as runs of their own (`tune.py`). This process has no torch.
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
    paths: list[Path] = field(default_factory=list)  # of the run files that were written
    failures: list[str] = field(default_factory=list)  # one line each
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
    finished runs and returns with `interrupted`. Raises where the store cannot be written, before
    anything is run.
    """
    progress = progress or Progress()
    # Now, and not after the first cell has run for an hour.
    store.check_writable()
    asked = list(cells)
    refused_cells = [cell for cell, _ in refused]
    # A refusal stands for the rules and the members' files that it rests on, not for all code.
    unrecorded = store.missing(refused_cells, None, setting.rules_id)
    missing = asked if fresh else store.missing(asked, None, setting.code_id)
    num_runs = len(unrecorded) + len(missing)
    tally = Tally(stored=len(asked) + len(refused_cells) - num_runs)
    # Drawn anew for each command, so that repetitions average over orders, and stored, so that each
    # order can be repeated.
    order_seed = secrets.randbelow(2**32)
    tuner = tune.Tuner(missing, store, setting, fresh=fresh)
    trials = interleaved(tuner.untried, order_seed)
    launched = interleaved(missing, order_seed)
    seconds = _Estimate(store, [*trials, *launched])
    total = len(trials) + len(launched)
    progress.start(total=total, stored=tally.stored, refused=len(refused), trials=len(trials))
    try:
        _record_refused(refused, unrecorded, store, setting, tally=tally, progress=progress)
        # The generators below do nothing until `_stored` asks them: what a tuned cell runs with is
        # known only when all trials are stored.
        launch_tuned = tuner.launching(launch)
        simulate_tuned = tuner.simulating(simulate) if simulate is not None else None
        order = itertools.chain(
            _launches(trials, launch, simulate), _launches(launched, launch_tuned, simulate_tuned)
        )
        for run, path in _stored(order, store, order_seed, seconds, progress):
            tally.add(run, path)
    # What has ended is on the disk, and the same command goes on from there.
    except KeyboardInterrupt:
        tally.interrupted = True
    finally:
        progress.stop()
    return tally


def _stored(
    order: Iterable[tuple[Cell, Callable[[], Run]]],
    store: Store,
    order_seed: int,
    seconds: _Estimate,
    progress: Progress,
) -> Iterator[tuple[Run, Path]]:
    """Runs cell after cell; yields each run with its file as soon as it is stored."""
    started = time.monotonic()
    for position, (cell, launching) in enumerate(order):
        progress.begin(cell, position, seconds.left())

        run = launching()
        placed = {"order": {"seed": order_seed, "position": position}}
        run = dataclasses.replace(run, extra={**run.extra, **placed})
        # Stored before anything else is said or started: from here on the run cannot be lost.
        yield run, store.write(run)
        seconds.took(cell, time.monotonic() - started)
        progress.end(cell, run, position, seconds.left())
        started = time.monotonic()


def _record_refused(
    refused: Sequence[tuple[Cell, str]],
    unrecorded: Iterable[Cell],
    store: Store,
    setting: Setting,
    *,
    tally: Tally,
    progress: Progress,
) -> None:
    """Says each refusal once, whatever the number of seeds, and stores those that are new.

    A refusal is a result like others: reports show it with its reason in the cell's place.
    """
    reasons = {cell.id: reason for cell, reason in refused}

    for cell in {cell.id: cell for cell, _ in refused}.values():
        progress.refuse(cell, reasons[cell.id])

    for cell in unrecorded:
        run = _unsupported(cell, reasons[cell.id], setting)
        tally.add(run, store.write(run))


def _launches(
    cells: Sequence[Cell],
    launch: Callable[[Cell], Run],
    simulate: Callable[[Sequence[Cell]], Iterable[tuple[Cell, Run]]] | None,
) -> Iterator[tuple[Cell, Callable[[], Run]]]:
    """(cell, what gives its run), in the order in which they are to be begun.

    The clock of a cell decides who runs it: cells of the wall clock come first, in the order given,
    each launched when its turn comes; those of the virtual clock follow as their simulations end.
    """
    if simulate is None:
        on_ranks = list(cells)
        simulated = []
    else:
        on_ranks = [cell for cell in cells if cell.clock == "wall"]
        simulated = [cell for cell in cells if cell.clock == "virtual"]

    for cell in on_ranks:
        yield cell, functools.partial(launch, cell)

    if simulate is not None and simulated:
        for cell, run in simulate(simulated):
            yield cell, functools.partial(_finished, run)


def _finished(run: Run) -> Run:
    """The run itself, in the form in which `_launches` hands out what is still to be run."""
    return run


def interleaved(cells: Sequence[Cell], order_seed: int) -> list[Cell]:
    """Blocks of one seed, in the order in which the seeds appear.

    Inside a block the order is random and fixed by `order_seed`, so that a machine that grows warm
    or busy does not slow down the same strategy in every repetition.
    """
    blocks: dict[int, list[Cell]] = {}

    for cell in cells:
        blocks.setdefault(cell.seed, []).append(cell)

    # Each block has its own stream of random numbers: leaving out a seed changes no other block.
    ordered = []

    for seed, block in blocks.items():
        random.Random(f"{order_seed}:{seed}").shuffle(block)
        ordered += block

    return ordered


def estimated_seconds(store: Store) -> dict[str, float]:
    """Cell id -> median seconds of its stored runs.

    Under the wall clock that is the training loop; launching adds some tenths. Of a simulation it
    is its share of the machine's time, since one runs on each core.
    """
    seconds: dict[str, list[float]] = {}

    # The median: a run that was stopped for a while must not double the forecast.
    for row in store.rows():
        took = row["wall_s"]
        if row["simulation_s"] is not None:
            took = row["simulation_s"] / num_cores()
        if took is not None:
            seconds.setdefault(row["cell_id"], []).append(took)

    return {cell_id: statistics.median(values) for cell_id, values in seconds.items()}


def timed_as(cell: Cell) -> tuple[str, str]:
    """Ids of cells whose runs take as long as this one's: its own, and that of another factor.

    The better known one comes first, as `known_seconds` looks for it.
    """
    return cell.id, tune.as_long(cell).id


def known_seconds(known: Mapping[str, float], ids: Iterable[str]) -> float | None:
    """The seconds of the first of `ids` that is known; None where none is.

    known: cell id -> seconds.
    """
    return next((known[cell_id] for cell_id in ids if cell_id in known), None)


class _Estimate:
    """How many seconds are left.

    A cell takes as long as its stored runs did, else as its runs of this command, else as the mean
    run of this command.
    """

    def __init__(self, store: Store, launched: Sequence[Cell]) -> None:
        """Reads what the store knows; launched: the cells that are to be run, trials included."""
        self.known: dict[str, float] = estimated_seconds(store)
        self.waiting = {(cell.id, cell.seed): timed_as(cell) for cell in launched}
        self.taken: list[float] = []

    def took(self, cell: Cell, seconds: float) -> None:
        """Learns from a cell that has just ended: `seconds` with launch and store.

        What this command measures itself counts more than older runs: the machine may be another.
        """
        self.taken.append(seconds)
        own, other = timed_as(cell)
        self.known[own] = seconds
        # Cells that differ in the learning rate only take as long, if nothing better is known.
        self.known.setdefault(other, seconds)
        self.waiting.pop((cell.id, cell.seed), None)

    def left(self) -> float | None:
        """Seconds; None while nothing is known of a cell that is still to run."""
        guess = statistics.fmean(self.taken) if self.taken else None
        known = [known_seconds(self.known, ids) for ids in self.waiting.values()]
        return total([guess if seconds is None else seconds for seconds in known])


def total(seconds: Iterable[float | None]) -> float | None:
    """The sum; None where one of them is not known: half a sum would be taken for all of it."""
    summed: float = 0
    for value in seconds:
        if value is None:
            return None
        summed += value
    return summed


def _unsupported(cell: Cell, reason: str, setting: Setting) -> Run:
    """The run of a cell that was refused: a reason and no result."""
    return Run(
        cell=cell,
        code_id=code_of(setting.rules_id, cell),
        status=Status.UNSUPPORTED,
        reason=reason,
        started_at=now_iso(),
        machine=setting.machine,
        environment_id=setting.environment_id,
    )
