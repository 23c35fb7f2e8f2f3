"""One row per run: the columns of `benchsuite export csv` and of `Store.frame()`.

Columns are appended, never renamed; units stand in their names; null where a column does not apply.
Times of the wall clock and of the virtual clock never share a column. `commit` and `dirty` come
from the environment that the run names, and are filled in by the store. Imports neither torch nor
pandas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchsuite.plan import compute_time, plugins
from benchsuite.plan.cell import AXES
from benchsuite.plan.hashing import canonical
from benchsuite.results.record import Run

Row = dict[str, Any]

# column -> type. The order is the order of the csv file.
COLUMNS: Mapping[str, str] = {
    name: kind
    for kind, names in (
        ("str", "run_id cell_id code_id started_at machine commit"),
        ("bool", "dirty"),
        ("str", "provenance workload preset parallel sync topology compression options"),
        ("int", "replicas model_parallel servers"),
        ("str", "server_placement"),
        ("int", "world_size threads"),
        ("str", "precision backend device clock cluster"),
        ("int", "hosts"),
        ("float", "link_mbit"),
        ("str", "straggler batch_mode tuning"),
        ("int", "seed"),
        ("str", "status reason flags"),
        ("int", "diverged_step samples updates"),
        (
            "float",
            "wall_s virtual_s samples_per_s samples_per_s_low samples_per_s_high "
            "step_time_s_median",
        ),
        (
            "float",
            "compute_s_median blocked_comm_s_median idle_share predicted_bytes_per_step "
            "payload_bytes_per_step",
        ),
        ("str", "payload_source"),
        (
            "float",
            "payload_bytes_per_sample shm_bytes_per_step control_bytes_per_step "
            "wire_bytes_per_step",
        ),
        ("float", "messages_per_step busiest_port_bytes_per_step staleness_mean"),
        ("int", "staleness_max"),
        ("float", "lock_wait_share policy_lag_mean env_steps_per_s bubble_share"),
        ("int", "peak_memory_bytes"),
        ("float", "cpu_s_per_sample mfu final_loss final_metric target_metric"),
        ("float", "time_to_easy_s time_to_target_s time_to_hard_s"),
        ("int", "samples_to_target bytes_to_target"),
        ("str", "rank_placement"),
        ("float", "link_latency_us"),
        ("str", "compute_time"),
        ("float", "virtual_samples_per_s virtual_step_time_s_median virtual_compute_s_median"),
        ("float", "virtual_blocked_comm_s_median"),
        ("float", "virtual_time_to_easy_s virtual_time_to_target_s virtual_time_to_hard_s"),
        ("int", "predicted_bytes payload_bytes shm_bytes control_bytes wire_bytes"),
        ("str", "gradients receive_cost"),
        ("float", "simulation_s lr_factor tuned_lr_factor"),
        ("int", "peak_model_bytes peak_device_bytes"),
        ("float", "flops_per_sample flop_per_s matmul_ceiling_flop_per_s"),
        ("int", "num_parameters held_parameters inside_bytes between_bytes"),
        (
            "float",
            "inside_bytes_per_step between_bytes_per_step bubble_slots bubble_predicted balance",
        ),
    )
    for name in names.split()
}

_CELL_FIELDS = (
    (
        "preset",
        "model_parallel",
        "replicas",
        "server_placement",
        "rank_placement",
        "threads",
        "precision",
        "backend",
    )
    + (
        "device",
        "clock",
        "cluster",
        "hosts",
        "link_mbit",
        "link_latency_us",
        "batch_mode",
        "tuning",
        "seed",
    )
    + ("gradients", "lr_factor")
)
# Of `cost`, by clock: the same quantity stands in `x` under the wall clock and in `virtual_x` under
# the virtual one.
_TIMES = ("samples_per_s", "step_time_s_median", "compute_s_median", "blocked_comm_s_median")
_COST = (
    ("provenance", "idle_share", "lock_wait_share", "bubble_share", "peak_memory_bytes")
    + (
        "peak_model_bytes",
        "peak_device_bytes",
        "flops_per_sample",
        "flop_per_s",
        "matmul_ceiling_flop_per_s",
    )
    + ("cpu_s_per_sample", "mfu")
)
_RESULT = (
    "diverged_step",
    "samples",
    "updates",
    "payload_source",
    "final_loss",
    "final_metric",
    "num_parameters",
)


def row(run: Run) -> Row:
    """The run as one row with exactly the keys of `COLUMNS`.

    `commit` and `dirty` are None: the store knows them.
    """
    values: Row = dict.fromkeys(COLUMNS)
    values |= {
        "run_id": run.run_id,
        "cell_id": run.cell_id,
        "code_id": run.code_id,
        "started_at": run.started_at,
        "machine": run.machine,
        "status": str(run.status),
        "reason": run.reason,
        "flags": ",".join(sorted(run.flags)),
    }
    values |= _cell_columns(run)
    values |= {name: run.result.get(name) for name in _RESULT}
    values |= {name: run.cost.get(name) for name in _COST}
    values |= _time_columns(run)
    values |= _byte_columns(run)
    values |= _part_columns(run)
    # Sections that do not apply to a run are absent or null.
    staleness = run.result.get("staleness") or {}
    values |= {
        "simulation_s": (run.cost.get("simulation") or {}).get("real_s"),
        "tuned_lr_factor": (run.result.get("tuning") or {}).get("lr_factor"),
        "staleness_mean": staleness.get("mean"),
        "staleness_max": staleness.get("max"),
        "policy_lag_mean": (run.result.get("policy_lag") or {}).get("mean"),
        "target_metric": (run.result.get("target") or {}).get("target"),
        "samples_to_target": (run.result.get("samples_to") or {}).get("target"),
        "bytes_to_target": (run.cost.get("bytes_to") or {}).get("target"),
    }

    return values


def typed(name: str, value: Any) -> Any:
    """The value in its column's type; None stays None.

    A file made by hand may hold 3.0 for 3.
    """
    if value is None:
        return None

    kind = COLUMNS[name]
    if kind == "float":
        return float(value)
    if kind == "int":
        return int(value)

    if kind == "bool":
        return bool(value)
    return str(value)


def _cell_columns(run: Run) -> Row:
    """The columns that say what was asked for."""
    cell = run.cell
    values: Row = {name: getattr(cell, name) for name in _CELL_FIELDS}
    values |= {axis: plugins.stem(getattr(cell, axis)) for axis in AXES}
    values["options"] = canonical(cell.options)
    values["servers"] = cell.num_servers
    values["world_size"] = cell.world_size
    values["straggler"] = canonical(cell.straggler) if cell.straggler else None
    values["compute_time"] = compute_time.shown(cell.compute_time)
    values["receive_cost"] = canonical(cell.receive_cost) if cell.receive_cost else None

    return values


def _time_columns(run: Run) -> Row:
    """Times and rates, in the columns of the clock that the cell runs by."""
    cost = run.cost
    prefix = "virtual_" if run.cell.clock == "virtual" else ""
    values: Row = {f"{prefix}{name}": cost.get(name) for name in _TIMES}
    for goal in ("easy", "target", "hard"):
        values[f"{prefix}time_to_{goal}_s"] = (cost.get("time_to") or {}).get(goal)

    if prefix:
        values["virtual_s"] = cost.get("virtual_s")
    else:
        values |= {
            name: cost.get(name) for name in ("wall_s", "samples_per_s_low", "samples_per_s_high")
        }
        values["env_steps_per_s"] = (
            cost.get("samples_per_s") if "policy_lag" in run.result else None
        )

    return values


def _byte_columns(run: Run) -> Row:
    """Bytes in all, per step and per sample."""
    result = run.result
    cost = run.cost
    parallel = result.get("parallel") or {}
    totals = {
        "predicted_bytes": result.get("predicted_bytes"),
        "payload_bytes": result.get("payload_bytes"),
        "shm_bytes": result.get("shm_bytes"),
        "control_bytes": cost.get("control_bytes"),
        "wire_bytes": cost.get("wire_bytes"),
        "inside_bytes": parallel.get("inside_bytes"),
        "between_bytes": parallel.get("between_bytes"),
    }

    per_step = totals | {
        "messages": result.get("messages"),
        "busiest_port_bytes": result.get("busiest_port_bytes"),
    }
    steps = result.get("steps")  # updates where asynchronous
    values: Row = {f"{name}_per_step": _ratio(total, steps) for name, total in per_step.items()}
    values["payload_bytes_per_sample"] = _ratio(totals["payload_bytes"], result.get("samples"))

    return totals | values


def _part_columns(run: Run) -> Row:
    """Of model-parallel replicas: the fullest part, and what a pipeline's parts say of the whole.

    All replicas are alike, so the first one speaks.
    """
    parallel = run.result.get("parallel")
    if not parallel:
        return {"held_parameters": run.result.get("num_parameters")}

    facts = parallel.get("facts") or [{}]
    times = [part.get("bubble_measured") for part in run.cost.get("parts", ())]
    measured = [share for share in times if share is not None]
    return {
        "held_parameters": max(parallel["held"]),
        "bubble_slots": facts[0].get("bubble_counted"),
        "bubble_predicted": facts[0].get("bubble_predicted"),
        "balance": facts[0].get("balance"),
        "bubble_share": sum(measured) / len(measured) if measured else None,
    }


def _ratio(total: float | None, count: int | None) -> float | None:
    """total / count; None where one of them is not known, or nothing was counted."""
    if total is None or not count:
        return None
    return total / count
