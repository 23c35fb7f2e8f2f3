"""Rank files and the host's outcome become one `Run`. Imports numpy, no torch.

Deterministic quantities go into `result`, times and load into `cost`, samples in the order measured into `raw`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchsuite.cell import Cell
from benchsuite.comm.traffic import Traffic
from benchsuite.job import rank_complete, rank_file
from benchsuite.measure import load, window
from benchsuite.measure.window import Window
from benchsuite.record import CONTENDED, DIVERGED, OVERSUBSCRIBED, Outcome, Run, Status
from benchsuite.target import Target, first_reached

Rank = Mapping[str, Any]
LEVELS = ("easy", "target", "hard")
NS = 1e-9


def assemble(
    cell: Cell,
    run_dir: Path,
    outcome: Outcome,
    *,
    code_id: str,
    machine: str,
    environment_id: str,
    cores: int,
    foreign_cpu_share: float | None,
) -> Run:
    """The run of one cell. Where the outcome is not ok it carries the reason and the culprit, and no numbers."""
    flags = set(outcome.flags)
    if load.oversubscribed(cell, cores):
        flags.add(OVERSUBSCRIBED)
    if foreign_cpu_share is not None and foreign_cpu_share > load.CONTENDED_ABOVE:
        flags.add(CONTENDED)
    result: dict[str, Any] = {}
    cost: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    if outcome.status == Status.OK:
        ranks = read_ranks(cell, run_dir)
        result = _result(cell, ranks)
        cost, raw = _cost(cell, ranks, result)
        cost |= {"cores": cores, "foreign_cpu_share": foreign_cpu_share, "launch_s": outcome.seconds - cost["wall_s"]}
        cost["provenance"] = "counted" if OVERSUBSCRIBED in flags else "measured"
        if result["diverged_step"] is not None:
            flags.add(DIVERGED)
    return Run(
        cell=cell,
        code_id=code_id,
        status=outcome.status,
        reason=outcome.reason,
        culprit=outcome.culprit,
        flags=tuple(sorted(flags)),
        started_at=outcome.started_at,
        machine=machine,
        environment_id=environment_id,
        result=result,
        cost=cost,
        raw=raw,
    )


def read_ranks(cell: Cell, run_dir: Path) -> list[Rank]:
    """The rank files that are there, by rank (a lost worker has none)."""
    complete = [rank for rank in range(cell.world_size) if rank_complete(run_dir, rank)]
    return [json.loads((run_dir / rank_file(rank)).read_text(encoding="utf-8")) for rank in complete]


# -- result -------------------------------------------------------------------------------------------------------


def _result(cell: Cell, ranks: Sequence[Rank]) -> dict[str, Any]:
    workers = [rank for rank in ranks if rank["role"] == "worker"]
    server = next((rank["server"] for rank in ranks if rank["role"] == "server"), None)
    apart = _apart(ranks)
    losses, consumed = _losses_apart(workers, server) if apart else _losses_together(workers)
    diverged = next((step for step, loss in enumerate(losses) if loss is None), None)
    evaluations = next((rank["evaluations"] for rank in ranks if rank["evaluations"]), None) or {}
    metric = evaluations.get("metric", [])
    first = ranks[0]
    target = Target(**first["target"])
    reached = {level: first_reached(target, getattr(target, level), metric) for level in LEVELS}
    steps = server["versions"] if apart and server else max(_taken(worker) for worker in workers)
    result: dict[str, Any] = {
        "samples": sum(sum(worker["steps"]["samples"]) for worker in workers),
        "steps": steps,
        "updates": steps,
        "num_parameters": first["num_parameters"],
        "loss": losses,
        "loss_samples": consumed,
        "evaluations": {name: evaluations.get(name, []) for name in ("samples", "metric", "version")},
        "target": first["target"],
        "samples_to": {
            level: None if at is None else evaluations["samples"][at] for level, at in reached.items()
        },
        "final_loss": next((loss for loss in reversed(losses)), None),
        "final_metric": metric[-1] if metric else None,
        "diverged_step": diverged,
        "checksum": evaluations.get("checksum"),
        "events": _events(cell, ranks),
        "staleness": _staleness(server) if apart else None,
    }
    return result | _traffic(ranks, steps)


def _apart(ranks: Sequence[Rank]) -> bool:
    """Workers that do not step together: the servers' parameters count."""
    return bool(ranks[0]["snapshot_of"] == "servers")


