"""The user's own torchrun on one or many hosts: one supervisor per rank, a fresh process per
cell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from benchsuite.plan.cell import Cell


class Cluster:
    """Starts nothing: says what to start. `collect.collect` reads what comes out."""

    several_hosts = True

    def command(self, cells: Sequence[Cell], path: Path, out: Path, *, num_hosts: int = 1) -> str:
        """The command line for every host (with `i` = 0, 1 ..); `path` is the cells file.

        Static rendezvous on an address: torchrun's own rendezvous stalls where the host name does
        not resolve.
        """
        num_ranks = max((cell.world_size for cell in cells), default=1)
        per_host = -(-num_ranks // num_hosts)
        meeting = "--master-addr 127.0.0.1 --master-port 29500"
        if num_hosts > 1:
            meeting = (
                f"--nnodes {num_hosts} --node-rank i --master-addr ADDRESS_OF_HOST_0 "
                "--master-port 29500"
            )
        worker = (
            f"-m benchsuite.worker --cells {shlex.quote(str(path))} --out {shlex.quote(str(out))}"
        )
        return f"torchrun --nproc-per-node {per_host} {meeting} {worker}"
