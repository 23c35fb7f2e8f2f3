"""Tuning: the same learning rates and as many trials for every strategy, kept in the results.

A cell with `tuning = "per_strategy"` is tried before its runs with every factor of `LR_FACTORS` on
the recipe's learning rate, each with the cell's own budget and one seed that no plan may use
(`TRIAL_SEED`); then it runs with the factor that did best. A trial is an ordinary cell with
`tuning = "same"` and `lr_factor`, stored like every run: what is there is not tried again. The
stored run keeps the cell as it was asked for, and its `result.tuning` says what was tried and
chosen. What is chosen stays for all seeds of the cell, until its code changes or it is run with
`--fresh`.

Best is the trial with the fewest samples to the target; where they are equal, or all miss, the one
with the better final metric; then the factor nearest to 1, the smaller of two. One that diverged,
or did not end ok, loses. Samples count under both clocks, because the trials of a cell differ in
the learning rate alone, on which neither bytes nor seconds per sample depend: in virtual time
seconds would put them in the same order, and wall seconds would add noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan.cell import Cell
from benchsuite.results.record import Run, Status, new_run_id, now_iso
from benchsuite.results.store import CodeId, Store, code_of
from benchsuite.results.tuned import is_tuned, with_factor
from benchsuite.running.setting import Setting

LR_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
TRIAL_SEED = 1000
CRITERION = "fewest samples to target, then best final metric, then lr_factor nearest to 1"
NOT_RUN = "not run"

Launch = Callable[[Cell], Run]
Simulate = Callable[[Sequence[Cell]], Iterable[tuple[Cell, Run]]]
# `result.tuning` of a run file: {lr_factor, criterion, trial_seed, trials: [{lr_factor, cell_id,
# status, reason, samples_to_target, final_metric, diverged_step}]}; lr_factor = None where no trial
# is ok
Choice = Mapping[str, Any]


def trials(cell: Cell) -> list[Cell]:
    """What is run before a tuned cell, one per factor; before any other cell nothing.

    Each has the cell's whole budget: a rate that is good for a short run need not be for a long
    one.
    """
    if not is_tuned(cell):
        return []
    return [with_factor(cell, factor).with_seed(TRIAL_SEED) for factor in LR_FACTORS]


def as_long(cell: Cell) -> Cell:
    """A cell whose runs take as long: the learning rate does not matter for that.

    It stands for all factors, so that the forecast of one trial is learnt from another.
    """
    return with_factor(cell, 1.0)


def check_seeds(cells: Iterable[Cell], seeds: Collection[int]) -> None:
    """UsageError where a plan with tuned cells has the seed of the trials.

    The runs that are reported are not those that chose the learning rate.
    """
    if TRIAL_SEED in seeds and any(is_tuned(cell) for cell in cells):
        raise UsageError(
            f"seeds contain {TRIAL_SEED}, which trials of tuning = per_strategy are run with, and "
            "a run with the seed that chose its learning rate would look better than it is: take "
            "another seed, or tuning = same"
        )


def untried(cells: Iterable[Cell], store: Store, code_id: CodeId) -> list[Cell]:
    """The trials that must still be run before `cells` (those that are missing) can be.

    Shared ones once: cells that differ in the seed only have the same trials.
    """
    tuned = {cell.id: cell for cell in cells if is_tuned(cell)}
    return store.missing(_wanted(tuned, _known(tuned, store, code_id)), None, code_id)


def choose(tried: Sequence[tuple[Cell, Run | None]]) -> Choice:
    """`result.tuning` from the trials of one cell.

    tried: the trials, each with its run (None = there is none). `lr_factor` is None where no trial
    is ok: a cell without a learning rate is not run.
    """
    found = [(cell, run) for cell, run in tried if run is not None and run.status is Status.OK]

    # All trials are stated, also those that lost: whoever reads the result can choose otherwise.
    best = min(found, key=lambda pair: _order(*pair))[0].lr_factor if found else None
    stated = [_stated(cell, run) for cell, run in tried]
    return {"lr_factor": best, "criterion": CRITERION, "trial_seed": TRIAL_SEED, "trials": stated}


def _order(cell: Cell, run: Run) -> tuple[bool, float, float, float, float]:
    """A key by which the best trial is the smallest.

    (diverged, samples to the target, final metric with its sign such that less is better, distance
    of the factor from 1 as a ratio, the factor).
    """
    result = run.result
    samples = (result.get("samples_to") or {}).get("target")

    metric = result.get("final_metric")
    if metric is None:
        metric = math.inf
    elif (result.get("target") or {}).get("direction", "max") == "max":
        metric = -metric

    diverged = result.get("diverged_step") is not None
    if diverged:  # how far it came before says nothing
        samples = None
        metric = math.inf

    if samples is None:
        samples = math.inf
    return diverged, samples, metric, abs(math.log(cell.lr_factor)), cell.lr_factor


def _stated(cell: Cell, run: Run | None) -> dict[str, Any]:
    """What a run file says of one trial; the run stands in the store under its own id."""
    result = run.result if run is not None else {}
    return {
        "lr_factor": cell.lr_factor,
        "cell_id": cell.id,
        "status": str(run.status) if run is not None else NOT_RUN,
        "reason": run.reason if run is not None else None,
        "samples_to_target": (result.get("samples_to") or {}).get("target"),
        "final_metric": result.get("final_metric"),
        "diverged_step": result.get("diverged_step"),
    }


def _wanted(tuned: Mapping[str, Cell], known: Collection[str]) -> list[Cell]:
    """The trials of the cells whose factor is not known."""
    wanted = []
    for cell_id, cell in tuned.items():
        if cell_id not in known:
            wanted += trials(cell)
    return wanted


def _known(tuned: Mapping[str, Cell], store: Store, code_id: CodeId) -> dict[str, Choice]:
    """Cell id -> what was chosen for the runs of this code that are stored."""
    if not tuned:
        return {}

    said = {}

    for run in store.runs(tuned.values()):
        tuning = run.result.get("tuning") or {}
        if tuning.get("lr_factor") is not None and run.code_id == code_of(
            code_id, tuned[run.cell_id]
        ):
            said[run.cell_id] = tuning

    return said


class Tuner:
    """What a command does for the tuned ones among `cells`, which are to be run.

    First `untried` is run, as any cells are; then `launching` and `simulating` run the cells
    themselves.
    """

    def __init__(
        self, cells: Iterable[Cell], store: Store, setting: Setting, *, fresh: bool = False
    ) -> None:
        """Reads from the store what was chosen before; where `fresh`, nothing of it counts."""
        self._cells = {cell.id: cell for cell in cells if is_tuned(cell)}
        self._store = store
        self._setting = setting
        self._known = {} if fresh else _known(self._cells, store, setting.code_id)

        wanted = _wanted(self._cells, self._known)
        self.untried = wanted if fresh else store.missing(wanted, None, setting.code_id)

    def launching(self, launch: Launch) -> Launch:
        """`launch` that takes a tuned cell too."""

        def launch_tuned(cell: Cell) -> Run:
            """Launches what is trained in the cell's place; the run goes by the cell's own name."""

            # Asked when the cell's turn comes, and not before: only then all trials are stored.
            job = self._job(cell)
            return self._failed(cell) if job is None else self._as_asked(cell, launch(job))

        return launch_tuned

    def simulating(self, simulate: Simulate) -> Simulate:
        """`simulate` that takes tuned cells too.

        What is trained in the same way, whoever asks for it, is simulated once: in virtual time a
        second run would say the same.
        """

        def simulate_tuned(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Run]]:
            """Simulates each job once, and yields its run for every cell that asked for it."""
            asked: dict[tuple[str, int], list[Cell]] = {}
            jobs: dict[tuple[str, int], Cell] = {}

            for cell in cells:
                job = self._job(cell)
                if job is None:
                    yield cell, self._failed(cell)
                else:
                    jobs[job.id, job.seed] = job
                    asked.setdefault((job.id, job.seed), []).append(cell)

            for job, run in simulate(list(jobs.values())):
                for cell in asked[job.id, job.seed]:
                    yield cell, self._as_asked(cell, run)

        return simulate_tuned

    @cached_property
    def _choices(self) -> Mapping[str, Choice]:
        """Cell id -> what is chosen; first asked for when the trials are done."""
        tried = {key: trials(cell) for key, cell in self._cells.items() if key not in self._known}
        all_trials = [trial for each in tried.values() for trial in each]
        # Runs of older code stand in the store too: another strategy's code may have done best with
        # another factor.
        codes = {trial.id: self._setting.code_id(trial) for trial in all_trials}
        runs = self._store.runs(all_trials, seeds=[TRIAL_SEED])
        ours = [run for run in runs if run.code_id == codes[run.cell_id]]

        # Sorted upwards, so that in the dict the largest of several runs is the one that stays.
        found = {run.cell_id: run for run in sorted(ours, key=self._counts)}

        chosen = {
            key: choose([(trial, found.get(trial.id)) for trial in each])
            for key, each in tried.items()
        }
        return {**self._known, **chosen}

    def _counts(self, run: Run) -> tuple[bool, bool, str, str]:
        """Of several runs of a trial the largest counts: ok before not, of this machine, newest."""
        return (
            run.status is Status.OK,
            run.machine == self._setting.machine,
            run.started_at,
            run.run_id,
        )

    def _job(self, cell: Cell) -> Cell | None:
        """What is trained where `cell` is asked for; None where no trial is ok."""
        if not is_tuned(cell):
            return cell
        factor = self._choices[cell.id]["lr_factor"]
        return None if factor is None else with_factor(cell, factor)

    def _as_asked(self, cell: Cell, run: Run) -> Run:
        """The run of a tuned cell under the cell's own name, with what was tried and chosen.

        It gets a run id of its own, because several cells may share one simulated run.
        """
        if not is_tuned(cell):
            return run

        result = {**run.result, "tuning": self._choices[cell.id]}
        code_id = self._setting.code_id(cell)

        return dataclasses.replace(
            run, cell=cell, cell_id="", code_id=code_id, result=result, run_id=new_run_id()
        )

    def _failed(self, cell: Cell) -> Run:
        """The run of a tuned cell of which no trial ended ok, with each trial's reason."""
        choice = self._choices[cell.id]
        said = [
            f"{t['cell_id']} (lr x{t['lr_factor']:g}) {t['status']}: {t['reason']}"
            for t in choice["trials"]
        ]

        return Run(
            cell=cell,
            code_id=self._setting.code_id(cell),
            status=Status.FAILED,
            reason=f"none of {len(said)} trials with seed {TRIAL_SEED} is ok: {'; '.join(said)}",
            started_at=now_iso(),
            machine=self._setting.machine,
            environment_id=self._setting.environment_id,
            result={"tuning": choice},
        )
