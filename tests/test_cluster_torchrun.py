"""The user's own torchrun: one job runs many cells, a dead rank costs one cell, the culprit is
known first-hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchsuite.cluster import launcher_environment
from benchsuite.cluster.supervisor_records import collect
from benchsuite.errors import UsageError
from benchsuite.plan.cell import Budget, Cell
from benchsuite.results.record import Status

HERE = Path(__file__).parent


def cell(seed: int, *faults: dict[str, object], replicas: int = 2, timeout_s: float = 30.0) -> Cell:
    return Cell(
        replicas=replicas,
        seed=seed,
        faults=faults,
        budget=Budget(steps=5, timeout_s=timeout_s),
        cluster="torchrun",
    )


def write_cells(path: Path, cells: list[Cell]) -> Path:
    path.write_text(json.dumps({"schema": 1, "cells": [entry.to_json() for entry in cells]}))
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}


def supervise(tmp_path: Path, cells: list[Cell]) -> list[str]:
    return [
        str(HERE / "cluster_entries.py"),
        "--cells",
        str(write_cells(tmp_path / "cells.json", cells)),
        "--out",
        str(tmp_path / "run"),
        "--entry",
        "cluster_entries:connected",
    ]


CELLS = [
    cell(0),
    cell(1, {"rank": 1, "phase": "send", "step": 2, "signal": "SIGKILL"}),
    cell(2, {"rank": 0, "phase": "compute", "step": 2, "signal": "SIGSTOP"}, timeout_s=1.5),
    cell(3, replicas=1),
    cell(4, replicas=3),
    cell(5),
]


def check(run_dir: Path) -> None:
    results = collect(run_dir)
    assert [entry.seed for entry, _, _ in results] == [0, 1, 2, 3, 4, 5]
    outcomes = [outcome for _, _, outcome in results]
    expected = [Status.OK, Status.FAILED, Status.TIMEOUT, Status.OK, Status.UNSUPPORTED, Status.OK]
    assert [outcome.status for outcome in outcomes] == expected, outcomes
    assert outcomes[1].reason == "rank 1 (worker) was ended by SIGKILL in send of step 2"
    assert outcomes[1].seconds < 5.0
    assert outcomes[2].culprit == {
        "rank": 0,
        "role": "worker",
        "how": "stopped",
        "phase": "compute",
        "step": 2,
    }
    rule = "replicas(3) x model_parallel(1) + servers(0) = 3 ranks, but 2 were started: lower replicas or start 3"
    assert outcomes[4].reason == rule
    assert sorted(path.name for path in results[0][1].glob("*.json")) == [
        "cell.json",
        "rank0.json",
        "rank1.json",
        "supervisor0.json",
        "supervisor1.json",
    ]


@pytest.mark.procs
def test_one_torchrun_job_runs_all_its_cells_whatever_happens_to_one(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
        *supervise(tmp_path, CELLS),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "run")


@pytest.mark.procs
def test_ranks_of_a_launcher_without_a_store_meet_at_rank_0s(tmp_path: Path) -> None:
    port = str(free_port())
    processes = []
    for rank in (0, 1):
        variables = {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, *supervise(tmp_path, CELLS)]
        processes.append(
            subprocess.Popen(
                command, env={**environment(), **variables}, stderr=subprocess.PIPE, text=True
            )
        )
    for process in processes:
        said = process.communicate(timeout=90)[1]
        assert process.returncode == 0, said
    check(tmp_path / "run")
    again = subprocess.run(
        [sys.executable, *supervise(tmp_path, CELLS)],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2
    assert "holds records of an earlier job: collect them and give another --out" in again.stderr


def test_a_cell_without_all_records_is_not_ok(tmp_path: Path) -> None:
    folder = tmp_path / f"0-{cell(0).id}-s0"
    folder.mkdir()
    (folder / "cell.json").write_text(json.dumps(cell(0).to_json()))
    (folder / "rank0.json").write_text("{}")
    (folder / "rank0.ok").write_text("2\n")
    ((_, _, outcome),) = collect(tmp_path)
    assert outcome.status is Status.FAILED
    assert outcome.reason is not None
    assert outcome.reason.startswith(
        "nothing was recorded of rank 1: copy the folders of all hosts together"
    )


def test_collect_refuses_a_folder_without_cells(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no cells"):
        collect(tmp_path)


@pytest.mark.parametrize("launcher", list(launcher_environment.LAUNCHERS))
def test_the_place_of_a_rank_is_read_from_its_launcher(launcher: str) -> None:
    names = launcher_environment.LAUNCHERS[launcher]
    place = launcher_environment.resolve(
        {
            names.rank: "0",
            names.world_size: "4",
            names.local_rank: "0",
            names.local_world_size: "2",
            "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "29500",
        }
    )
    assert (place.launcher, place.rank, place.world_size, place.hosts) == (
        launcher,
        0,
        4,
        (0, 0, 1, 1),
    )
    assert not place.agent_store


def test_a_process_that_no_launcher_started_says_so() -> None:
    with pytest.raises(UsageError, match="start it with torchrun"):
        launcher_environment.resolve({})


def test_loopback_is_reached_through_lo() -> None:
    assert launcher_environment.interface_towards("127.0.0.1") == "lo"
