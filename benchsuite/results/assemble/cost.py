"""The `cost` and `raw` sections of a run file.

Times, load, memory, bytes on the wire, and samples in the order measured.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchsuite.measure import window
from benchsuite.measure.window import Window
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell
from benchsuite.results.assemble import lag, parts
from benchsuite.results.assemble.result import Rank, apart, taken

NS = 1e-9
PUSH_LOG = ("worker", "tag", "version_read", "version_before", "version_next")


def measured(
    cell: Cell, ranks: Sequence[Rank], result: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections `cost` and `raw` of a run."""
    ranks = on_one_clock(ranks)
    workers = [rank for rank in ranks if rank["role"] == "worker"]
    server = next((rank["server"] for rank in ranks if rank["role"] == "server"), None)
    one_host = len({rank["host"] for rank in ranks}) == 1
    begin = min(rank["start_ns"] for rank in ranks)
    wall_s = (max(rank["end_ns"] for rank in ranks) - begin) * NS
    inside = _window(ranks, workers, begin)
    splits = [_split(rank, wall_s) for rank in ranks]
    waiting = [(s["blocked_s"] + s["idle_s"]) / wall_s for s in splits if s["role"] == "worker"]
    whole = len(ranks) == cell.world_size  # what a lost rank sent and used is not known
    samples = result["samples"]
    cpu_s = sum(rank["cpu_s"] for rank in ranks) if whole else None
    cost: dict[str, Any] = {
        "wall_s": wall_s,
        "samples_per_s": inside.samples_per_s if inside else None,
        "samples_per_s_low": inside.low if inside else None,
        "samples_per_s_high": inside.high if inside else None,
        "step_time_s_median": float(np.median(inside.step_s))
        if inside and len(inside.step_s)
        else None,
        "warmup_steps": inside.warmup_steps if inside else None,
        "window": inside
        and {"start_s": inside.start_s, "stop_s": inside.stop_s, "samples": inside.samples},
        "idle_share": statistics.fmean(waiting),
        "ranks": splits,
        "control_bytes": sum(count for rank in ranks for _, count in rank["traffic"]["control"])
        if whole
        else None,
        "cpu_s": cpu_s,
        "cpu_s_per_sample": cpu_s / samples if samples and cpu_s is not None else None,
        "peak_memory_bytes": max(rank["peak_rss_bytes"] for rank in ranks),
        "peak_model_bytes": _most(rank.get("peak_model_bytes") for rank in ranks),
        "lock_wait_share": _lock_wait_share(cell, server, len(workers) * wall_s)
        if one_host
        else None,
        "overlapped_replies": server["overlapped_replies"] if server else None,
        "blocked_reason": ranks[0]["blocked_reason"],
    }
    cost |= _medians(workers, inside)
    cost |= parts.times(ranks)
    cost |= _device(ranks, cost["samples_per_s"])
    cost |= _wire(ranks)
    cost |= _curve_costs(ranks, result, begin)
    raw = _raw(workers, ranks)

    if server is not None:
        raw |= _raw_of_server(server)
        if one_host:
            raw |= _raw_of_one_host(ranks, server)

    if "queue_length" in raw:
        cost["queue_length"] = lag.extent(raw["queue_length"])
    return cost, raw


def _raw(workers: Sequence[Rank], ranks: Sequence[Rank]) -> dict[str, Any]:
    """Seconds of every step and gradient, by worker; CPU seconds of every rank's whole life."""
    return {
        "step_s": [
            [(b - a) * NS for a, b in zip(*_edges(worker), strict=True)] for worker in workers
        ],
        "compute_s": [[ns * NS for ns in worker["steps"]["compute_ns"]] for worker in workers],
        "life_cpu_s": [rank["life_cpu_s"] for rank in ranks],
    }


def _raw_of_server(server: Mapping[str, Any]) -> dict[str, Any]:
    """The push log of the first server, and the versions that workers read first and last."""
    return {
        "push_log": {name: server["log"][name] for name in PUSH_LOG},
        "first_read": server["first_read"],
        "last_read": server["last_read"],
    }


