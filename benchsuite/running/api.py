"""The suite in Python: `run`, `load_results`, `compare`, `collect`. No torch is imported here.

The process that calls `run` never touches torch or the accelerator: ranks are processes of their
own. What is heavy is imported inside the functions, so that importing the package stays fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchsuite.errors import UsageError
from benchsuite.plan.cell import Cell, resolve
from benchsuite.results.record import Run
from benchsuite.results.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from benchsuite.analysis.regression import Comparison
    from benchsuite.cluster import Engine
    from benchsuite.plan.plan import Plan
    from benchsuite.running.progress import Progress
    from benchsuite.running.runner import Tally


def run(
    plan_or_cell: Plan | Cell | Sequence[Cell] | str | Path,
    *,
    results: str | Path = "results",
    seeds: Sequence[int] | None = None,
    fresh: bool = False,
) -> Tally:
    """Runs what is missing of a plan or of cells; returns what became of the runs.

    plan_or_cell: a plan's name, its path or a `Plan`; one cell or several. seeds: default those of
    the plan, of a cell its own. UsageError where the plan or the cell cannot be used, StoreError
    where `results` cannot be written.
    """
    from benchsuite.plan.plan import Plan, checked_seeds
    from benchsuite.rules import plans

    if isinstance(plan_or_cell, (str, Path)):
        plan = plans.load(plan_or_cell, seeds=seeds)
    elif isinstance(plan_or_cell, Plan):
        plan = plan_or_cell
        if seeds is not None:
            plan = dataclasses.replace(plan, seeds=checked_seeds(seeds), pairs=None)
    else:
        plan = _of_cells([plan_or_cell] if isinstance(plan_or_cell, Cell) else plan_or_cell, seeds)

    return run_plan(examined(plan), Store(results), fresh=fresh)


def load_results(path: str | Path = "results") -> pd.DataFrame:
    """The tidy table of a results folder, one row per run. UsageError where it is none."""
    return existing(path).frame()


def run_plan(
    plan: Plan,
    store: Store,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    engine_flags: Mapping[str, str] | None = None,
) -> Tally:
    """Runs the missing runs of a plan that `examined` returned. SIGTERM ends it as Ctrl-C does.

    engine_flags: for the flags that the plan's cluster engine declares.
    """
    from benchsuite.cluster.signals import sigterm_as_interrupt
    from benchsuite.running import setting, starters
    from benchsuite.running.runner import run_cells

    with sigterm_as_interrupt(), starters.Engines(engine_flags) as engines:
        engines.check(plan.cells)
        here = setting.current(store)
        return run_cells(
            plan.runs(),
            store,
            setting=here,
            launch=lambda cell: starters.launch(engines.of(cell), cell, here),
            simulate=lambda cells: starters.simulate(cells, here),
            refused=plan.refused_runs(),
            fresh=fresh,
            progress=progress,
        )


def examined(plan: Plan) -> Plan:
    """The plan with what this machine lacks among the refused.

    UsageError for a figure that the page cannot draw, and for tuned cells with the seed of the
    trials.
    """
    from benchsuite.measure import torch_build
    from benchsuite.report import spec
    from benchsuite.rules import plans
    from benchsuite.running import tune

    tune.check_seeds(plan.cells, plan.seeds)
    spec.parse(plan.figures)  # now, rather than after everything has run
    return plans.on_this_machine(plan, torch_build.examine_torch)


def compare(
    base: str | Path, head: str | Path, *, loss_tolerance: float | None = None
) -> Comparison:
    """Compares the deterministic quantities of two results folders.

    UsageError where one of them holds no run.
    """
    from benchsuite.analysis import regression

    old = existing(base)
    new = existing(head)

    def same_build(a: Run, b: Run) -> bool:
        """Whether two runs are of one machine and one version of torch, which is known."""
        torches = [_torch_of(old, a), _torch_of(new, b)]
        return a.machine == b.machine and torches[0] == torches[1] is not None

    runs = [store.runs() for store in (old, new)]

    for folder, found in zip((base, head), runs, strict=True):
        if not found:
            raise UsageError(
                f"{folder} holds no run: give a results folder (<machine>/<cell id>/<run id>.json)"
            )

    return regression.compare(*runs, same_build=same_build, loss_tolerance=loss_tolerance)


def collect(run_dir: Path, store: Store, *, cluster: str = "torchrun") -> Tally:
    """Stores the runs that ranks started by the user left in `run_dir`, each only once.

    cluster: the engine that reads them. UsageError where there are none. Machine and environment
    are those of the host that collects.
    """
    from benchsuite.measure import load
    from benchsuite.plan import plugins
    from benchsuite.results.assemble import assemble
    from benchsuite.running import setting
    from benchsuite.running.runner import Tally

    engine: Engine = plugins.load("cluster", cluster)()
    found = engine.collect(run_dir)
    here = setting.current(store)
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


def _torch_of(store: Store, run: Run) -> str | None:
    versions = store.environment(run.machine, run.environment_id).get("versions") or {}
    torch: str | None = versions.get("torch")
    return torch


def existing(path: str | Path) -> Store:
    """The store in a folder that is there; UsageError where it is not."""
    if not Path(path).is_dir():
        raise UsageError(
            f"{path}: no such results folder; `benchsuite run` makes one (default: results)"
        )
    return Store(path)


def _of_cells(given: Sequence[Cell], seeds: Sequence[int] | None) -> Plan:
    """A plan without figures: the legal cells, and the refused ones with their reasons.

    Each cell is there once. seeds: of every cell; None = each cell with its own.
    """
    from benchsuite.plan import fields
    from benchsuite.plan.plan import Plan, checked_seeds
    from benchsuite.rules import plans

    resolved = [resolve(fields.checked(cell)) for cell in given]
    own = frozenset((cell.id, cell.seed) for cell in resolved)
    once = list({cell.id: cell for cell in reversed(resolved)}.values())[::-1]
    all_seeds = [cell.seed for cell in resolved] or [0]
    plan = Plan(
        name="cells",
        path=None,
        question="",
        seeds=checked_seeds(all_seeds if seeds is None else seeds),
        cells=tuple(once),
        refused=(),
        num_excluded=0,
        figures=(),
        text="",
        pairs=own if seeds is None else None,
    )
    return plans.judged(plan)
