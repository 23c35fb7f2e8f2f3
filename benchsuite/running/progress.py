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
        """Before the first cell.

        The first `trials` of the `total` are trials of tuning; `stored` and `refused` are not among
        the `total`.
        """

    def refuse(self, cell: Cell, reason: str) -> None:
        """A cell is not launched: which rule says so, and the remedy."""

    def begin(self, cell: Cell, position: int, left_s: float | None) -> None:
        """A cell is launched.

        position: from 0. left_s: estimated seconds until the end of the command, None = not known.
        """

    def end(self, cell: Cell, run: Run, position: int, left_s: float | None) -> None:
        """A cell has ended and is stored; the arguments are those of `begin`, and its run."""

    def stop(self) -> None:
        """After the last cell, also when interrupted: whatever was drawn is put away."""


class Lines(Progress):
    """Plain lines; a live line too where the stream is a terminal (rich, which obeys NO_COLOR)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """stream: where the lines go; None = standard error, so that results can be piped."""
        self.stream = stream or sys.stderr
        self.total = 0
        self.trials = 0
        self.live: LiveLine | None = None

    def start(self, *, total: int, stored: int, refused: int, trials: int = 0) -> None:
        """Says how much there is to do, and begins the live line on a terminal."""
        self.total = total
        self.trials = trials
        first = f" (first {trials} trials of tuning)" if trials else ""
        self._line(f"{total} to run{first}, {stored} stored, {refused} refused")
        if total and self.stream.isatty():
            # Imported where it is used: it takes time, and files and pipes need no live line.
            from rich.console import Console

            self.live = Console(file=self.stream).status("starting")
            self.live.start()

    def refuse(self, cell: Cell, reason: str) -> None:
        """A line that stays: the cell, the rule and what to set instead."""
        self._line(f"unsupported: {cell.label}: {reason}")

    def begin(self, cell: Cell, position: int, left_s: float | None) -> None:
        """Only the live line says what runs: in a file it would be a second line for each cell."""
        if self.live:
            self.live.update(f"{self._which(cell, position)}, {text.duration(left_s)} left")

    def end(self, cell: Cell, run: Run, position: int, left_s: float | None) -> None:
        """A line that stays, with the time that is left unless this was the last cell."""
        what = _outcome(run)
        left = f", {text.duration(left_s)} left" if position + 1 < self.total else ""
        self._line(f"{self._which(cell, position)}: {what}{left}")

    def stop(self) -> None:
        """Takes the live line away; it hides the cursor, which the terminal needs back."""
        if self.live:
            self.live.stop()
            self.live = None

    def _which(self, cell: Cell, position: int) -> str:
        """Position, cell and seed, and whether it is a trial."""
        trial = "trial of " if position < self.trials else ""
        return f"[{position + 1}/{self.total}] {trial}{cell.label} seed {cell.seed}"

    def _line(self, line: str) -> None:
        """Prints a line above the live one.

        No markup and no highlighting: rich would take a reason in brackets for a style and swallow
        it.
        """
        if self.live:
            self.live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)


def _outcome(run: Run) -> str:
    """How a run ended, in a few words: its seconds, or the reason why there are none."""
    if run.status != Status.OK:
        return f"{run.status}, {run.reason}"
    flags = f" ({', '.join(run.flags)})" if run.flags else ""
    for name, unit in (("wall_s", "s"), ("virtual_s", "virtual s")):
        # A run has one of the two, by the clock of its cell.
        seconds = run.cost.get(name)
        if seconds is not None:
            return f"ok in {seconds:.1f} {unit}{flags}"
    return f"ok{flags}"
