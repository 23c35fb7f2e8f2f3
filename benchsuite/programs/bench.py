"""Launches small measurements as cells: fresh processes in a private network, with their own entry.

What the ranks are to do beyond their cell stands in `order.json` of the run directory, and each
rank leaves one record. This module imports no torch.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchsuite.cluster.local import Cluster
from benchsuite.cluster.rank_imports import RANK_ENTRY, preloaded_modules
from benchsuite.plan.cell import Cell
from benchsuite.results.record import Status
from benchsuite.worker.job import rank_file

ORDER_FILE = "order.json"


class Bench:
    """A cluster whose cells may have entries of their own.

    Its fork server imports `modules` besides what a rank needs, so that a launch does not wait for
    them.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self.cluster = Cluster(modules=[*preloaded_modules(), *modules])
        self._folder = tempfile.TemporaryDirectory(prefix="benchsuite-")
        self._launches = 0

    def __enter__(self) -> Bench:
        begin = time.perf_counter()
        self.cluster.start()
        self.start_s = time.perf_counter() - begin
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.close()
        self._folder.cleanup()

    def launch(
        self, cell: Cell, entry: str = RANK_ENTRY, order: Mapping[Any, Any] | None = None
    ) -> Launch:
        """Runs one fresh launch, whose ranks read `order` as JSON.

        RuntimeError where it does not end well.
        """
        run_dir = Path(self._folder.name) / str(self._launches)
        self._launches += 1
        run_dir.mkdir(mode=0o700)
        if order is not None:
            (run_dir / ORDER_FILE).write_text(json.dumps(order), encoding="utf-8")
        begin = time.perf_counter_ns()
        outcome = self.cluster.run(cell, run_dir, entry=entry)
        end = time.perf_counter_ns()
        if outcome.status != Status.OK:
            raise RuntimeError(f"{entry} ended as {outcome.status}: {outcome.reason}")
        files = [run_dir / rank_file(rank) for rank in range(cell.world_size)]
        return Launch([json.loads(path.read_text(encoding="utf-8")) for path in files], begin, end)


@dataclass(frozen=True)
class Launch:
    """The ranks' records, and when the cell was ordered and when its end was reported.

    Both times are in ns of the clock that the ranks read.
    """

    ranks: Sequence[Mapping[str, Any]]
    begin_ns: int
    end_ns: int


def read_order(run_dir: str) -> dict[str, Any]:
    """Reads, on a rank, what it was told to do."""
    order: dict[str, Any] = json.loads((Path(run_dir) / ORDER_FILE).read_text(encoding="utf-8"))
    return order
