"""Progress of a command on standard error, a line for each finished cell.

On a terminal a live line below them says what runs now and how much time is left.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from benchsuite.plan.cell import Cell
from benchsuite.report import text
from benchsuite.results.record import Run, Status

if TYPE_CHECKING:
    from rich.status import Status as LiveLine


class Progress:
    """Says nothing: for the Python API and for tests. `Lines` is what the command line uses."""

    def start(self, *, total: int, stored: int, refused: int, trials: int = 0) -> None:
        """Before the first cell. The first `trials` of the `total` are trials of tuning."""

    def refuse(self, cell: Cell, reason: str) -> None:
        """A cell is not launched: which rule says so, and the remedy."""

    def begin(self, cell: Cell, position: int, left_s: float | None) -> None:
        """A cell is launched."""

    def end(self, cell: Cell, run: Run, position: int, left_s: float | None) -> None:
        """A cell has ended and is stored."""

    def stop(self) -> None:
        """After the last cell, also when interrupted."""


class Lines(Progress):
    """Plain lines; a live line too where the stream is a terminal (rich, which obeys NO_COLOR)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total = 0
        self.trials = 0
        self.live: LiveLine | None = None

    def start(self, *, total: int, stored: int, refused: int, trials: int = 0) -> None:
        self.total = total
        self.trials = trials
        first = f" (first {trials} trials of tuning)" if trials else ""
        self._line(f"{total} to run{first}, {stored} stored, {refused} refused")
        if total and self.stream.isatty():
            from rich.console import Console

            self.live = Console(file=self.stream).status("starting")
            self.live.start()

    def refuse(self, cell: Cell, reason: str) -> None:
        self._line(f"unsupported: {cell.label}: {reason}")

    def begin(self, cell: Cell, position: int, left_s: float | None) -> None:
        if self.live:
            self.live.update(f"{self._which(cell, position)}, {text.duration(left_s)} left")

    def end(self, cell: Cell, run: Run, position: int, left_s: float | None) -> None:
        what = _outcome(run)
        left = f", {text.duration(left_s)} left" if position + 1 < self.total else ""
        self._line(f"{self._which(cell, position)}: {what}{left}")

    def stop(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def _which(self, cell: Cell, position: int) -> str:
        trial = "trial of " if position < self.trials else ""
        return f"[{position + 1}/{self.total}] {trial}{cell.label} seed {cell.seed}"

    def _line(self, line: str) -> None:
        if self.live:
            self.live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)


def _outcome(run: Run) -> str:
    if run.status != Status.OK:
        return f"{run.status}, {run.reason}"
    flags = f" ({', '.join(run.flags)})" if run.flags else ""
    for name, unit in (("wall_s", "s"), ("virtual_s", "virtual s")):
        seconds = run.cost.get(name)
        if seconds is not None:
            return f"ok in {seconds:.1f} {unit}{flags}"
    return f"ok{flags}"
