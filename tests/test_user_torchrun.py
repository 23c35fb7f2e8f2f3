"""A user's own torchrun, from the plan to the rows: plan --write, torchrun -m benchsuite.worker,
collect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchsuite.cli import main
from benchsuite.cluster.supervisor_records import collect
from benchsuite.results.record import LOST_WORKER, Status
from benchsuite.results.store import Store
from tests.bench import ROOT, TINY, behind, cell, fault
from tests.test_cluster_torchrun import environment, free_port, write_cells

PLAN = f"""
seeds = [0]
[cells]
workload = ["{TINY}"]
sync = ["synchronous"]
topology = ["ring", "parameter_server"]
replicas = [2]
[[cells.also]]
sync = ["asynchronous"]
topology = ["parameter_server"]
replicas = [1]
[budget]
timeout_s = 30
"""


@pytest.mark.procs
@pytest.mark.timeout(120)
def test_a_torchrun_of_ones_own_becomes_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    cells = tmp_path / "cells.json"
    out = tmp_path / "run"
    results = tmp_path / "results"
    assert main.main(["plan", str(tmp_path / "plan.toml"), "--write", str(cells)]) == 0
    assert "3 runs, 2 ranks for 2 of them, 3 ranks for 1 of them" in capsys.readouterr().err
    job = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
        "-m",
        "benchsuite.worker",
        "--cells",
        str(cells),
        "--out",
        str(out),
    ]
    done = subprocess.run(
        job,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr

    assert main.main(["collect", str(out), "--results", str(results), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"ok": 2, "unsupported": 1}
    runs = {run.cell.label: run for run in Store(results).runs()}
    ring = runs["tiny/default synchronous ring N=2"]
    alone = runs["tiny/default asynchronous parameter_server N=1"]
    refused = runs["tiny/default synchronous parameter_server N=2"]
    for run in (ring, alone):
        assert run.status is Status.OK
        assert run.result["predicted_bytes"] == run.result["payload_bytes"] == 46800
        assert run.cost["wire_bytes"] is None
        assert run.cost["wire_reason"] == "started by torchrun in the machine's own network"
    assert ring.cell.cluster == "torchrun" and ring.result["samples"] == 240
    assert refused.status is Status.UNSUPPORTED
    assert refused.reason == (
        "replicas(2) x model_parallel(1) + servers(1) = 3 ranks, but 2 were started: lower replicas or start 3"
    )

    assert main.main(["collect", str(out), "--results", str(results)]) == 0
    assert "nothing new; 3 taken before" in capsys.readouterr().out


@pytest.mark.procs
@pytest.mark.timeout(60)
def test_the_others_go_on_without_a_killed_asynchronous_worker(tmp_path: Path) -> None:
    lossy = cell(
        sync="asynchronous",
        topology="parameter_server",
        replicas=2,
        servers=1,
        cluster="torchrun",
        faults=fault(1, "compute", "SIGKILL"),
        straggler=behind(1, 2),
        timeout_s=20.0,
    )
    job = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "3",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
        "-m",
        "benchsuite.worker",
        "--cells",
        str(write_cells(tmp_path / "cells.json", [lossy])),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        job, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    ((_, _, outcome),) = collect(tmp_path / "run")
    assert (outcome.status, outcome.flags) == (Status.OK, (LOST_WORKER,)), outcome
