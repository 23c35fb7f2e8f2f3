"""Ranks for laws that are real processes: a cell host's ranks are handed a body and write back what it returned.

For strategies that call the library by itself: it has one default group per process.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from benchsuite import cell as cells
from benchsuite.cell import Cell
from benchsuite.comm.rendezvous import connect, open_store
from benchsuite.job import RankJob, write_rank_file
from benchsuite.laws import MakeRanks
from benchsuite.record import Outcome, Status

ENTRY = "benchsuite.laws.process_ranks:call_body"


class Cluster(Protocol):
    """Who starts the processes (`cluster/local.py`)."""

    def run(self, cell: Cell, run_dir: Path, *, entry: str = "") -> Outcome:
        """Runs a cell; its ranks call `entry`."""


def process_ranks(cluster: Cluster, folder: Path) -> MakeRanks:
    """Ranks that are fresh processes of `cluster`, with their files in `folder`.

    The body must be a partial with a `cell`, and pickle.
    """
    runs = itertools.count()

    def make_ranks(size: int, body: Callable[..., Any], *, strict: str = "") -> list[Any]:
        cell = getattr(body, "keywords", {})["cell"]
        assert not strict and cell.world_size == size
        run_dir = folder / str(next(runs))
        run_dir.mkdir()
        (run_dir / "body").write_bytes(pickle.dumps(body))
        outcome = cluster.run(cell, run_dir, entry=ENTRY)
        if outcome.status is not Status.OK:
            raise RuntimeError(outcome.reason)
        return [pickle.loads((run_dir / f"result{rank}").read_bytes()) for rank in range(size)]

    return make_ranks


def call_body(job: RankJob) -> None:
    """What a rank does."""
    import torch

    torch.set_num_threads(1)
    comm = connect(job, cells.from_json(job.cell), open_store(job), None)
    body = pickle.loads(Path(job.run_dir, "body").read_bytes())
    Path(job.run_dir, f"result{job.rank}").write_bytes(pickle.dumps(body(comm)))
    write_rank_file(job.run_dir, job.rank, "{}")
    comm.barrier()
