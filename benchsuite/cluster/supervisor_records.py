"""From what the supervisors of a job wrote to one outcome per cell; the input is files alone.

The folders of several hosts may have been copied together. A cell is `ok` only if every rank's
record is there and complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchsuite.cluster import Collected
from benchsuite.cluster.cell_outcome import RankEnd, classify
from benchsuite.errors import UsageError
from benchsuite.measure.beat import Pulse
from benchsuite.plan import declared
from benchsuite.plan.cell import Cell, from_json
from benchsuite.results.record import Outcome, Status
from benchsuite.worker.job import rank_complete


def collect(run_dir: Path) -> Collected:
    """The cells of a job in their order, each with its folder and how it ended.

    run_dir: the `--out` of the job, or copies of it from several hosts laid over each other. Raises
    UsageError where it holds no cells, or one that cannot be read.
    """
    found = []  # (position in the job, folder)

    for path in run_dir.glob("*-*-s*/cell.json"):
        # By number and not by name: as text, cell 10 would come before cell 2.
        index = path.parent.name.partition("-")[0]
        if index.isdigit():
            found.append((int(index), path.parent))

    if not found:
        raise UsageError(f"{run_dir} holds no cells: give the --out folder of a job that has run")

    # A cell is read from its own file: the cells.json of the job need not be here.
    results = []

    for _, folder in sorted(found):
        try:
            cell = from_json(json.loads((folder / "cell.json").read_text()))
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder / 'cell.json'} cannot be read: {error}") from error

        results.append((cell, folder, _outcome(cell, folder)))

    return results


def _outcome(cell: Cell, folder: Path) -> Outcome:
    """How a cell ended, from the records of its ranks and of their supervisors."""
    records = _records(folder)

    # A supervisor that refuses a cell says so, and no rank of it has started.
    for record in records.values():
        if "unsupported" in record:
            return Outcome(Status.UNSUPPORTED, record["unsupported"])

    # Who ended first is told by the clocks of the hosts, which differ by some milliseconds where
    # they are synchronised: it only breaks ties, as `classify` uses it.
    ordered = sorted(records.values(), key=lambda record: record["ended_at_s"])
    order = {record["rank"]: position + 1 for position, record in enumerate(ordered)}

    # A rank without a supervisor's record gets one as well, or a lost host would look like a cell
    # with fewer ranks.
    ends = [
        _end(cell, folder, rank, records.get(rank), order.get(rank, 0))
        for rank in range(cell.world_size)
    ]

    outcome = classify(
        ends,
        timeout_s=cell.budget.timeout_s,
        at_deadline=any(record["at_deadline"] for record in records.values()),
        survives=declared.strategy(cell.sync).survives == "worker",
    )
    # A rank whose supervisor's record is missing is no culprit: its host's folder was not copied.
    unseen = [end.rank for end in ends if not end.complete and end.rank not in records]

    if unseen and (outcome.culprit is None or outcome.culprit["rank"] in unseen):
        ranks = ", ".join(str(rank) for rank in unseen)
        reason = (
            f"nothing was recorded of rank {ranks}: copy the folders of all hosts together, "
            "or run the cell again"
        )
        outcome = Outcome(Status.FAILED, reason)

    # The cell began with the first rank and ended with the last one.
    return Outcome(
        outcome.status,
        outcome.reason,
        outcome.culprit,
        outcome.flags,
        started_at=min((record["started_at"] for record in records.values()), default=""),
        seconds=max((record["seconds"] for record in records.values()), default=0.0),
    )


def _records(folder: Path) -> dict[int, dict[str, Any]]:
    """Rank -> what its supervisor wrote. A truncated file counts as none."""
    records = {}

    for path in folder.glob("supervisor*.json"):
        try:
            record = json.loads(path.read_text())
            records[int(record["rank"])] = record
        except (OSError, ValueError, KeyError, TypeError):
            # Its rank then counts as one of which nothing is known, which costs this cell and not
            # the collection of all others.
            continue

    return records


def _end(cell: Cell, folder: Path, rank: int, record: dict[str, Any] | None, order: int) -> RankEnd:
    """What was seen of one rank.

    record: of its supervisor, None = there is none. order: its place among the ends, 0 = unknown.
    """
    role = "worker" if rank < cell.num_workers else "server"

    complete = rank_complete(folder, rank)
    if record is None:
        return RankEnd(rank=rank, role=role, exit_code=None, complete=complete)
    return RankEnd(
        rank=rank,
        role=role,
        exit_code=record["exit_code"],
        state=record["state"],
        pulse=Pulse(**record["pulse"]),
        complete=complete,
        order=order if record["exit_code"] is not None else 0,
        error=record["error"],
    )
