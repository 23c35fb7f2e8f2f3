"""Small simulated cells and their run files, for the tests of what reads runs of the virtual
clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchsuite import rules
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.results.assemble.virtual import sections
from benchsuite.results.record import Run, Status
from benchsuite.virtual.world import simulate
from tests import synthetic_runs as made

QUADRATIC = str(Path(__file__).parent / "workloads" / "quadratic.py")
EXPONENTIAL = {"kind": "exponential", "mean_s": 0.01}
FIXED = {"kind": "fixed", "mean_s": 0.01}


def cell(sync: str, replicas: int, times: dict[str, Any] = EXPONENTIAL, **fields: Any) -> Cell:
    """150 global batches of 8. Delay makes the step too long for 8 asynchronous workers: they never
    arrive."""
    options: dict[str, dict[str, Any]] = {"quadratic": {"lr": 1.7, "global_batch": 8}}
    if sync == "k_sync":
        options["k_sync"] = {"backup_workers": replicas // 4}
    made = resolve(
        Cell(
            workload=QUADRATIC,
            sync=sync,
            topology="parameter_server",
            replicas=replicas,
            clock="virtual",
            compute_time=times,
            precision="fp64",
            options=options,
            budget=Budget(samples=1200),
            **fields,
        )
    )
    assert rules.validate(made) == []
    return made


def run(
    of: Cell, folder: Path | str, **more: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """`result`, `cost`, `raw` of a simulation; `more` as for `simulate`."""
    simulated = simulate(of, folder, **more)
    return sections(of, simulated.records, simulated.facts)


def stored(of: Cell, folder: Path) -> Run:
    result, cost, raw = run(of, folder)
    return Run(
        cell=of,
        code_id="c",
        status=Status.OK,
        result=result,
        cost=cost,
        raw=raw,
        machine=made.MACHINE,
        cell_id=of.id,
        started_at="2026-01-05T00:00:00Z",
        environment_id=made.ENVIRONMENT_ID,
        run_id=f"v-{of.id}-{of.seed}",
    )
