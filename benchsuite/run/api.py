"""The verbs in Python: `run`, `load_results`, `compare`, `collect`. Imports no torch; what is heavy
is imported inside.

The process that calls `run` never touches torch or the accelerator: ranks are processes of their
own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchsuite.errors import UsageError
from benchsuite.plan import cell as cells
from benchsuite.plan.cell import Cell
from benchsuite.results.record import DIVERGED, TIMING_ONLY, Run
from benchsuite.results.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from benchsuite.analysis.regression import Comparison
    from benchsuite.cluster import Launcher
    from benchsuite.plan.plan import Plan
    from benchsuite.run.progress import Progress
    from benchsuite.run.runner import Setting, Tally


def run(
    plan_or_cell: Plan | Cell | Sequence[Cell] | str | Path,
    *,
    results: str | Path = "results",
    seeds: Sequence[int] | None = None,
    fresh: bool = False,
) -> Tally:
    """Runs what is missing of a plan (its name, path or `Plan`) or of cells; returns what became of
    the runs.

    seeds: default those of the plan, of a cell its own.

    UsageError where the plan or the cell cannot be used; StoreError where `results` cannot be
    written.
    """
    from benchsuite.plan import plan as plans
    from benchsuite.rules import plans as judged_plans

    if isinstance(plan_or_cell, (str, Path)):
        plan = judged_plans.load(plan_or_cell, seeds=seeds)
    elif isinstance(plan_or_cell, plans.Plan):
        plan = plan_or_cell
        if seeds is not None:
            plan = dataclasses.replace(plan, seeds=plans.checked_seeds(seeds), pairs=None)
    else:
        plan = _of_cells([plan_or_cell] if isinstance(plan_or_cell, Cell) else plan_or_cell, seeds)
    return run_plan(examined(plan), Store(results), fresh=fresh)


def load_results(path: str | Path = "results") -> pd.DataFrame:
    """The tidy table of a results folder, one row per run (ECOSYSTEM.md section 2). UsageError
    where it is none."""
    return existing(path).frame()


def run_plan(
    plan: Plan, store: Store, *, fresh: bool = False, progress: Progress | None = None
) -> Tally:
    """Runs the missing runs of a plan that `examined` returned. SIGTERM ends it as Ctrl-C does."""
    from benchsuite.cluster.local import Cluster, sigterm_as_interrupt
    from benchsuite.run.runner import run_cells

    _startable(plan)
    main = (
        threading.current_thread() is threading.main_thread()
    )  # only there a signal can be handled
    with sigterm_as_interrupt() if main else contextlib.nullcontext(), Cluster() as cluster:
        here = setting(store)
        return run_cells(
            plan.runs(),
            store,
            setting=here,
            launch=launcher(cluster, here),
            simulate=simulator(here),
            refused=plan.refused_runs(),
            fresh=fresh,
            progress=progress,
        )


def examined(plan: Plan) -> Plan:
    """The plan with what this machine lacks among the refused.

    UsageError for a figure that the page cannot draw, and for tuned cells with the seed of the
    trials.
    """
    from benchsuite.programs import doctor
    from benchsuite.report import spec
    from benchsuite.rules import plans as judged_plans
    from benchsuite.run import tune

    tune.check_seeds(plan.cells, plan.seeds)
    spec.parse(plan.figures)  # now, rather than after everything has run
    return judged_plans.on_this_machine(plan, doctor.examine_torch)


def compare(
    base: str | Path, head: str | Path, *, loss_tolerance: float | None = None
) -> Comparison:
    """Deterministic quantities of two results folders. UsageError where one of them holds no
    run."""
    from benchsuite.analysis import regression

    old = existing(base)
    new = existing(head)

    def same_build(a: Run, b: Run) -> bool:
        environments = (
            old.environment(a.machine, a.environment_id),
            new.environment(b.machine, b.environment_id),
        )
        versions = [
            (environment.get("versions") or {}).get("torch") for environment in environments
        ]
        return a.machine == b.machine and versions[0] == versions[1] is not None

    runs = [store.runs() for store in (old, new)]
    for folder, found in zip((base, head), runs, strict=True):
        if not found:
            raise UsageError(
                f"{folder} holds no run: give a results folder (<machine>/<cell id>/<run id>.json)"
            )
    return regression.compare(*runs, same_build=same_build, loss_tolerance=loss_tolerance)


def collect(run_dir: Path, store: Store) -> Tally:
    """Stores the runs that a user's own torchrun left in `run_dir`; those taken before are left
    alone.

    UsageError where there are none. Machine and environment are those of the host that collects.
    """
    from benchsuite.cluster import collect as jobs
    from benchsuite.measure import load
    from benchsuite.results.assemble import assemble
    from benchsuite.run.runner import Tally

    found = jobs.collect(run_dir)
    here = setting(store)
    taken = {(row["cell_id"], row["seed"], row["started_at"]) for row in store.rows()}
    tally = Tally()
    for cell, folder, outcome in found:
        if (cell.id, cell.seed, outcome.started_at) in taken:
            tally.stored += 1
            continue
        made = assemble(
            cell,
            folder,
            outcome,
            code_id=here.code_id(cell),
            machine=here.machine,
            environment_id=here.environment_id,
            cores=load.num_cores(),
            foreign_cpu_share=None,
        )
        tally.add(made, store.write(made))
    return tally


def existing(path: str | Path) -> Store:
    """The store in a folder that is there; UsageError where it is not."""
    if not Path(path).is_dir():
        raise UsageError(
            f"{path}: no such results folder; `benchsuite run` makes one (default: results)"
        )
    return Store(path)


def setting(store: Store) -> Setting:
    """Machine, environment and code of this process; the environment is stored."""
    from benchsuite.measure import environment
    from benchsuite.results import code_id
    from benchsuite.run.runner import Setting

    store.check_writable()
    machine = environment.machine()
    return Setting(
        machine=machine,
        environment_id=store.write_environment(machine, environment.collect()),
        code_id=code_id.code_id,
        rules_id=code_id.rules_id(),
    )


def launcher(cluster: Launcher, here: Setting) -> Callable[[Cell], Run]:
    """Starts a cell's ranks, waits for them, makes a run of their files; the run directory is
    private and removed."""
    from benchsuite.measure.load import CpuMeter
    from benchsuite.results.assemble import assemble

    def launch(cell: Cell) -> Run:
        with _run_dir() as run_dir:
            meter = CpuMeter()
            outcome = cluster.run(cell, run_dir)
            load = meter.read()
            return assemble(
                cell,
                run_dir,
                outcome,
                code_id=here.code_id(cell),
                machine=here.machine,
                environment_id=here.environment_id,
                cores=load.cores,
                foreign_cpu_share=load.foreign_share,
            )

    return launch


def simulator(here: Setting) -> Callable[[Sequence[Cell]], Iterator[tuple[Cell, Run]]]:
    """Runs cells of the virtual clock, one process per core; (cell, run) as they end, the long ones
    begun first."""
    from benchsuite.cluster.simulators import Simulators, groups

    def simulate(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Run]]:
        with Simulators() as simulators:
            for cell, sections, outcome in simulators.run(groups(cells)):
                flags = set(outcome.flags)
                if cell.gradients == "none":
                    flags.add(TIMING_ONLY)
                if sections and sections["result"]["diverged_step"] is not None:
                    flags.add(DIVERGED)
                yield (
                    cell,
                    Run(
                        cell=cell,
                        code_id=here.code_id(cell),
                        status=outcome.status,
                        reason=outcome.reason,
                        culprit=outcome.culprit,
                        flags=tuple(sorted(flags)),
                        started_at=outcome.started_at,
                        machine=here.machine,
                        environment_id=here.environment_id,
                        **sections,
                    ),
                )

    return simulate


@contextlib.contextmanager
def _run_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="benchsuite-"))  # mode 0700
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _of_cells(given: Sequence[Cell], seeds: Sequence[int] | None) -> Plan:
    """A plan without figures: the legal ones of the cells, the refused ones with their reasons,
    each once.

    seeds: of every cell; None = each cell with its own.
    """
    from benchsuite.plan import fields
    from benchsuite.plan.plan import Plan, checked_seeds
    from benchsuite.rules import plans as judged_plans

    resolved = [cells.resolve(fields.checked(cell)) for cell in given]
    own = frozenset((cell.id, cell.seed) for cell in resolved)
    once = {cell.id: cell for cell in reversed(resolved)}
    plan = Plan(
        name="cells",
        path=None,
        question="",
        seeds=checked_seeds(
            seeds if seeds is not None else [cell.seed for cell in resolved] or [0]
        ),
        cells=tuple(once.values())[::-1],
        refused=(),
        num_excluded=0,
        figures=(),
        text="",
        pairs=own if seeds is None else None,
    )
    return judged_plans.judged(plan)


def _startable(plan: Plan) -> None:
    """Only `local` starts ranks itself in this version."""
    for cell in plan.cells:
        if cell.cluster != "local":
            raise UsageError(
                f"{cell.label}: cluster {cell.cluster!r} is started by your own command: "
                "benchsuite plan PLAN --write cells.json, torchrun .. -m benchsuite.worker, "
                "benchsuite collect RUNDIR"
            )
