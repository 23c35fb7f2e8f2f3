"""Modules that carry something from gradient to gradient: each rank has its own, as in a process of
its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchsuite.plan.cell import Cell
from benchsuite.results.record import dumps
from benchsuite.virtual.states import ModuleStates
from benchsuite.virtual.world import Kept
from tests.bench import Bench
from tests.bench import cell as bench_cell
from tests.virtual_runs import run

STATEFUL = str(Path(__file__).parent / "workloads" / "stateful.py")
KEEPS = ("batch_norm", "counter", "dropout")


def cell(keeps: str, **fields: Any) -> Cell:
    options = {"stateful": {"keeps": keeps}}
    return bench_cell(workload=STATEFUL, options=options, precision="fp64", **fields)


@pytest.mark.procs
@pytest.mark.timeout(120)
@pytest.mark.parametrize("keeps", [*KEEPS, "nothing"])
def test_losses_and_evaluations_are_those_of_real_processes(
    keeps: str, bench: Bench, tmp_path: Path
) -> None:
    for way in (
        {"sync": "synchronous", "topology": "ring", "replicas": 2},
        {"sync": "synchronous", "topology": "parameter_server", "replicas": 2},
        {"sync": "asynchronous", "topology": "parameter_server", "replicas": 1},
    ):
        given = {
            "workload": STATEFUL,
            "options": {"stateful": {"keeps": keeps}},
            "precision": "fp64",
            **way,
        }
        real = bench.ok(**given)
        virtual, cost, _ = run(cell(keeps, clock="virtual", **way), tmp_path)
        for name, mine, theirs in (
            ("loss", virtual["loss"], real.result["loss"]),
            ("metric", virtual["evaluations"]["metric"], real.result["evaluations"]["metric"]),
        ):
            assert len(mine) == len(theirs) > 0
            gap = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
            assert gap <= 1e-10, f"{real.cell.label}, {name}: {gap:.3g} apart"
        assert ("every rank its own" in cost["simulation"]["one_by_one"]) == (keeps in KEEPS)


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("sync", ["synchronous", "asynchronous"])
def test_what_ran_before_in_the_process_changes_nothing(
    keeps: str, sync: str, tmp_path: Path
) -> None:
    made = cell(keeps, sync=sync, topology="parameter_server", replicas=4, clock="virtual")
    first = dumps(run(made, tmp_path)[0])
    torch.rand(17)
    run(
        cell(keeps, sync="asynchronous", topology="parameter_server", replicas=2, clock="virtual"),
        tmp_path,
    )
    assert dumps(run(made, tmp_path, kept=Kept())[0]) == first
    state = torch.default_generator.get_state()
    run(made, tmp_path)
    assert torch.equal(torch.default_generator.get_state(), state), (
        "the caller's random numbers are its own"
    )


def test_a_buffer_that_never_changes_hinders_nobody(tmp_path: Path) -> None:
    made = cell("constant", sync="synchronous", topology="native", replicas=8, clock="virtual")
    assert run(made, tmp_path)[1]["simulation"]["one_by_one"] == ""


def test_ranks_draw_apart_and_go_on_where_they_were() -> None:
    states = ModuleStates(nn.Dropout(0.5), seed=3)

    def draw(rank: int) -> list[float]:
        with states.of(rank):
            return torch.rand(4).tolist()

    states.look(lambda: torch.rand(1))
    assert states.changing
    drawn = [draw(0), draw(1), draw(0), draw(1)]
    again = ModuleStates(nn.Dropout(0.5), seed=3)
    again.changing = True
    with again.of(0):
        assert torch.rand(8).tolist() == drawn[0] + drawn[2]
    assert drawn[0] != drawn[1] and drawn[2] != drawn[3]
    still = ModuleStates(nn.Linear(2, 2), seed=3)
    still.look(lambda: None)
    assert not still.changing
