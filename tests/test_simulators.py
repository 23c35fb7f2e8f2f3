"""Processes that simulate: who dies, hangs or raises costs its cell, the rest runs; nothing is
left; runs are stored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import benchsuite
from benchsuite import rules
from benchsuite.cluster.simulator_pool import Ended, SimulatorPool, groups
from benchsuite.errors import UsageError
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.results.record import Status
from tests.bench import ROOT, TINY

pytestmark = [pytest.mark.procs, pytest.mark.timeout(90)]

HANGS = '''
import time
from benchsuite.sync.asynchronous import Strategy as Whole


class Strategy(Whole):
    """Asynchronous, until it does something else."""

    def step(self, batch):
        {what}
        return super().step(batch)
'''


def cell(**fields: Any) -> Cell:
    fields = {"sync": "asynchronous", "topology": "parameter_server", "replicas": 3, **fields}
    made = resolve(
        Cell(workload=TINY, clock="virtual", compute_time={"kind": "exponential"}, **fields)
    )
    assert rules.validate(made) == []
    return made


def strategy(folder: Path, what: str) -> str:
    path = folder / "strange.py"
    path.write_text(HANGS.format(what=what))
    return str(path)


def by_label(ended: Sequence[Ended]) -> dict[str, Any]:
    return {
        f"{made.sync.rpartition('/')[2]} {made.seed}": (outcome.status, outcome.reason)
        for made, _, outcome in ended
    }


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_cells_are_grouped_by_trajectory_and_the_long_ones_come_first() -> None:
    links = [cell(sync="synchronous", topology="ring", link_mbit=mbit) for mbit in (1.0, 10.0)]
    short = cell(budget=Budget(steps=2))
    long = cell(budget=Budget(steps=50))
    assert groups([short, links[0], long, links[1]]) == [[long], links, [short]]


def test_an_error_costs_its_cell_and_names_the_rank(tmp_path: Path) -> None:
    raises = cell(sync=strategy(tmp_path, "raise ValueError('as asked')"))
    with SimulatorPool(1) as simulators:
        ended = list(simulators.run([[raises], [cell()]]))
    found = by_label(ended)
    assert found["asynchronous 0"] == (Status.OK, None)
    status, reason = found["strange.py 0"]
    assert (
        status is Status.FAILED
        and "rank 0 raised ValueError: as asked (at 0 virtual seconds)" in reason
    )
    assert (
        next(outcome for made, _, outcome in ended if made.sync != "asynchronous").culprit["rank"]
        == 0
    )


def test_a_killed_process_costs_its_cell_and_the_rest_of_its_group_goes_on(tmp_path: Path) -> None:
    dies = cell(sync=strategy(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    with SimulatorPool(1) as simulators:
        ended = list(simulators.run([[dies, cell(), cell().with_seed(1)]]))
    assert by_label(ended) == {
        "strange.py 0": (Status.FAILED, "the simulator was ended by SIGKILL"),
        "asynchronous 0": (Status.OK, None),
        "asynchronous 1": (Status.OK, None),
    }


def test_a_cell_that_overstays_its_deadline_is_a_timeout(tmp_path: Path) -> None:
    hangs = cell(sync=strategy(tmp_path, "time.sleep(60)"), budget=Budget(timeout_s=1.5))
    begin = time.monotonic()
    with SimulatorPool(1) as simulators:
        ended = list(simulators.run([[hangs], [cell()]]))
    assert by_label(ended)["strange.py 0"] == (Status.TIMEOUT, "deadline of 1.5 s")
    assert by_label(ended)["asynchronous 0"] == (Status.OK, None)
    assert time.monotonic() - begin < 45


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_no_simulator_survives_its_command(tmp_path: Path, stopped: bool) -> None:
    """SIGKILL to the command, also while its simulator is stopped."""
    mark = tmp_path / "pid"
    path = strategy(
        tmp_path, f"open({str(mark)!r}, 'w').write(str(__import__('os').getpid())); time.sleep(60)"
    )
    program = (
        "from benchsuite.cluster.simulator_pool import SimulatorPool\n"
        "from benchsuite.plan.cell import Cell, resolve\n"
        f"made = resolve(Cell(workload={TINY!r}, sync={path!r}, topology='parameter_server', clock='virtual'))\n"
        "with SimulatorPool(1) as simulators: list(simulators.run([[made]]))\n"
    )
    command = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    for _ in range(1200):
        if mark.exists() and mark.read_text():
            break
        time.sleep(0.05)
    pid = int(mark.read_text())
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    command.kill()
    command.wait()
    assert gone(pid), f"simulator {pid} outlived its command by 5 s"


def test_runs_are_stored_resumed_and_marked(tmp_path: Path) -> None:
    cells = [
        cell(),
        cell(gradients="none"),
        cell(sync="synchronous", topology="ring"),
        cell(options={"tiny": {"nan_at": 2}}),
    ]
    first = benchsuite.run(cells, results=tmp_path, seeds=[0, 1])
    assert first.counts[Status.OK] == 8 and not first.failures
    again = benchsuite.run(cells, results=tmp_path, seeds=[0, 1])
    assert again.stored == 8 and again.counts[Status.OK] == 0
    table = benchsuite.load_results(tmp_path)
    assert (
        set(table["provenance"]) == {"virtual"}
        and table["wall_s"].isna().all()
        and (table["virtual_s"] > 0).all()
    )
    flags = {made.id: set(table.loc[table["cell_id"] == made.id, "flags"]) for made in cells}
    assert flags == {
        cells[0].id: {""},
        cells[1].id: {"timing_only"},
        cells[2].id: {""},
        cells[3].id: {"diverged"},
    }
    assert (table["simulation_s"] > 0).all()
    silent = table[table["gradients"] == "none"]
    assert (
        silent["final_metric"].isna().all()
        and silent["target_metric"].isna().all()
        and silent["staleness_mean"].notna().all()
    )


def test_real_and_virtual_cells_of_one_plan_run_one_kind_after_the_other(tmp_path: Path) -> None:
    real = resolve(Cell(workload=TINY, topology="ring", replicas=2))
    tally = benchsuite.run([cell(), real, cell(gradients="none")], results=tmp_path)
    assert tally.counts[Status.OK] == 3
    table = benchsuite.load_results(tmp_path).sort_values("run_id")
    assert (
        sorted(table["clock"]) == ["virtual", "virtual", "wall"]
        and table["clock"].iloc[0] == "wall"
    )


def test_a_refused_cell_is_an_answer(tmp_path: Path) -> None:
    for fields, said in (
        ({"sync": "ddp", "topology": "native"}, "sync = ddp"),
        (
            {
                "sync": "asynchronous",
                "topology": "parameter_server",
                "options": {"asynchronous": {"lock": "none"}},
            },
            "torn reads",
        ),
        (
            {"topology": "ring", "replicas": 192},
            "2 N (N-1) messages of a mean are simulated up to 128",
        ),
        (
            {
                "sync": "k_sync",
                "topology": "parameter_server",
                "replicas": 2,
                "options": {"k_sync": {"late": "cancel", "wait": False}},
            },
            "no gradient is too late",
        ),
        ({"topology": "ring", "device": "cuda"}, "share one process"),
        (
            {
                "topology": "ring",
                "faults": ({"rank": 0, "phase": "send", "step": 1, "signal": "SIGKILL"},),
            },
            "no process to strike",
        ),
    ):
        made = resolve(
            Cell(workload="mlp", clock="virtual", batch_mode="fixed_per_worker", **fields)
        )
        reasons = "; ".join(problem.reason for problem in rules.validate(made))
        assert said in reasons, (fields, reasons)
        tally = benchsuite.run([made], results=tmp_path)
        assert tally.counts[Status.UNSUPPORTED] == 1


def test_what_belongs_to_the_virtual_clock_is_refused_under_the_wall_clock() -> None:
    for field, value in (
        ("gradients", "none"),
        ("receive_cost", {"incast": 2.0}),
        ("compute_time", {"kind": "fixed"}),
    ):
        made = resolve(Cell(workload="mlp", topology="ring", **{field: value}))
        assert any(
            field in problem.reason and "clock = virtual" in problem.remedy
            for problem in rules.validate(made)
        ), field
    for cost, said in (({"incast": 0.5}, "incast = 0.5"), ({"copy": 1}, "unknown key 'copy'")):
        made = resolve(Cell(workload="mlp", topology="ring", clock="virtual", receive_cost=cost))
        assert any(said in problem.reason for problem in rules.validate(made)), cost


def test_from_a_thread_too(tmp_path: Path) -> None:
    done: list[Any] = []
    thread = threading.Thread(
        target=lambda: done.append(benchsuite.run([cell()], results=tmp_path))
    )
    thread.start()
    thread.join(60)
    assert done and done[0].counts[Status.OK] == 1
    with pytest.raises(UsageError, match="unknown clock 'virtul'"):
        resolve(Cell(clock="virtul"))
