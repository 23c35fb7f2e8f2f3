"""What every workload shares: workers that wait for each other make the steps of one process.

The transformer's optimisers and the agent's rollouts have this law in files of their own.
"""

from __future__ import annotations

import pytest

from benchsuite import rules
from benchsuite.cell import Budget, Cell, resolve
from benchsuite.laws import synchronous, twins
from benchsuite.laws.ranks import thread_ranks
from benchsuite.laws.runs import rebuilt
from benchsuite.training import Training


def cell(workload: str, replicas: int) -> Cell:
    made = resolve(Cell(workload=workload, replicas=replicas, topology="ring", precision="fp64", budget=Budget(steps=10)))
    assert rules.validate(made) == []
    return made


@pytest.mark.parametrize("workload", ["cnn", "mlp"])
@pytest.mark.parametrize("replicas", [2, 4])
def test_workers_together_make_the_step_of_one_process(workload: str, replicas: int) -> None:
    figure = synchronous.equals_one_process(thread_ranks, cell(workload, replicas))
    assert figure.value <= 1e-10, f"{figure.value} from one process, bound 1e-10: {figure.detail}"


@pytest.mark.parametrize("workload", ["cnn", "mlp"])
def test_workers_that_do_not_agree_are_seen(workload: str) -> None:
    def silent(training: Training) -> Training:
        return rebuilt(training, topology=twins.OtherMean(training.topology, twins.silent))

    figure = synchronous.equals_one_process(thread_ranks, cell(workload, 2), change=silent)
    assert figure.value > 1e-3, f"{figure.value} from one process: {figure.detail}"
