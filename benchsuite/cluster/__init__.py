"""Clusters: who starts the ranks, where, and who says how they ended. One file per engine.

`local.py` starts the ranks of a cell itself; `torchrun.py` is the user's own torchrun. Whoever
starts a rank waits for it and says how it ended: success means that every rank's file is there and
complete.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from benchsuite.plan.cell import Cell
from benchsuite.results.record import Outcome


class Launcher(Protocol):
    """What the command line asks of a cluster that runs cells by itself."""

    def start(self) -> None:
        """Gets ready; `run` does it where it was not done."""

    def run(self, cell: Cell, run_dir: Path) -> Outcome:
        """Runs a resolved cell; the ranks leave their files in `run_dir`. Never raises for what a
        rank does."""

    def close(self) -> None:
        """Ends everything that was started."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
