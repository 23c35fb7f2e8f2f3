"""A small command for tests/test_cluster_orphans.py: runs cells in the folder it is given, prints
their ends."""

from __future__ import annotations

import sys
from pathlib import Path

from benchsuite.cluster.local import Cluster
from benchsuite.cluster.signals import sigterm_as_interrupt
from benchsuite.plan.cell import Budget, Cell


def main(folder: Path, entry: str, fault: str, num_cells: int) -> int:
    faults = ({"rank": 1, "phase": "compute", "step": 0, "signal": fault},) if fault else ()
    try:
        with (
            sigterm_as_interrupt(),
            Cluster(entry=entry, modules=(), path=(str(Path(__file__).parent),)) as cluster,
        ):
            for index in range(num_cells):
                cell = Cell(replicas=2, budget=Budget(timeout_s=60), faults=faults, seed=index)
                outcome = cluster.run(cell, folder / str(index))
                print(outcome.status, outcome.reason, flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))
