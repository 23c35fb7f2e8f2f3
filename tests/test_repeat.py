"""A synchronous run repeats bit for bit: each workload twice in fresh processes, on one worker and
on two.

The agent's runs, whose batches come from acting, are repeated in test_rl_agent.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import benchsuite
from benchsuite.plan.cell import Budget, Cell
from benchsuite.results.store import Store

pytestmark = [pytest.mark.procs, pytest.mark.timeout(120)]

STEPS = {"cnn": 40, "transformer": 12}


def _runs(folder: Path, *, seed: int = 0) -> dict[tuple[str, int], str]:
    """Checksum of the last parameters by workload and number of workers."""
    cells = [
        Cell(
            workload=name,
            preset="smoke",
            replicas=workers,
            topology="ring",
            budget=Budget(steps=steps),
            seed=seed,
        )
        for name, steps in STEPS.items()
        for workers in (1, 2)
    ]
    benchsuite.run(cells, results=folder, seeds=[seed])
    runs = list(Store(folder).runs())
    assert all(run.status == "ok" for run in runs), [run.reason for run in runs]
    return {(run.cell.workload, run.cell.replicas): run.result["checksum"] for run in runs}


def test_the_same_bits_again(tmp_path: Path):
    first = _runs(tmp_path / "first")
    second = _runs(tmp_path / "second")
    assert len(first) == 2 * len(STEPS)
    assert first == second


def test_another_seed_gives_other_bits(tmp_path: Path):
    benchsuite.run(
        Cell(workload="cnn", preset="smoke", budget=Budget(steps=4)), results=tmp_path, seeds=[0, 1]
    )
    one, other = [run.result["checksum"] for run in Store(tmp_path).runs()]
    assert one != other
