"""What becomes of a run when one of its ranks is lost: the real worker, the right culprit, the next
cell runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import benchsuite
from benchsuite.results.record import LOST_WORKER, Run, Status, dumps
from tests.bench import Bench, behind, fault

pytestmark = [pytest.mark.procs, pytest.mark.timeout(60)]
SCHEMA = json.loads(
    (Path(benchsuite.__file__).parent / "results" / "schema" / "run.schema.json").read_text()
)

RING: dict[str, Any] = {"sync": "synchronous", "topology": "ring", "replicas": 2}
NATIVE: dict[str, Any] = {"sync": "synchronous", "topology": "native", "replicas": 2}
DDP: dict[str, Any] = {"sync": "ddp", "topology": "native", "replicas": 2}
SERVER: dict[str, Any] = {"sync": "synchronous", "topology": "parameter_server", "replicas": 2}
ASYNC: dict[str, Any] = {"sync": "asynchronous", "topology": "parameter_server", "replicas": 3}
K_SYNC: dict[str, Any] = {"sync": "k_sync", "topology": "parameter_server", "replicas": 2}


def slow(kind: dict[str, Any], rank: int) -> dict[str, float]:
    """Stragglers that leave `rank` its batches, where they are handed out."""
    return behind(rank, kind["replicas"]) if kind is ASYNC and rank < kind["replicas"] else {}


def culprit(run: Run) -> tuple[int, str, str]:
    assert run.culprit is not None, run
    return run.culprit["rank"], run.culprit["how"], run.culprit["phase"]


@pytest.mark.parametrize(
    ("kind", "rank", "phase"),
    [
        (RING, 1, "compute"),
        (RING, 0, "send"),
        (NATIVE, 1, "barrier"),
        (NATIVE, 0, "evaluate"),
        (DDP, 1, "compute"),
        (SERVER, 1, "send"),
        (SERVER, 2, "serve"),
        (SERVER, 0, "compute"),
        (K_SYNC, 1, "compute"),
        (ASYNC, 3, "serve"),
        (ASYNC, 0, "compute"),
        (ASYNC, 1, "start"),
    ],
)
def test_a_killed_rank_fails_its_cell_within_5_s_and_is_named(
    bench: Bench, kind: dict[str, Any], rank: int, phase: str
) -> None:
    bench.cluster.start()
    begin = time.monotonic()
    step = 0 if phase in ("barrier", "start") else 3
    run = bench.run(**kind, faults=fault(rank, phase, "SIGKILL", step), straggler=slow(kind, rank))
    seconds = time.monotonic() - begin
    assert run.status is Status.FAILED, run.reason
    assert culprit(run) == (rank, "SIGKILL", phase)
    assert not run.result and not run.cost
    assert seconds < 5.0, f"ended after {seconds:.1f} s"
    assert bench.ok(**RING).result["steps"] == 10, "the next cell runs"


@pytest.mark.parametrize(
    ("kind", "rank", "phase"),
    [(RING, 1, "compute"), (NATIVE, 0, "send"), (SERVER, 2, "serve"), (ASYNC, 1, "compute")],
)
def test_a_stopped_rank_is_a_timeout_at_the_deadline(
    bench: Bench, kind: dict[str, Any], rank: int, phase: str
) -> None:
    bench.cluster.start()
    begin = time.monotonic()
    run = bench.run(
        **kind, faults=fault(rank, phase, "SIGSTOP"), straggler=slow(kind, rank), timeout_s=2.0
    )
    seconds = time.monotonic() - begin
    assert run.status is Status.TIMEOUT, run.reason
    assert culprit(run) == (rank, "stopped", phase)
    assert 2.0 <= seconds < 4.0, f"ended after {seconds:.1f} s, deadline 2 s"


@pytest.mark.parametrize(("kind", "rank"), [(RING, 1), (SERVER, 2), (ASYNC, 1)])
def test_a_rank_that_exits_0_early_is_named(bench: Bench, kind: dict[str, Any], rank: int) -> None:
    phase = "serve" if rank == 2 else "compute"
    run = bench.run(**kind, faults=fault(rank, phase, "exit0"), straggler=slow(kind, rank))
    assert run.status is Status.FAILED
    assert culprit(run)[:2] == (rank, "exit 0 without a result")


@pytest.mark.parametrize(("kind", "rank"), [(DDP, 0), (ASYNC, 1)])
def test_a_rank_that_raises_is_named_with_its_error(
    bench: Bench, kind: dict[str, Any], rank: int
) -> None:
    run = bench.run(**kind, faults=fault(rank, "compute", "raise"), straggler=slow(kind, rank))
    assert run.status is Status.FAILED
    assert culprit(run)[0] == rank
    assert run.reason is not None and "the fault that this cell asked for" in run.reason


@pytest.mark.parametrize(
    ("phase", "servers", "lock"),
    [
        ("compute", 1, "exclusive"),
        ("send", 1, "exclusive"),
        ("recv", 2, "exclusive"),
        ("compute", 1, "none"),
        ("evaluate", 1, "exclusive"),
        ("write", 1, "exclusive"),
    ],
)
def test_asynchronous_training_goes_on_without_a_lost_worker(
    bench: Bench, phase: str, servers: int, lock: str
) -> None:
    bench.cluster.start()
    begin = time.monotonic()
    run = bench.run(
        **ASYNC,
        servers=servers,
        options={"asynchronous": {"lock": lock}},
        faults=fault(1, phase, "SIGKILL"),
        straggler=slow(ASYNC, 1),
        tiny={"lr": 0.001},
    )
    seconds = time.monotonic() - begin
    assert run.status is Status.OK, run.reason
    assert culprit(run) == (1, "SIGKILL", phase)
    assert LOST_WORKER in run.flags and "diverged" not in run.flags, run.flags
    assert seconds < 5.0, f"ended after {seconds:.1f} s"
    jsonschema.validate(json.loads(dumps(run.to_json())), SCHEMA)


def test_what_a_lost_worker_had_pushed_counts_and_what_it_sent_is_not_made_up(bench: Bench) -> None:
    strike = fault(1, "compute", "SIGKILL", step=2)
    run = bench.run(**ASYNC, faults=strike, straggler=slow(ASYNC, 1), tiny={"lr": 0.001})
    pushes = run.raw["push_log"]["worker"]
    assert pushes.count(1) == 2, "two pushes before its third gradient"
    assert run.result["steps"] == len(pushes) == 29, "the batch in its hands is lost with it"
    assert run.result["samples"] == 29 * 8
    assert len(run.result["loss"]) == len(run.result["loss_samples"]) == 27, (
        "no point where nobody knows the loss"
    )
    assert None not in run.result["loss"] and run.result["diverged_step"] is None
    unknown = ("payload_bytes", "predicted_bytes", "messages", "busiest_port_bytes")
    assert {name: run.result[name] for name in unknown} == dict.fromkeys(unknown)
    assert run.result["payload_reason"] == "what rank 1 sent is not known: it was lost"
    assert (
        run.cost["control_bytes"] is run.cost["cpu_s_per_sample"] is run.cost["wire_bytes"] is None
    )
    assert run.cost["wire_reason"] == "1 of 4 ranks were lost: no common reading"
