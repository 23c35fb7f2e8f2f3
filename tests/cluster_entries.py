"""What the ranks of tests/test_cluster_*.py do: no training, only what can go wrong."""

from __future__ import annotations

import json
import time
from datetime import timedelta

from benchsuite.job import RankJob, write_rank_file
from benchsuite.measure.beat import Phase
from benchsuite.measure.faults import open_beat


def trivial(job: RankJob) -> None:
    """Writes its record."""
    open_beat(job.beat_path, rank=job.rank, faults=job.cell["faults"]).enter(Phase.WRITE, 0)
    write_rank_file(job.run_dir, job.rank, json.dumps({"rank": job.rank, "private": job.private_network}))
