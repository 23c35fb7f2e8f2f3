"""The files of all ranks, and the outcome that their host saw, become one `Run`.

Deterministic quantities go into `result`, times and load into `cost`, samples in the order measured
into `raw`. Imports numpy, no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchsuite.measure import load
from benchsuite.plan.cell import Cell
from benchsuite.results.assemble import cost as costs
from benchsuite.results.assemble import result as results
from benchsuite.results.assemble.result import Rank
from benchsuite.results.record import CONTENDED, DIVERGED, OVERSUBSCRIBED, Outcome, Run, Status
from benchsuite.worker.job import rank_complete, rank_file


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
    """The run of one cell.

    Where the outcome is not ok it carries the reason and the culprit, and no numbers.
    """
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
        result = results.deterministic(cell, ranks)
        cost, raw = costs.measured(cell, ranks, result)
        if cost.get("num_devices", len(ranks)) < len(ranks):
            flags.add(OVERSUBSCRIBED)  # wall time speaks where each rank has a device
        cost |= {
            "cores": cores,
            "foreign_cpu_share": foreign_cpu_share,
            "launch_s": outcome.seconds - cost["wall_s"],
        }
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
    """The rank files that are complete, by rank. A lost worker has left none."""
    complete = [rank for rank in range(cell.world_size) if rank_complete(run_dir, rank)]
    return [
        json.loads((run_dir / rank_file(rank)).read_text(encoding="utf-8")) for rank in complete
    ]