def _taken(worker: Rank) -> int:
    """Steps that consumed samples (a diverged step did not)."""
    return sum(1 for samples in worker["steps"]["samples"] if samples)


def _losses_together(workers: Sequence[Rank]) -> tuple[list[float | None], list[int]]:
    """Per step the mean over workers; None from the first step on where one of them is not finite."""
    losses: list[float | None] = []
    consumed, total = [], 0
    for step in range(min(len(worker["steps"]["loss"]) for worker in workers)):
        values = [worker["steps"]["loss"][step] for worker in workers]
        finite = [value for value in values if value is not None]
        losses.append(sum(finite) / len(finite) if len(finite) == len(values) else None)
        total += sum(worker["steps"]["samples"][step] for worker in workers)
        consumed.append(total)
    return losses, consumed


def _losses_apart(
    workers: Sequence[Rank], server: Mapping[str, Any] | None
) -> tuple[list[float | None], list[int]]:
    """Per push in the order the first server took them; a batch's loss is found by its number."""
    assert server is not None
    loss_of = {
        index: (loss, samples)
        for worker in workers
        for index, loss, samples in zip(
            worker["steps"]["index"], worker["steps"]["loss"], worker["steps"]["samples"], strict=True
        )
    }
    losses: list[float | None] = []
    consumed, total = [], 0
    for tag in server["log"]["tag"]:
        loss, samples = loss_of.get(tag, (None, 0))
        losses.append(loss)
        total += samples
        consumed.append(total)
    return losses, consumed


def _events(cell: Cell, ranks: Sequence[Rank]) -> dict[str, list[int]]:
    names = sorted({name for rank in ranks for name in rank["events"]})
    by_rank = {rank["rank"]: rank["events"] for rank in ranks}
    return {name: [by_rank.get(rank, {}).get(name, 0) for rank in range(cell.world_size)] for name in names}


