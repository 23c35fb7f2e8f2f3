"""Real processes for laws: `process_ranks` hands a body to a cell host's ranks, which write back what it returned."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchsuite import cell as cells
from benchsuite.cluster.local import Cluster
from benchsuite.comm.rendezvous import connect, open_store
from benchsuite.job import RankJob, write_rank_file
from benchsuite.record import Status
from benchsuite.training import Training

ROOT = str(Path(__file__).parent.parent)
ENTRY = "tests.law_entries:call_body"


def process_ranks(cluster: Cluster, folder: Path) -> Callable[..., list[Any]]:
    """Ranks that are fresh processes of `cluster`. The body must be a partial with a `cell`, and pickle."""
    runs = itertools.count()

    def make_ranks(size: int, body: Any, *, strict: str = "") -> list[Any]:
        assert not strict and body.keywords["cell"].world_size == size
        run_dir = folder / str(next(runs))
        run_dir.mkdir()
        (run_dir / "body").write_bytes(pickle.dumps(body))
        outcome = cluster.run(body.keywords["cell"], run_dir)
        assert outcome.status is Status.OK, outcome.reason
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


class _Unwrapped:
    """A part that takes no wrapper."""

    def __init__(self, part: Any) -> None:
        part.wrap(lambda module: module)
        self._part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def wrap(self, wrapper: object) -> None:
        """Stays as it is."""


def without_wrapper(training: Training) -> Training:
    """A replica whose module DistributedDataParallel never sees: nothing is synchronised."""
    from benchsuite.laws.runs import rebuilt

    return rebuilt(training, part=_Unwrapped(training.part))
