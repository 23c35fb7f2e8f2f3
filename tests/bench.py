"""`Bench`: trains small cells with the real worker on one shared cluster, and gives back what would
be stored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchsuite import rules
from benchsuite.cluster.local import Cluster
from benchsuite.laws.harness.cases import TINY as TINY
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.results.record import Run
from benchsuite.running import starters

ROOT = Path(__file__).parent.parent


def cell(*, steps: int | None = None, timeout_s: float = 20.0, **fields: Any) -> Cell:
    """A resolved cell that no rule refuses of the tiny workload; `options` of it as `tiny = {..}`."""
    tiny = fields.pop("tiny", {})
    options = {**({"tiny": tiny} if tiny else {}), **fields.pop("options", {})}
    fields.setdefault("workload", TINY)
    made = resolve(Cell(budget=Budget(steps=steps, timeout_s=timeout_s), options=options, **fields))
    problems = rules.validate(made)
    assert not problems, problems
    return made


def fault(rank: int, phase: str, how: str, step: int = 3) -> tuple[dict[str, Any], ...]:
    return ({"rank": rank, "phase": phase, "step": step, "signal": how},)


def behind(rank: int, num_workers: int) -> dict[str, float]:
    """The straggler of a cell in which all workers but `rank` are slow: batches are handed out, and
    on busy cores the others may have used the budget before `rank` has come to the step where it is
    to be struck."""
    return {str(other): 30.0 for other in range(num_workers) if other != rank}


class Bench:
    """Fresh processes per cell on a cluster that is already there."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        here: Any = SimpleNamespace(machine="m", environment_id="e", code_id=lambda cell: "code")
        self.launch = lambda cell: starters.launch(cluster, cell, here)

    def run(self, **fields: Any) -> Run:
        """Trains one cell, whatever becomes of it."""
        return self.launch(cell(**fields))

    def ok(self, **fields: Any) -> Run:
        """Trains one cell to its end."""
        run = self.run(**fields)
        assert run.status == "ok", (run.cell.label, run.reason, run.culprit)
        return run