def _staleness(server: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if server is None or not server["log"]["worker"]:
        return None
    values = [b - r for b, r in zip(server["log"]["version_before"], server["log"]["version_read"], strict=True)]
    histogram: dict[str, int] = {}
    for value in sorted(values):
        histogram[str(value)] = histogram.get(str(value), 0) + 1
    return {"histogram": histogram, "mean": statistics.fmean(values), "max": max(values)}


def _traffic(ranks: Sequence[Rank], steps: int) -> dict[str, Any]:
    counted = sum((Traffic.from_json(rank["traffic"]) for rank in ranks), Traffic())
    source = ranks[0]["payload_source"]
    payload: Traffic | None = counted
    if source == "derived":
        one = next((rank["derived"] for rank in ranks if rank["derived"]), None)
        alone = sum(rank["role"] == "worker" for rank in ranks) == 1
        payload = Traffic.from_json(one).times(steps) if one else (Traffic() if alone else None)
    predicted = next((rank["predicted"] for rank in ranks if rank["predicted"]), None)
    expected = Traffic.from_json(predicted) if predicted else None
    return {
        "predicted": predicted,
        "predicted_bytes": expected.payload_bytes if expected is not None else None,
        "payload": payload.to_json() if payload is not None else None,
        "payload_source": source,
        "payload_bytes": payload.payload_bytes if payload is not None else None,
        "shm_bytes": counted.shm_bytes,
        "messages": payload.num_messages if payload is not None else None,
        "busiest_port_bytes": payload.busiest_port_bytes if payload is not None else None,
    }


# -- cost ---------------------------------------------------------------------------------------------------------


def _cost(cell: Cell, ranks: Sequence[Rank], result: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    workers = [rank for rank in ranks if rank["role"] == "worker"]
    server = next((rank["server"] for rank in ranks if rank["role"] == "server"), None)
    begin = min(rank["start_ns"] for rank in ranks)
    wall_s = (max(rank["end_ns"] for rank in ranks) - begin) * NS
    measured = _window(ranks, workers, begin)
    splits = [_split(rank, wall_s) for rank in ranks]
    waiting = [(s["blocked_s"] + s["idle_s"]) / wall_s for s in splits if s["role"] == "worker"]
    samples, cpu_s = result["samples"], sum(rank["cpu_s"] for rank in ranks)
    cost: dict[str, Any] = {
        "wall_s": wall_s,
        "samples_per_s": measured.samples_per_s if measured else None,
        "samples_per_s_low": measured.low if measured else None,
        "samples_per_s_high": measured.high if measured else None,
        "step_time_s_median": float(np.median(measured.step_s)) if measured and len(measured.step_s) else None,
        "warmup_steps": measured.warmup_steps if measured else None,
        "window": measured and {"start_s": measured.start_s, "stop_s": measured.stop_s, "samples": measured.samples},
        "idle_share": statistics.fmean(waiting),
        "ranks": splits,
        "control_bytes": sum(count for rank in ranks for _, count in rank["traffic"]["control"]),
        "cpu_s": cpu_s,
        "cpu_s_per_sample": cpu_s / samples if samples else None,
        "peak_memory_bytes": max(rank["peak_rss_bytes"] for rank in ranks),
        "lock_wait_share": _lock_wait_share(cell, server, len(workers) * wall_s),
        "overlapped_replies": server["overlapped_replies"] if server else None,
        "blocked_reason": ranks[0]["blocked_reason"],
    }
    cost |= _medians(workers, measured)
    cost |= _wire(ranks)
    cost |= _curve_costs(ranks, result, begin)
    raw: dict[str, Any] = {
        "step_s": [[(b - a) * NS for a, b in zip(*_edges(worker), strict=True)] for worker in workers],
        "ready_s": [rank["ready_s"] for rank in ranks],
    }
    if server is not None:
        raw["push_log"] = {name: server["log"][name] for name in ("worker", "tag", "version_read", "version_before", "version_next")}
        raw["first_read"], raw["last_read"] = server["first_read"], server["last_read"]
        raw["lock_wait_s"] = [(a - s) * NS for a, s in zip(server["log"]["apply_ns"], server["log"]["sent_ns"], strict=True)]
    return cost, raw


def _edges(worker: Rank) -> tuple[list[int], list[int]]:
    return worker["steps"]["start_ns"], worker["steps"]["end_ns"]


def _window(ranks: Sequence[Rank], workers: Sequence[Rank], begin: int) -> Window | None:
    counts = [_taken(worker) for worker in workers]
    if min(counts) < 2:
        return None
    seconds = lambda worker, name, n: (np.array(worker["steps"][name][:n], dtype=np.float64) - begin) * NS  # noqa: E731
    sizes = [np.array(worker["steps"]["samples"][:n], dtype=np.float64) for worker, n in zip(workers, counts, strict=True)]
    starts = [seconds(worker, "start_ns", n) for worker, n in zip(workers, counts, strict=True)]
    ends = [seconds(worker, "end_ns", n) for worker, n in zip(workers, counts, strict=True)]
    if _apart(ranks):
        return window.apart(starts, ends, sizes)
    shortest = min(counts)
    cut = lambda rows: np.stack([row[:shortest] for row in rows])  # noqa: E731
    return window.together(cut(starts), cut(ends), cut(sizes))


def _split(rank: Rank, wall_s: float) -> dict[str, Any]:
    """Where a rank's time went. A server's time without a ticket is idle, so is a worker's after its last step."""
    own_s = (rank["end_ns"] - rank["start_ns"]) * NS
    data_s, compute_s = sum(rank["steps"]["data_ns"]) * NS, rank["compute_ns"] * NS
    blocked_s, tickets_s = rank["blocked_ns"] * NS, rank["ticket_wait_ns"] * NS
    return {
        "rank": rank["rank"],
        "role": rank["role"],
        "wall_s": own_s,
        "data_s": data_s,
        "compute_s": compute_s,
        "blocked_s": blocked_s,
        "update_s": max(0.0, own_s - data_s - compute_s - blocked_s - tickets_s),
        "idle_s": max(0.0, wall_s - own_s) + tickets_s,
        "cpu_s": rank["cpu_s"],
        "peak_rss_bytes": rank["peak_rss_bytes"],
        "steps": len(rank["steps"]["loss"]),
        "straggler": rank["straggler"],
    }


def _medians(workers: Sequence[Rank], measured: Window | None) -> dict[str, Any]:
    """Medians over the worker steps after the warm-up."""
    dropped = measured.warmup_steps if measured else 0
    columns: dict[str, list[float]] = {"data": [], "compute": [], "blocked": [], "update": []}
    for worker in workers:
        steps = worker["steps"]
        per_worker = dropped if worker["snapshot_of"] != "servers" else dropped // len(workers)
        for at in range(per_worker, _taken(worker)):
            parts = [steps[f"{name}_ns"][at] for name in ("data", "compute", "blocked")]
            columns["data"].append(parts[0])
            columns["compute"].append(parts[1])
            columns["blocked"].append(parts[2])
            columns["update"].append(steps["end_ns"][at] - steps["start_ns"][at] - sum(parts))
    median = lambda name: statistics.median(columns[name]) * NS if columns[name] else None  # noqa: E731
    return {
        "data_s_median": median("data"),
        "compute_s_median": median("compute"),
        "blocked_comm_s_median": median("blocked"),
        "update_s_median": median("update"),
    }


def _lock_wait_share(cell: Cell, server: Mapping[str, Any] | None, worker_s: float) -> float | None:
    """Share of the workers' time from a ticket's sending until its apply starts (asynchronous, one lock)."""
    if server is None or cell.options.get("asynchronous", {}).get("lock") != "exclusive":
        return None
    log = server["log"]
    return sum(a - s for a, s in zip(log["apply_ns"], log["sent_ns"], strict=True)) * NS / worker_s


def _wire(ranks: Sequence[Rank]) -> dict[str, Any]:
    read = [rank["wire"] for rank in ranks if rank["wire"]["bytes"] is not None]
    if not read:
        return {"wire_bytes": None, "wire_idle_bytes": None, "wire_reason": ranks[0]["wire"]["reason"]}
    return {
        "wire_bytes": sum(wire["bytes"] for wire in read),
        "wire_idle_bytes": sum(wire["idle_bytes"] for wire in read),
        "wire_packets": sum(wire["packets"] for wire in read),
        "wire_retransmits": sum(wire["retransmits"] for wire in read),
        "wire_reason": None,
    }


def _curve_costs(ranks: Sequence[Rank], result: Mapping[str, Any], begin: int) -> dict[str, Any]:
    """Seconds and payload bytes at each evaluation. Every strategy here sends evenly over its samples."""
    curve = next((rank["evaluations"] for rank in ranks if rank["evaluations"]), None)
    seconds = [(at - begin) * NS for at in curve["time_ns"]] if curve else []
    samples = result["evaluations"]["samples"]
    total, payload = result["samples"], result["payload_bytes"]
    known = payload is not None and total
    sent = [round(payload * min(count / total, 1.0)) for count in samples] if known else [None for _ in samples]
    at = {level: samples.index(count) if count is not None else None for level, count in result["samples_to"].items()}
    return {
        "evaluation_s": seconds,
        "evaluation_bytes": sent,
        "time_to": {level: None if i is None else seconds[i] for level, i in at.items()},
        "bytes_to": {level: None if i is None else sent[i] for level, i in at.items()},
    }
