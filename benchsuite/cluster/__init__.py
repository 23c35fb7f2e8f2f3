"""Cluster engines: who starts the ranks of a cell, and where. One file per engine.

An engine is a file of this folder, or a user's file given by path (`--cluster ./my_engine.py`),
that defines a class `Cluster` derived from `Engine`. `local.py` starts the ranks of a cell itself;
`torchrun.py` is a torchrun that the user starts. The other files of this folder are machinery that
engines share: the processes of ranks, private networks, how an ending is judged.

Whoever starts a rank waits for it and says how it ended: success means that every rank's record is
there and complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from benchsuite.errors import UsageError
from benchsuite.plan.cell import Cell
from benchsuite.results.record import Outcome

Collected = list[tuple[Cell, Path, Outcome]]


class Engine:
    """What an engine declares and does; base class of every `Cluster`.

    Cells come one after the other, in the random order of the command, never two at once: what is
    measured must not be disturbed. `run` returns when a cell has ended, with every rank's record in
    the cell's run directory on this machine. An engine whose ranks the user starts
    (`started_by`) has no `run`; what its ranks left is read by `collect` later.
    """

    # Literals, read without importing the file: `benchsuite.plan.declared.Cluster` explains each.
    started_by: ClassVar[str] = ""
    several_hosts: ClassVar[bool] = False
    shapes_links: ClassVar[bool] = False
    flags: ClassVar[Mapping[str, str]] = {}
    processes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def refusal(cls) -> str:
        """Why this engine cannot start ranks here, with the remedy; "" = it can.

        Asked before the first cell, and not of an engine whose ranks the user starts.
        """
        return ""

    def start(self) -> None:
        """Gets ready to start ranks; called by `run` where nobody called it before."""

    def run(self, cell: Cell, run_dir: Path) -> Outcome:
        """Runs a resolved cell; says how it ended, and never raises for what a rank does.

        run_dir: private to this cell; the ranks leave their records there, as `worker/job.py` says.
        """
        raise NotImplementedError(f"{type(self).__module__} starts no cells")

    def collect(self, run_dir: Path) -> Collected:
        """The cells of a job that the user started, each with its folder and how it ended.

        UsageError where `run_dir` holds none.
        """
        raise UsageError(f"{run_dir}: runs of this cluster are stored as they end: nothing is left")

    def close(self) -> None:
        """Ends everything that was started; also called after an error or Ctrl-C."""

    def __enter__(self) -> Self:
        """The engine itself; it starts with the first cell, or by `start`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the engine and lets the error, if any, pass through."""
        self.close()