def _raw_of_one_host(ranks: Sequence[Rank], server: Mapping[str, Any]) -> dict[str, Any]:
    """What compares a worker's time with the server's: one clock is needed for both."""
    log = server["log"]
    waits = zip(log["apply_ns"], log["sent_ns"], strict=True)
    raw: dict[str, Any] = {"lock_wait_s": [(applied - sent) * NS for applied, sent in waits]}
    if ranks[0].get("queues"):
        raw["queue_length"] = lag.queue(log["sent_ns"], log["apply_ns"])
    return raw


def on_one_clock(ranks: Sequence[Rank]) -> list[Rank]:
    """Ranks with times on one clock.

    Ranks of several hosts have several clocks: each is counted from its own start, right after a
    common barrier. What compares two ranks' clocks finer than a barrier (the lock wait) is not
    claimed then.
    """
    if len({rank["host"] for rank in ranks}) == 1:
        return list(ranks)

    aligned: list[Rank] = []

    for rank in ranks:
        origin = rank["start_ns"]
        steps = dict(rank["steps"])
        for name in ("start_ns", "end_ns"):
            steps[name] = [at - origin for at in steps[name]]
        moved = {**rank, "start_ns": 0, "end_ns": rank["end_ns"] - origin, "steps": steps}
        shots = rank["snapshots"]
        moved["snapshots"] = {**shots, "time_ns": [at - origin for at in shots["time_ns"]]}

        if rank["evaluations"]:
            times = [at - origin for at in rank["evaluations"]["time_ns"]]
            moved["evaluations"] = {**rank["evaluations"], "time_ns": times}

        aligned.append(moved)

    return aligned


def _edges(worker: Rank) -> tuple[list[int], list[int]]:
    """Beginnings and ends of a worker's steps, in ns."""
    return worker["steps"]["start_ns"], worker["steps"]["end_ns"]


def _window(ranks: Sequence[Rank], workers: Sequence[Rank], begin: int) -> Window | None:
    """The window in which throughput is measured; None where a worker made fewer than 2 steps."""
    counts = [taken(worker) for worker in workers]
    if min(counts) < 2:
        return None

    starts = []
    ends = []
    sizes = []

    for worker, taken_steps in zip(workers, counts, strict=True):
        steps = worker["steps"]
        starts.append((np.array(steps["start_ns"][:taken_steps], dtype=np.float64) - begin) * NS)
        ends.append((np.array(steps["end_ns"][:taken_steps], dtype=np.float64) - begin) * NS)
        sizes.append(
            np.array(steps["samples"][:taken_steps], dtype=np.float64) * parts.counts(worker)
        )

    if apart(ranks):
        return window.apart(starts, ends, sizes)

    shortest = min(counts)
    return window.together(
        *(np.stack([row[:shortest] for row in rows]) for rows in (starts, ends, sizes))
    )


def _split(rank: Rank, wall_s: float) -> dict[str, Any]:
    """Where a rank's time went.

    A server's time without a ticket is idle, and so is a worker's after its last step.
    """
    own_s = (rank["end_ns"] - rank["start_ns"]) * NS
    data_s = sum(rank["steps"]["data_ns"]) * NS
    compute_s = rank["compute_ns"] * NS
    blocked_s = rank["blocked_ns"] * NS
    tickets_s = rank["ticket_wait_ns"] * NS

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
        "base_rss_bytes": rank.get("base_rss_bytes"),
        "peak_model_bytes": rank.get("peak_model_bytes"),
        "steps": len(rank["steps"]["loss"]),
        "straggler": rank["straggler"],
    }


def _most(values: Iterable[int | None]) -> int | None:
    """The largest of the values that are known; None where none is."""
    return max((value for value in values if value is not None), default=None)


def _medians(workers: Sequence[Rank], measured: Window | None) -> dict[str, Any]:
    """Medians of data, compute, blocked and update time over the worker steps after the warm-up."""
    dropped = measured.warmup_steps if measured else 0
    columns: dict[str, list[float]] = {"data": [], "compute": [], "blocked": [], "update": []}

    for worker in workers:
        steps = worker["steps"]
        per_worker = dropped if not apart(workers) else dropped // len(workers)

        for at in range(per_worker, taken(worker)):
            parts = [steps[f"{name}_ns"][at] for name in ("data", "compute", "blocked")]
            columns["data"].append(parts[0])
            columns["compute"].append(parts[1])
            columns["blocked"].append(parts[2])
            columns["update"].append(steps["end_ns"][at] - steps["start_ns"][at] - sum(parts))

    names = {
        "data": "data_s",
        "compute": "compute_s",
        "blocked": "blocked_comm_s",
        "update": "update_s",
    }

    return {
        f"{names[part]}_median": statistics.median(values) * NS if values else None
        for part, values in columns.items()
    }


