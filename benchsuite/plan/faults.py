"""What a cell that asks for faults may write: which rank strikes itself, in which phase, and how.

`faults = [{rank = 1, phase = "send", step = 3, signal = "SIGKILL"}]`. What strikes is
`benchsuite/measure/faults.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from benchsuite.errors import UsageError

# The ends that a rank can have in practice: killed, stopped, gone without a word, failed with an
# error of its own, and busy without progress.
SIGNALS = ("SIGKILL", "SIGSTOP", "exit0", "raise", "spin")


class Phase(IntEnum):
    """What a rank is doing; the order is that of a step, so a lower value is further behind."""

    START = 0
    DATA = 1
    COMPUTE = 2
    SEND = 3
    RECV = 4
    BARRIER = 5
    UPDATE = 6
    SERVE = 7
    EVALUATE = 8
    WRITE = 9


def check(faults: Sequence[Mapping[str, Any]], world_size: int) -> None:
    """UsageError where a fault names no rank, phase or signal of the cell that asks for it.

    A fault that never strikes would let a test of failures pass without one.
    """
    for fault in faults:
        if set(fault) != {"rank", "phase", "step", "signal"}:
            raise UsageError(
                f"fault {dict(fault)} needs exactly the keys rank, phase, step, signal"
            )

        if fault["phase"] not in {phase.name.lower() for phase in Phase}:
            known = ", ".join(phase.name.lower() for phase in Phase)
            raise UsageError(f"fault phase {fault['phase']!r} is unknown; known: {known}")

        if fault["signal"] not in SIGNALS:
            raise UsageError(
                f"fault signal {fault['signal']!r} is unknown; known: {', '.join(SIGNALS)}"
            )

        if not 0 <= int(fault["rank"]) < world_size:
            raise UsageError(
                f"fault rank {fault['rank']} is not below the cell's {world_size} ranks"
            )
