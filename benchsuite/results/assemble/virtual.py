"""The records of a simulated cell become `result`, `cost` and `raw`, in virtual seconds.

The quantities are those of a real run. What a simulation cannot say (wall time, CPU time and memory
of a strategy, bytes on a wire) is null with its reason; what the simulation itself took stands in
`cost.simulation`.

Virtual results repeat, and a thousand workers write much: long logs are left out of `raw`, the
split of many ranks out of `cost`, and more than a thousand losses are means of groups. Whoever
needs them whole runs the cell again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchsuite.plan.cell import Cell
from benchsuite.results.assemble import cost as costs
from benchsuite.results.assemble import result as results
from benchsuite.results.assemble.cost import NS
from benchsuite.results.assemble.result import Rank

LONGEST_LOG = 2000  # numbers of a raw series that is kept
MOST_LOSSES = 1000  # on the curve; else means of groups of equal size
MOST_RANKS = 64  # whose times are kept apart
# What a simulation cannot say of a strategy.
NOT_SIMULATED = ("cpu_s", "cpu_s_per_sample", "peak_memory_bytes", "peak_model_bytes")


def sections(
    cell: Cell, ranks: Sequence[Rank], facts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The sections `result`, `cost` and `raw`. facts: what the simulation cost.

    AssertionError where a server's versions do not add up (`tiling_residual`).
    """
    for rank in ranks:
        if rank["server"] is not None:
            residual = tiling_residual(rank["server"])
            assert residual == 0, (
                f"tiling identity of server {rank['rank']}: left minus right = {residual}, not 0"
            )

    result = results.deterministic(cell, ranks)
    cost, raw = costs.measured(cell, ranks, result)

    if cell.gradients == "none":
        result |= {
            "loss": [],
            "loss_samples": [],
            "final_loss": None,
            "final_metric": None,
            "checksum": None,
        }
        result["samples_to"] = dict.fromkeys(result["samples_to"])
        result["target"] = None

    result |= thinned(result["loss"], result["loss_samples"])

    if cost["window"] is not None:
        busy = busy_share(ranks, cost["window"]["start_s"], cost["window"]["stop_s"])
        cost["idle_share"] = max(0.0, 1 - busy)

    cost["virtual_s"] = cost.pop("wall_s")
    cost["ranks_left_out"] = max(0, len(ranks) - MOST_RANKS)
    cost["ranks"] = cost["ranks"][:MOST_RANKS] if not cost["ranks_left_out"] else []

    for split in cost["ranks"]:
        split["virtual_s"] = split.pop("wall_s")
        split |= dict.fromkeys(("cpu_s", "peak_rss_bytes", "base_rss_bytes", "peak_model_bytes"))

    cost |= dict.fromkeys(NOT_SIMULATED)
    cost |= {
        "provenance": "virtual",
        "wire_reason": "virtual clock: nothing was on a wire",
        "simulation": dict(facts),
    }
    raw.pop("life_cpu_s")
    left_out = sorted(name for name, series in raw.items() if _length(series) > LONGEST_LOG)
    for name in left_out:
        del raw[name]
    raw["left_out"] = left_out
    return result, cost, raw


def busy_share(ranks: Sequence[Rank], start_s: float, stop_s: float) -> float:
    """The share of the workers' time inside the window in which they compute.

    Neither the start nor the end of a budget is in the window.
    """
    begin = min(rank["start_ns"] for rank in ranks)
    low = begin + start_s / NS
    high = begin + stop_s / NS
    workers = [rank["steps"] for rank in ranks if rank["role"] == "worker"]
    computed = 0.0

    for steps in workers:
        # A gradient is the first thing of a step: virtual data take no time to fetch.
        starts = np.array(steps["start_ns"], dtype=np.float64)
        ends = starts + np.array(steps["compute_ns"], dtype=np.float64)
        inside = np.minimum(ends, high) - np.maximum(starts, low)  # (steps,) below 0: outside
        computed += float(np.clip(inside, 0.0, None).sum())

    return float(computed / (len(workers) * (high - low)))


def thinned(losses: Sequence[float | None], samples: Sequence[int]) -> dict[str, list[Any]]:
    """`loss` and `loss_samples` as they are, or in at most `MOST_LOSSES` groups.

    A group has the mean of its losses and its last number of samples. One with a loss that is not
    finite has None.
    """
    size = -(-len(losses) // MOST_LOSSES)
    if size <= 1:
        return {"loss": list(losses), "loss_samples": list(samples)}

    means: list[float | None] = []

    for begin in range(0, len(losses), size):
        group = losses[begin : begin + size]
        finite = [loss for loss in group if loss is not None]
        if len(finite) == len(group):
            means.append(math.fsum(finite) / len(finite))
        else:
            means.append(None)

    last = len(samples)
    ends = [samples[min(begin + size, last) - 1] for begin in range(0, last, size)]
    return {"loss": means, "loss_samples": ends}


def tiling_residual(server: Mapping[str, Any]) -> int:
    """Left minus right side of the tiling identity, in integers: 0 for any policy and timing.

    Each worker's reads cut the versions into pieces. Those pieces, of all workers, cover every
    version once per worker: what was read before the first version and after the last one is told
    apart.
    """
    log = server["log"]
    versions = server["versions"]
    tiles = 0

    for read, following in zip(log["version_read"], log["version_next"], strict=True):
        if following >= 0:
            tiles += following - read  # staleness, and from just before the apply to the next read

    ahead = sum(versions - last for last in server["last_read"])
    right = len(server["last_read"]) * versions - sum(server["first_read"])
    return int(tiles + server["abandoned_versions"] + ahead - right)


def _length(series: Any) -> int:
    """How many numbers a nested series holds."""
    if isinstance(series, Mapping):
        return sum(_length(each) for each in series.values())
    if isinstance(series, list):
        return sum(_length(each) if isinstance(each, list) else 1 for each in series)

    return 1
