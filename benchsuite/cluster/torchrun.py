"""The user's own torchrun on one or many hosts: one supervisor per rank, a fresh process per
cell."""

from __future__ import annotations

from pathlib import Path

from benchsuite.cluster import Collected, Engine, supervisor_records


class Cluster(Engine):
    """Starts nothing: torchrun starts `python -m benchsuite.worker`, a supervisor, for each rank.

    A launcher that sets the variables of Slurm, Open MPI or PMI may take torchrun's place
    (`launcher_environment.py`). With torchrun use a static rendezvous (`--master-addr`): its own
    rendezvous stalls where the host's name does not resolve.
    """

    started_by = (
        "benchsuite plan PLAN --write cells.json, torchrun .. -m benchsuite.worker, "
        "benchsuite collect RUNDIR"
    )
    several_hosts = True
    processes = ("benchsuite.worker.__main__",)

    def collect(self, run_dir: Path) -> Collected:
        """The cells of a job and how each ended; `run_dir` is the job's `--out`, of all hosts
        together.
        """
        return supervisor_records.collect(run_dir)
