"""Made-up run files that follow the contract of `benchsuite/results/record.py`, for the tests of
analysis and report.

The numbers are invented but consistent: bytes follow the formulas of the topologies, samples add
up, the parts of a rank add up to its wall time. `quick_runs()` has every kind of row a page must
show: ok, failed, timeout, unsupported, misses, a diverged run, oversubscribed and contended ones,
asynchronous runs with staleness, derived payload, stragglers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from benchsuite.plan.cell import Budget, Cell
from benchsuite.results.record import Run, Status

SAMPLES = 15_360
BATCH = 64
PARAMETERS = 25_370
VECTOR_BYTES = 4 * PARAMETERS
TARGET = {
    "metric": "test accuracy",
    "easy": 96.0,
    "target": 97.5,
    "hard": 98.0,
    "direction": "max",
    "criterion": "once",
    "evaluate_every": 320,
    "unit": "%",
}
ENVIRONMENT_ID = "e0e0e0e0e0e0"
ENVIRONMENT = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "congestion_control": "bbr",
    "cpu": "Example CPU",
    "cores": 2,
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "gymnasium": None},
}
MACHINE = "example-cpu-2c-1a2b3c"


def quick_cells() -> list[Cell]:
    """The grid of reports/quick.toml, without looking at the plug-ins' files."""
    cells = []
    for replicas in (1, 2, 4):
        for topology in ("parameter_server", "ring", "native"):
            cells.append(_cell("synchronous", topology, replicas))
        cells.append(_cell("asynchronous", "parameter_server", replicas))
        cells.append(_cell("ddp", "native", replicas))
    for sync in ("synchronous", "asynchronous"):
        cells.append(_cell(sync, "parameter_server", 2, straggler={"0": 4.0}))
    return cells


def _cell(
    sync: str, topology: str, replicas: int, straggler: Mapping[str, float] | None = None
) -> Cell:
    options: dict[str, dict[str, Any]] = {"cnn": {"global_batch": BATCH}}
    if sync == "asynchronous":
        options["asynchronous"] = {"lock": "exclusive"}
    return Cell(
        workload="cnn",
        preset="digits",
        sync=sync,
        topology=topology,
        replicas=replicas,
        options=options,
        servers=1 if topology == "parameter_server" else 0,
        straggler=straggler or {},
        budget=Budget(samples=SAMPLES, timeout_s=60),
    )


def quick_runs(seeds: Sequence[int] = (0, 1, 2)) -> list[Run]:
    """One run per cell and seed; then single runs are spoiled so that every status and flag
    occurs."""
    runs = [make_run(cell, seed) for cell in quick_cells() for seed in seeds]
    spoil = {
        ("synchronous", "ring", 4, 2): {
            "status": Status.FAILED,
            "reason": "rank 3 (worker) was killed by signal 9 in step 17",
        },
        ("ddp", "native", 4, 1): {
            "status": Status.TIMEOUT,
            "reason": "rank 1 (worker) gave no sign of life for 60 s, in barrier",
        },
        ("ddp", "native", 1, 0): {"status": Status.UNSUPPORTED, "reason": "no gloo in this torch"},
    }
    done = []
    for run in runs:
        key = (run.cell.sync, run.cell.topology, run.cell.replicas, run.cell.seed)
        change = spoil.get(key) if not run.cell.straggler else None
        if change:
            run = dataclasses.replace(run, result={}, cost={}, raw={}, flags=(), **change)
        elif key == ("synchronous", "native", 2, 1):
            run = dataclasses.replace(run, flags=(*run.flags, "contended"))
        elif key == ("asynchronous", "parameter_server", 4, 2) and not run.cell.straggler:
            run = diverged(run)
        if key != ("synchronous", "native", 4, 1):  # this one was not run
            done.append(run)
    return done


def make_run(cell: Cell, seed: int) -> Run:
    """An ok run. Deterministic in (cell, seed)."""
    draw = random.Random(f"{cell.id}/{seed}")
    asynchronous = cell.sync == "asynchronous"
    workers = cell.replicas
    servers = cell.num_servers
    steps = SAMPLES // BATCH * (workers if asynchronous else 1)
    cores = 2
    flags = ("oversubscribed",) if workers + servers > cores else ()
    ranks = _ranks(cell, draw, steps=steps, cores=cores)
    wall_s = max(rank["wall_s"] for rank in ranks)
    traffic = _traffic(cell, steps)
    curve_seed = random.Random(
        f"{cell.sync if asynchronous else 'synchronous'}/{workers if asynchronous else 0}/{seed}"
    )
    result = _result(cell, curve_seed, steps=steps, traffic=traffic)
    cost = _cost(cell, draw, result=result, ranks=ranks, wall_s=wall_s, cores=cores)
    raw: dict[str, Any] = {"step_s": [[wall_s / steps] * steps for _ in range(workers)]}
    if asynchronous:
        raw["staleness"] = [
            int(k) for k, n in result["staleness"]["histogram"].items() for _ in range(n)
        ]
    identity = hashlib.sha256(f"{cell.id}/{seed}".encode()).hexdigest()[:8]
    return Run(
        cell=cell.with_seed(seed),
        code_id="c0de00000001",
        status=Status.OK,
        flags=flags,
        started_at=f"2026-01-0{seed + 1}T12:00:00Z",
        machine=MACHINE,
        environment_id=ENVIRONMENT_ID,
        result=result,
        cost=cost,
        raw=raw,
        run_id=f"2026010{seed + 1}T120000Z-{identity}",
        cell_id=cell.id,
    )


