"""Runs the rank of another entry on a slow link.

The loopback is shaped before anybody connects, and set free afterwards. Two busy cores cannot show
overlap: on the plain loopback, sending is work for the same cores. On a shaped link sending is
waiting, and a core that waits can compute.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

from benchsuite.programs.bench import read_order
from benchsuite.programs.shaped_link import NotShaped, ShapedLoopback
from benchsuite.worker.job import RankJob, write_rank_file

READY_FILE = "shaped"
WAIT_S = 20.0


def around(job: RankJob) -> None:
    """Runs the order's `entry` at its rate `mbit`; rank 0 shapes the link for all ranks.

    RuntimeError where it does not.
    """
    order = read_order(job.run_dir)
    module, _, name = str(order["entry"]).partition(":")
    entry = getattr(importlib.import_module(module), name)
    ready = Path(job.run_dir) / READY_FILE

    if job.rank:
        deadline = time.monotonic() + WAIT_S

        while not ready.exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank 0 shaped no link within {WAIT_S:g} s")
            time.sleep(0.002)

        entry(job)
        return

    with _loopback(job) as link:
        link.set_rate(float(order["mbit"]))
        ready.touch()
        entry(job)


def probe(job: RankJob) -> None:
    """Leaves the reason why links cannot be shaped here as its record; "" where they can."""
    reason = ""

    try:
        with _loopback(job):
            pass
    except NotShaped as error:
        reason = str(error)

    write_rank_file(job.run_dir, job.rank, json.dumps({"reason": reason}))


def _loopback(job: RankJob) -> ShapedLoopback:
    return ShapedLoopback(private_network=job.private_network, network_reason=job.network_reason)
