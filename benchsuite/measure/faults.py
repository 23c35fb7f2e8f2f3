"""Faults that a cell asks for: a rank strikes itself when its beat enters a phase at a step.

With `faults = [{rank = 1, phase = "send", step = 3, signal = "SIGKILL"}]` tests (and users who
doubt) see which ending a lost rank leads to. The step is a lower bound: a server's steps need not
be the workers' steps.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchsuite.measure.beat import Beat, Phase
from benchsuite.plan.faults import check as check


class InjectedFault(RuntimeError):
    """What a rank raises where its cell asks for `signal = "raise"`."""


def open_beat(path: str, *, rank: int, faults: Sequence[Mapping[str, Any]] = ()) -> Beat:
    """The beat of this rank, with the faults of the cell that are meant for it."""
    # phase -> (step from which on, what to do)
    planned: dict[int, list[tuple[int, str]]] = {}

    for fault in faults:
        if int(fault["rank"]) == rank:
            phase = Phase[str(fault["phase"]).upper()]
            planned.setdefault(phase, []).append((int(fault["step"]), str(fault["signal"])))

    strikers = {phase: _striker(strikes) for phase, strikes in planned.items()}
    return Beat(path, faults=strikers or None)


def _striker(strikes: Sequence[tuple[int, str]]) -> Callable[[int], None]:
    """What a beat calls on entering a phase: it strikes from the given step on."""

    def strike(step: int) -> None:
        for at, how in strikes:
            if step >= at:
                _strike(how)

    return strike


def _strike(how: str) -> None:
    """Ends this process, or lets it hang, in the way that the cell asked for."""
    if how == "exit0":
        os._exit(0)
    if how == "raise":
        raise InjectedFault("the fault that this cell asked for")

    while how == "spin":
        pass
    os.kill(os.getpid(), signal.Signals[how])