def diverged(run: Run) -> Run:
    """The same run with a loss that stopped being finite at step 100: ok, a miss, and it says
    so."""
    result = dict(run.result)
    result["loss"] = [*result["loss"][:100], None]
    result["loss_samples"] = result["loss_samples"][:101]
    stop = max(
        1, sum(s <= result["loss_samples"][-1] for s in result["evaluations"]["samples"]) - 1
    )
    result["evaluations"] = {key: values[:stop] for key, values in result["evaluations"].items()}
    result |= {"diverged_step": 100, "final_loss": None, "final_metric": None}
    result["samples_to"] = dict.fromkeys(("easy", "target", "hard"))
    cost = dict(run.cost) | {
        "time_to": dict.fromkeys(("easy", "target", "hard")),
        "bytes_to": dict.fromkeys(("easy", "target", "hard")),
    }
    cost["evaluation_s"], cost["evaluation_bytes"] = (
        cost["evaluation_s"][:stop],
        cost["evaluation_bytes"][:stop],
    )
    return dataclasses.replace(run, result=result, cost=cost, flags=(*run.flags, "diverged"))


def _traffic(cell: Cell, steps: int) -> dict[str, Any]:
    n = cell.replicas
    vector = VECTOR_BYTES
    if cell.topology == "parameter_server":
        pairs = steps if cell.sync == "asynchronous" else steps * n
        payload = 2 * pairs * vector
        messages = 2 * pairs
        port = pairs * vector
    elif n == 1:
        payload = 0
        messages = 0
        port = 0
    else:
        payload = steps * 2 * (n - 1) * vector
        messages = steps * 2 * (n - 1) * n
        port = payload // n
    return {"payload": payload, "messages": messages, "port": port}


def _result(
    cell: Cell, draw: random.Random, *, steps: int, traffic: Mapping[str, int]
) -> dict[str, Any]:
    per_step = SAMPLES / steps
    asynchronous = cell.sync == "asynchronous"
    slow = 1.0 + (0.25 * (cell.replicas - 1) if asynchronous else 0.0)
    loss_samples = [round(per_step * (i + 1)) for i in range(steps)]
    loss = [2.35 * math.exp(-s / (1500 * slow)) + 0.03 + 0.02 * draw.random() for s in loss_samples]
    at = list(range(320, SAMPLES + 1, 320))
    ceiling = 98.4 - (0.9 if asynchronous and cell.replicas == 4 else 0.0)
    metric = [ceiling - 88.0 * math.exp(-s / (1300 * slow)) - 0.5 * draw.random() for s in at]
    reached = {
        name: next((s for s, m in zip(at, metric, strict=True) if m >= TARGET[name]), None)
        for name in ("easy", "target", "hard")
    }
    staleness = None
    if asynchronous:
        histogram = _histogram(cell.replicas, steps)
        total = sum(k * n for k, n in histogram.items())
        staleness = {
            "histogram": {str(k): n for k, n in histogram.items()},
            "mean": total / steps,
            "max": max(histogram),
        }
    return {
        "samples": SAMPLES,
        "steps": steps,
        "updates": steps,
        "num_parameters": PARAMETERS,
        "loss": loss,
        "loss_samples": loss_samples,
        "evaluations": {
            "samples": at,
            "metric": metric,
            "version": [round(s / per_step) for s in at],
        },
        "target": TARGET,
        "samples_to": reached,
        "final_loss": loss[-1],
        "final_metric": metric[-1],
        "diverged_step": None,
        "checksum": hashlib.sha256(str(metric).encode()).hexdigest(),
        "predicted": {},
        "payload": {},
        "payload_source": "derived" if cell.topology == "native" else "counted",
        "predicted_bytes": traffic["payload"],
        "payload_bytes": traffic["payload"],
        "shm_bytes": 0,
        "messages": traffic["messages"],
        "busiest_port_bytes": traffic["port"],
        "events": {},
        "staleness": staleness,
    }


def _histogram(replicas: int, steps: int) -> dict[int, int]:
    if replicas == 1:
        return {0: steps}
    low = steps // 5
    return {replicas - 2: low, replicas - 1: steps - 2 * low, replicas: low}


