"""Made-up runs of any cell: nothing is trained, and numbers follow from the id and the seed.

Small runs of `tests/synthetic_runs.py` get the cell that was asked for, times and bytes that tell
cells apart, and what that cell's kind of run carries: staleness, policy lag, parts of a replica,
tuning, virtual seconds. Some miss their target, some diverge, some failed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from random import Random
from typing import Any

from tests import synthetic_runs as made

BY_ARRIVAL = (
    "asynchronous",
    "stale_synchronous",
    "k_sync",
    "hogwild",
    "elastic_averaging",
    "actor_learner",
)
LARGEST = 4  # workers whose curves are made up one by one
TARGETS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {"metric": "held-out loss", "unit": "", "direction": "min"},
    "rl_agent": {"metric": "greedy return", "unit": "", "direction": "max"},
    "mlp": {"metric": "excess loss", "unit": "", "direction": "min"},
}
TIMES = ("wall_s", "step_time_s_median", "compute_s_median", "blocked_comm_s_median")
BYTES = ("payload_bytes", "predicted_bytes", "busiest_port_bytes", "messages")


def made_run(cell: Any, seed: int) -> Any:
    """A run of a resolved cell: ok, or failed for one in 23."""
    draw = Random(f"frozen {cell.id} {seed}")
    run = made.make_run(_small(cell), seed)
    identity = f"2026010{seed % 9 + 1}T120000Z-{Random(f'{cell.id}{seed}').getrandbits(32):08x}"
    run = dataclasses.replace(run, cell=cell.with_seed(seed), cell_id=cell.id, run_id=identity)
    if draw.randrange(23) == 0:
        status, reason = (
            run.status.__class__("failed"),
            "rank 1 (worker) was killed by signal 9 in step 17",
        )
        return dataclasses.replace(
            run, status=status, reason=reason, result={}, cost={}, raw={}, flags=()
        )
    run = _stretched(run, draw)
    run = _as_its_workload_says(run)
    run = _with_lag(run, draw)
    if cell.model_parallel > 1:
        run = _model_parallel(run, draw)
    if cell.tuning == "per_strategy":
        run = _tuned(run, draw)
    if cell.clock == "virtual":
        run = _virtual(run, draw)
    if draw.randrange(7) == 0 and run.result["target"]:
        run = _missed(run)
    if draw.randrange(41) == 0 and run.result["loss"]:
        run = made.diverged(run)
    return run


def _small(cell: Any) -> Any:
    """The same cell with few workers by the wall clock."""
    replicas = min(cell.replicas, LARGEST)
    slowed = {worker: factor for worker, factor in cell.straggler.items() if int(worker) < replicas}
    return dataclasses.replace(
        cell,
        replicas=replicas,
        servers=min(cell.num_servers, LARGEST),
        clock="wall",
        straggler=slowed,
    )


def _stretched(run: Any, draw: Random) -> Any:
    """Times and bytes of this cell."""
    slower, dearer = 0.5 + draw.random(), 1 + draw.randrange(9)
    cost, result = dict(run.cost), dict(run.result)
    for name in TIMES:
        cost[name] = None if cost[name] is None else cost[name] * slower
    cost["samples_per_s"] = made.SAMPLES / cost["wall_s"]
    cost["evaluation_s"] = [seconds * slower for seconds in cost["evaluation_s"]]
    cost["evaluation_bytes"] = [count * dearer for count in cost["evaluation_bytes"]]
    cost["time_to"] = {
        goal: None if s is None else s * slower for goal, s in cost["time_to"].items()
    }
    cost["bytes_to"] = {
        goal: None if b is None else b * dearer for goal, b in cost["bytes_to"].items()
    }
    cost["peak_model_bytes"] = round((40 + 60 * draw.random()) * 2**20)
    for name in BYTES:
        result[name] = result[name] * dearer
    return dataclasses.replace(run, cost=cost, result=result)


def _as_its_workload_says(run: Any) -> Any:
    """Another metric than accuracy, and one that is to be small."""
    told = TARGETS.get(run.cell.workload)
    if told is None:
        return run
    result = dict(run.result)

    def scaled(value: float) -> float:
        return 5 * value if told["direction"] == "max" else (100 - value) / 10

    target = dict(result["target"]) | dict(told)
    for goal in ("easy", "target", "hard"):
        target[goal] = round(scaled(target[goal]), 6)
    evaluations = dict(result["evaluations"])
    evaluations["metric"] = [scaled(value) for value in evaluations["metric"]]
    result |= {
        "target": target,
        "evaluations": evaluations,
        "final_metric": scaled(result["final_metric"]),
    }
    return dataclasses.replace(run, result=result)


def _with_lag(run: Any, draw: Random) -> Any:
    """Staleness where updates come in the order of arrival, and how old an agent's policy is."""
    cell, result = run.cell, dict(run.result)
    if cell.sync in BY_ARRIVAL and cell.replicas > 1:
        steps = result["steps"]
        low, high = draw.randrange(cell.replicas), cell.replicas - 1
        histogram = {low: steps // 3, high: steps - steps // 3} if low != high else {high: steps}
        mean = sum(age * count for age, count in histogram.items()) / steps
        counts = {str(age): count for age, count in sorted(histogram.items())}
        result["staleness"] = {"histogram": counts, "mean": mean, "max": high}
    if cell.workload == "rl_agent":
        result["policy_lag"] = {
            "mean": 0.5 + draw.random(),
            "max": 3,
            "histogram": {"0": 5, "1": 5},
        }
    return dataclasses.replace(run, result=result)


def _model_parallel(run: Any, draw: Random) -> Any:
    """A replica of several parts: what each holds, what goes between them, how long they idle."""
    cell, result, cost = run.cell, dict(run.result), dict(run.cost)
    parts = cell.model_parallel
    held = [made.PARAMETERS // parts + draw.randrange(1000) for _ in range(parts)]
    inside = draw.randrange(1, 100) * 1000 * result["steps"]
    facts: list[dict[str, Any]] = [{} for _ in held]
    if cell.parallel == "pipeline":
        slots = cell.options.get("pipeline", {}).get("num_micro_batches", 4)
        bubble = (parts - 1) / (slots + parts - 1)
        facts = [
            {"balance": 0.9, "bubble_counted": bubble, "bubble_predicted": bubble} for _ in held
        ]
        cost["parts"] = [
            {"busy_s": 1.0, "bubble_measured": bubble * (1 + 0.1 * draw.random())} for _ in held
        ]
    between = result["payload_bytes"]
    result["parallel"] = {
        "held": held,
        "owned": held,
        "facts": facts,
        "inside_bytes": inside,
        "between_bytes": between,
    }
    result["payload_bytes"] = result["predicted_bytes"] = inside + between
    return dataclasses.replace(run, result=result, cost=cost)


def _tuned(run: Any, draw: Random) -> Any:
    factors = (0.25, 0.5, 1.0, 2.0, 4.0)
    trials = [{"lr_factor": factor, "status": "ok"} for factor in factors]
    result = {**run.result, "tuning": {"lr_factor": draw.choice(factors), "trials": trials}}
    return dataclasses.replace(run, result=result)


def _virtual(run: Any, draw: Random) -> Any:
    """Seconds of the virtual clock, and none of what a simulation cannot say."""
    cost, result = dict(run.cost), dict(run.result)
    cost["virtual_s"] = cost.pop("wall_s")
    cost["idle_share"] = draw.random()
    cost |= dict.fromkeys(
        ("cpu_s", "cpu_s_per_sample", "peak_memory_bytes", "peak_model_bytes", "wire_bytes")
    )
    cost |= {"provenance": "virtual", "wire_reason": "virtual clock: nothing was on a wire"}
    cost["simulation"] = {"real_s": 1.5}
    cost["ranks"] = []
    if run.cell.gradients == "none":
        result |= {
            "loss": [],
            "loss_samples": [],
            "final_loss": None,
            "final_metric": None,
            "checksum": None,
        }
        result |= {"target": None, "samples_to": dict.fromkeys(("easy", "target", "hard"))}
        result["evaluations"] = {"samples": [], "metric": [], "version": []}
        cost |= {"evaluation_s": [], "evaluation_bytes": []}
        cost |= {
            name: dict.fromkeys(("easy", "target", "hard")) for name in ("time_to", "bytes_to")
        }
        return dataclasses.replace(run, cost=cost, result=result, flags=("timing_only",))
    return dataclasses.replace(run, cost=cost, result=result, flags=())


def _missed(run: Any) -> Any:
    """Neither the target nor the hard goal was reached."""
    result, cost = dict(run.result), dict(run.cost)
    result["samples_to"] = {**result["samples_to"], "target": None, "hard": None}
    for name in ("time_to", "bytes_to"):
        cost[name] = {**cost[name], "target": None, "hard": None}
    return dataclasses.replace(run, result=result, cost=cost)