def _device(ranks: Sequence[Rank], samples_per_s: float | None) -> dict[str, Any]:
    """What a run on devices has besides; {} on the CPU.

    mfu: the share of the ceiling of all devices that were used.
    """
    used = [rank["device"] for rank in ranks if rank.get("device")]
    if not used:
        return {}

    num_devices = len(
        {(rank["host"], rank["device"]["index"]) for rank in ranks if rank.get("device")}
    )
    flops = used[0]["flops_per_sample"]
    ceiling = used[0]["matmul_ceiling_flop_per_s"]
    rate = samples_per_s * flops if samples_per_s and flops else None

    return {
        "device_name": used[0]["name"],
        "num_devices": num_devices,
        "peak_device_bytes": _most(device["peak_allocated_bytes"] for device in used),
        "peak_device_reserved_bytes": _most(device["peak_reserved_bytes"] for device in used),
        "flops_per_sample": flops,
        "flop_per_s": rate,
        "matmul_ceiling_flop_per_s": ceiling,
        "mfu": rate / (ceiling * num_devices) if rate and ceiling else None,
    }


def _lock_wait_share(cell: Cell, server: Mapping[str, Any] | None, worker_s: float) -> float | None:
    """The share of the workers' time from a ticket's sending until its apply starts.

    None where the servers do not take turns by one lock.
    """
    if server is None or cell.options.get(plugins.stem(cell.sync), {}).get("lock") != "exclusive":
        return None

    log = server["log"]
    waited_ns = sum(log["apply_ns"]) - sum(log["sent_ns"])
    return float(waited_ns * NS / worker_s)


def _wire(ranks: Sequence[Rank]) -> dict[str, Any]:
    """Bytes on the wire, summed over the hosts; the reason where they were not read."""
    read = [rank["wire"] for rank in ranks if rank["wire"]["bytes"] is not None]

    if not read:
        return {
            "wire_bytes": None,
            "wire_idle_bytes": None,
            "wire_reason": ranks[0]["wire"]["reason"],
        }

    return {
        "wire_bytes": sum(wire["bytes"] for wire in read),
        "wire_idle_bytes": sum(wire["idle_bytes"] for wire in read),
        "wire_packets": sum(wire["packets"] for wire in read),
        "wire_retransmits": sum(wire["retransmits"] for wire in read),
        "wire_reason": None,
    }


def _evaluation_times(ranks: Sequence[Rank], curve: Mapping[str, Any]) -> list[int]:
    """When the evaluated parameters were there, in ns.

    A mean over replicas was there once the last of them was.
    """
    owner = next(rank for rank in ranks if rank["evaluations"])
    times: list[int] = list(curve["time_ns"])
    if owner["snapshot_of"] != "mean":
        return times

    for rank in ranks:
        taken_at = rank["snapshots"]
        for position, samples in enumerate(owner["snapshots"]["samples"][: len(times)]):
            index = bisect.bisect_right(taken_at["samples"], samples) - 1
            if index >= 0:
                times[position] = max(times[position], taken_at["time_ns"][index])

    return times


def _curve_costs(ranks: Sequence[Rank], result: Mapping[str, Any], begin: int) -> dict[str, Any]:
    """Seconds and payload bytes at each evaluation, and at each level of the target.

    Every strategy here sends evenly over its samples.
    """
    curve = next((rank["evaluations"] for rank in ranks if rank["evaluations"]), None)
    seconds = [(at - begin) * NS for at in _evaluation_times(ranks, curve)] if curve else []
    samples = result["evaluations"]["samples"]
    total = result["samples"]
    payload = result["payload_bytes"]
    known = payload is not None and total
    sent = (
        [round(payload * min(count / total, 1.0)) for count in samples]
        if known
        else [None for _ in samples]
    )

    at = {
        level: samples.index(count) if count is not None else None
        for level, count in result["samples_to"].items()
    }
    return {
        "evaluation_s": seconds,
        "evaluation_bytes": sent,
        "time_to": {level: None if i is None else seconds[i] for level, i in at.items()},
        "bytes_to": {level: None if i is None else sent[i] for level, i in at.items()},
    }