def _ranks(cell: Cell, draw: random.Random, *, steps: int, cores: int) -> list[dict[str, Any]]:
    workers = cell.replicas
    servers = cell.num_servers
    crowd = max(1.0, (workers + servers) / cores)
    asynchronous = cell.sync == "asynchronous"
    compute_one = (
        1.1 / workers * crowd * (1 + 0.04 * draw.random())
    )  # seconds over the run, this worker's share
    factors = [float(cell.straggler.get(str(w), 1.0)) for w in range(workers)]
    if asynchronous:  # faster workers take more of the batches, nobody waits long
        speed = [1 / f for f in factors]
        total_s = workers * compute_one / sum(speed) * 1.12
        busy = [total_s / 1.12] * workers
    else:
        total_s = compute_one * max(factors) * (1.12 + 0.05 * math.log2(workers + servers))
        busy = [compute_one * f for f in factors]
    rows = []
    for worker in range(workers):
        data_s = 0.02 * total_s
        update_s = 0.03 * total_s if servers == 0 else 0.0
        blocked_s = max(0.0, total_s - busy[worker] - data_s - update_s)
        rows.append(
            _rank(
                worker,
                "worker",
                (data_s, busy[worker], blocked_s, update_s),
                total_s,
                steps,
                factors[worker],
            )
        )
    for server in range(servers):
        update_s = 0.06 * total_s
        rows.append(
            _rank(
                workers + server,
                "server",
                (0.0, 0.0, total_s - update_s, update_s),
                total_s,
                steps,
                1.0,
            )
        )
    return rows


def _rank(
    rank: int, role: str, parts: tuple[float, ...], wall_s: float, steps: int, factor: float
) -> dict[str, Any]:
    data_s, compute_s, blocked_s, update_s = parts
    idle_s = max(0.0, wall_s - sum(parts))
    return {
        "rank": rank,
        "role": role,
        "data_s": data_s,
        "compute_s": compute_s,
        "blocked_s": blocked_s,
        "update_s": update_s,
        "idle_s": idle_s,
        "wall_s": wall_s,
        "cpu_s": compute_s / factor + update_s + data_s + 0.2 * blocked_s,
        "peak_rss_bytes": 300 * 2**20,
        "steps": steps,
        "straggler": {"factor": factor, "how": "sleep"} if factor != 1 else None,
    }


def _cost(
    cell: Cell,
    draw: random.Random,
    *,
    result: Mapping[str, Any],
    ranks: list[dict[str, Any]],
    wall_s: float,
    cores: int,
) -> dict[str, Any]:
    at = result["evaluations"]["samples"]
    seconds = [wall_s * s / SAMPLES for s in at]
    sent = [result["payload_bytes"] * s // SAMPLES for s in at]
    position = {
        name: at.index(s) if s is not None else None for name, s in result["samples_to"].items()
    }
    cpu_s = sum(rank["cpu_s"] for rank in ranks)
    steps = result["steps"]
    private = cell.topology != "native" or cell.replicas != 4
    control = 16 * steps * cell.num_servers
    wire = (
        round((result["payload_bytes"] + control) * (1.05 + 0.01 * draw.random()))
        if private
        else None
    )
    derived = result["payload_source"] == "derived" and cell.sync == "ddp"
    return {
        "provenance": "measured",
        "wall_s": wall_s,
        "samples_per_s": SAMPLES / wall_s,
        "samples_per_s_low": None,
        "samples_per_s_high": None,
        "step_time_s_median": wall_s / steps,
        "compute_s_median": ranks[0]["compute_s"] / steps,
        "blocked_comm_s_median": None if derived else ranks[0]["blocked_s"] / steps,
        "blocked_reason": "backward and communication overlap" if derived else None,
        "update_s_median": 0.0001,
        "data_s_median": 0.0001,
        "idle_share": 0.01,
        "warmup_steps": 12,
        "window": {"start_s": 0.1, "stop_s": wall_s, "samples": SAMPLES - 12 * BATCH},
        "evaluation_s": seconds,
        "evaluation_bytes": sent,
        "time_to": {name: seconds[i] if i is not None else None for name, i in position.items()},
        "bytes_to": {name: sent[i] if i is not None else None for name, i in position.items()},
        "control_bytes": control,
        "wire_bytes": wire,
        "wire_reason": None if private else "no private network namespace here",
        "wire_idle_bytes": 2048,
        "ranks": ranks,
        "cpu_s": cpu_s,
        "cpu_s_per_sample": cpu_s / SAMPLES,
        "peak_memory_bytes": 300 * 2**20 * len(ranks),
        "lock_wait_share": 0.04 if cell.sync == "asynchronous" else None,
        "foreign_cpu_share": 0.01,
        "cores": cores,
        "torn_reads": None,
        "launch_s": 0.3,
    }
