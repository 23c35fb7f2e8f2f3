"""The process that simulates cells of the virtual clock, one after the other.

`python -P -m benchsuite.cluster.simulator_process OUTCOME_FD PARENT_PID` reads one JSON line per
cell from its standard input (`{"cell", "run_dir"}`), leaves `sections.json` in the run directory
and writes one JSON line per outcome to the descriptor. It keeps what it has traced and the
trajectories that can be timed again, so cells of one workload belong to one process. The end of its
input is its end.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from benchsuite.cluster.lifeline import die_with_parent
from benchsuite.cluster.simulator_pool import SECTIONS
from benchsuite.measure.memory import keep_freed_memory
from benchsuite.plan.cell import from_json
from benchsuite.results.assemble.virtual import sections
from benchsuite.results.record import dumps
from benchsuite.virtual.world import Kept, SimulationError, simulate
from benchsuite.worker.job import EXIT_PARENT_GONE, CannotWrite, write_atomic


def main(arguments: list[str]) -> int:
    """Serves until the input ends; returns exit code 0.

    arguments: the descriptor for outcomes, and the id of the process to end with (0 = none).
    """
    outcome_fd = int(arguments[0])
    parent = int(arguments[1])
    if parent:
        die_with_parent(parent, exit_code=EXIT_PARENT_GONE)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command decides what Ctrl-C means
    keep_freed_memory()

    # Here and not at the top: the tie to the parent holds before the seconds that this takes.
    import torch
    import torch._dynamo  # optimisers import it at their first step

    # One simulator per core runs at once; more threads would only take turns.
    torch.set_num_threads(1)
    # What was imported lives to the end: no collection has to look at it again.
    gc.freeze()

    # One for all cells: a trajectory that one cell computed is timed again for the next.
    kept = Kept()
    _say(outcome_fd, {"ready": True})

    # One order, one answer: the pool sends the next order after the answer to this one.
    for line in sys.stdin:
        order = json.loads(line)
        _say(outcome_fd, answer(order["cell"], Path(order["run_dir"]), kept))

    return 0


def answer(document: dict[str, Any], run_dir: Path, kept: Kept) -> dict[str, Any]:
    """Simulates one cell; returns `{"status", "reason", "culprit"}`, and raises nothing.

    document: the cell as JSON. run_dir: where its sections go. kept: what earlier cells left to be
    used again.
    """
    try:
        cell = from_json(document)
        simulated = simulate(cell, run_dir, kept=kept)
        result, cost, raw = sections(cell, simulated.records, simulated.facts)

        # By a file and not through the pipe: curves and raw times can be megabytes.
        write_atomic(
            run_dir / SECTIONS, dumps({"result": result, "cost": cost, "raw": raw}).encode()
        )

    except SimulationError as error:
        return {"status": "failed", "reason": str(error), "culprit": error.culprit}
    except CannotWrite as error:
        return _failed(f"{error.strerror}: {error.filename}")
    # The outermost frame of a cell: what went wrong is recorded, and the next cell is simulated.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
        return _failed(lines[0] if lines else repr(error))

    return {"status": "ok", "reason": None, "culprit": None}


def _failed(reason: str) -> dict[str, Any]:
    """The answer for a cell that failed and whose culprit is not known."""
    return {"status": "failed", "reason": reason, "culprit": None}


def _say(descriptor: int, document: dict[str, Any]) -> None:
    """Writes one JSON line, unbuffered: the pool waits for it."""
    os.write(descriptor, json.dumps(document).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
