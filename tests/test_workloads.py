"""What every workload shares: workers that wait for each other make the steps of one process.

The transformer's optimisers and the agent's rollouts have this law in files of their own.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from benchsuite import rules
from benchsuite.laws import synchronous
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.runs import rebuilt
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.worker import setup
from benchsuite.worker.setup import Training
from benchsuite.workload import seeded_layers


def cell(workload: str, replicas: int) -> Cell:
    made = resolve(
        Cell(
            workload=workload,
            replicas=replicas,
            topology="ring",
            precision="fp64",
            budget=Budget(steps=10),
        )
    )
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


def test_a_workload_that_starts_draws_nothing_of_the_model_that_another_rank_builds() -> None:
    """Torch's random state is global: layers that a teacher in `start` draws once shifted those of
    another thread's model."""
    made = cell("mlp", 2)
    building = threading.Event()
    drawn = threading.Event()

    class Halves:
        """Builds one layer, gives the other thread its time, builds the second."""

        def layers(self) -> list[nn.Module]:
            first = nn.Linear(4, 4)
            building.set()
            drawn.wait(0.3)
            return [first, nn.Linear(4, 4)]

    def starts() -> None:
        building.wait()
        setup.start_workload(made)
        drawn.set()

    def weights() -> torch.Tensor:
        return torch.cat(
            [
                p.detach().flatten()
                for layer in seeded_layers(Halves(), 0)
                for p in layer.parameters()
            ]
        )  # type: ignore[arg-type]

    alone = weights()
    building.clear()
    other = threading.Thread(target=starts)
    other.start()
    beside = weights()
    other.join(10)
    assert drawn.is_set() and not other.is_alive()
    assert torch.equal(beside, alone), (
        f"{int((beside != alone).sum())} of {alone.numel()} parameters are others"
    )
