"""`benchsuite selfcheck`: what the suite itself costs on this machine. Medians of fresh repetitions with their range.

Each check is a function that gives figures; a bound is what the design asks for, and is printed, not enforced: a busy
machine is no defect. No torch in this process.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchsuite.cell import Budget, Cell, resolve
from benchsuite.record import Run, Status, dumps
from benchsuite.store import Store

NUM_RUNS = 10_000  # of the results folder that is loaded


@dataclass(frozen=True)
class Figure:
    """One quantity in seconds: all repetitions are kept."""

    name: str
    seconds: Sequence[float]
    bound_s: float | None = None

    @property
    def median_s(self) -> float:
        """Median over the repetitions."""
        return statistics.median(self.seconds)


def run() -> dict[str, Any]:
    """`{"figures": [{"name", "seconds", "bound_s", "median_s", "within"}]}`; takes about half a minute."""
    figures = [figure for check in (_commands, _cells, _store) for figure in check()]
    return {
        "figures": [
            asdict(f) | {"median_s": f.median_s, "within": None if f.bound_s is None else f.median_s <= f.bound_s}
            for f in figures
        ]
    }


def table(document: Mapping[str, Any]) -> str:
    """Plain text, one line per figure."""
    lines = [f"{'':<44}{'median':>10}{'range':>20}{'bound':>9}   n"]
    for figure in document["figures"]:
        seconds, bound = figure["seconds"], figure["bound_s"]
        spread = f"{min(seconds):.3f} .. {max(seconds):.3f}"
        limit = "" if bound is None else f"{bound:.2f} s" + ("" if figure["within"] else " !")
        lines.append(f"{figure['name']:<44}{figure['median_s']:>8.3f} s{spread:>20}{limit:>9}   {len(seconds)}")
    return "\n".join(lines)


def _commands() -> Iterator[Figure]:
    for verb in ("--help", "list"):
        command = [sys.executable, "-m", "benchsuite.cli", verb]
        start = functools.partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True)
        seconds = [_timed(start) for _ in range(5)]
        yield Figure(f"benchsuite {verb}", seconds, 0.2)


def _cells() -> Iterator[Figure]:
    """A cell of one step: what is left is starting and ending its ranks."""
    from benchsuite.cluster.local import Cluster

    cell = resolve(Cell(preset="smoke", topology="ring", replicas=2, budget=Budget(steps=1)))
    seconds = []
    with tempfile.TemporaryDirectory(prefix="benchsuite-") as folder, Cluster() as cluster:
        for number in range(8):
            begin = time.perf_counter()
            outcome = cluster.run(cell, Path(folder) / str(number))
            seconds.append(time.perf_counter() - begin)
            if outcome.status != Status.OK:
                raise RuntimeError(f"a cell of one step ended as {outcome.status}: {outcome.reason}")
    yield Figure("first cell, 2 workers, 1 step", seconds[:1])
    yield Figure("a later cell, 2 workers, 1 step", seconds[1:], 0.4)


def _store() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="benchsuite-") as folder:
        loss = [1.0 / (step + 1) for step in range(240)]
        for number in range(NUM_RUNS):
            cell = Cell(replicas=1 + number % 40, seed=number // 40)
            result = {"samples": 15360, "steps": 240, "loss": loss, "payload_bytes": 1, "predicted_bytes": 1}
            made = Run(cell=cell, code_id="c", status=Status.OK, machine="m", result=result, raw={"step_s": [loss]})
            path = Path(folder) / "m" / cell.id / f"{made.run_id}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dumps(made.to_json()), encoding="utf-8")
        yield Figure(f"table of {NUM_RUNS} runs, first time", [_timed(Store(folder).frame)], None)
        yield Figure(f"table of {NUM_RUNS} runs, from then on", [_timed(Store(folder).frame) for _ in range(3)], 5.0)


def _timed(what: Callable[[], object]) -> float:
    begin = time.perf_counter()
    what()
    return time.perf_counter() - begin
