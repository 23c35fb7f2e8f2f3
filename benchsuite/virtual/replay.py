"""The bridge between the worlds: a real asynchronous run happens again in virtual time.

Its push log says who pushed which batch in which order. In virtual time each gradient is made to
end in its turn, and the counter hands out the batches that it had handed out. Then every worker
reads the version that it had read, and the parameters are the same, up to the rounding of gradients
that are computed together.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan import declared, plugins
from benchsuite.plan.cell import Cell
from benchsuite.plan.hashing import finite
from benchsuite.results.assemble.virtual import sections
from benchsuite.results.record import Run, Status
from benchsuite.results.tuned import trained
from benchsuite.rules.view import names_of, one_of
from benchsuite.virtual.world import Simulated, simulate

# Relative. Gradients that are computed together round in another order.
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-3, "bf16": 1e-2}


class PushOrder:
    """Compute times and counter answers that bring pushes about in a recorded order.

    workers, tags: of each push, in the order in which the one server took them.
    """

    def __init__(self, workers: Sequence[int], tags: Sequence[int]) -> None:
        self._rows: dict[int, list[int]] = {}  # worker -> positions of its pushes in the log
        self._tags: dict[int, list[int]] = {}  # worker -> the batches that it pushed
        for row, (worker, tag) in enumerate(zip(workers, tags, strict=True)):
            self._rows.setdefault(worker, []).append(row)
            self._tags.setdefault(worker, []).append(tag)

        self._num_pushes = len(workers)
        self._given: dict[int, int] = {}  # worker -> how many batches it was handed

    def ns(self, worker: int, step: int) -> int:
        """The duration of a worker's step-th gradient.

        It ends at the moment that bears its row's number in the log, in ns.
        """
        rows = self._rows[worker]
        before = rows[step - 1] if step else -1

        return rows[step] - before

    def counter(self, name: str, worker: int) -> int:
        """The worker's next batch; after its last one a number beyond the budget."""
        given = self._given.get(worker, 0)
        self._given[worker] = given + 1
        tags = self._tags.get(worker, [])

        return tags[given] if given < len(tags) else self._num_pushes


def in_virtual_time(cell: Cell) -> Cell:
    """The cell of a real run under the virtual clock.

    UsageError where its push log does not tell all that decided the run.
    """
    # Each line: what stands in the way of a replay, in whose words, and what would do.
    answering = names_of("sync", answers_at_once=True)
    reasons = (
        (cell.clock != "wall", f"clock = {cell.clock}", "a run of the wall clock"),
        (
            not declared.strategy(cell.sync).answers_at_once,
            f"sync = {cell.sync}",
            f"sync = {one_of(answering)}: others answer by a policy's rule",
        ),
        (
            cell.options.get(plugins.stem(cell.sync), {}).get("lock") == "none",
            "lock = none",
            "lock = exclusive: torn reads",
        ),
        (
            cell.num_servers != 1,
            f"servers = {cell.num_servers}",
            "servers = 1: each server has an order of its own",
        ),
    )

    for holds, what, needed in reasons:
        if holds:
            raise UsageError(
                f"{cell.label}: {what}, and a replay needs {needed}; give the file of such a run"
            )

    return dataclasses.replace(cell, clock="virtual", straggler={})


def replay(run: Run, run_dir: str | Path = "unused") -> Simulated:
    """Runs a stored asynchronous run again. UsageError where it cannot be replayed."""
    if run.status is not Status.OK:
        raise UsageError(
            f"run {run.run_id} ended as {run.status}: only a run that is ok can be replayed"
        )

    cell = in_virtual_time(trained(run))
    log = run.raw.get("push_log")
    if not log:
        raise UsageError(f"run {run.run_id} has no push log (raw.push_log): it cannot be replayed")

    order = PushOrder(log["worker"], log["tag"])
    return simulate(cell, run_dir, times=order, counter_answers=order.counter)


def gaps(run: Run, result: Mapping[str, Any]) -> dict[str, float]:
    """Largest differences between a run and its replay.

    `loss` and `metric`: relative. `staleness`: in updates that stand elsewhere in the histogram.
    """
    found = {}

    for name, mine, theirs in (
        ("loss", run.result["loss"], result["loss"]),
        ("metric", run.result["evaluations"]["metric"], result["evaluations"]["metric"]),
    ):
        if len(mine) != len(theirs):
            raise UsageError(
                f"{len(mine)} values of {name} in the run, {len(theirs)} in its replay"
            )

        found[name] = max((_gap(a, b) for a, b in zip(mine, theirs, strict=True)), default=0.0)

    histograms = [side["staleness"]["histogram"] for side in (run.result, result)]
    values = histograms[0].keys() | histograms[1].keys()
    moved = 0
    for value in values:
        moved += abs(histograms[0].get(value, 0) - histograms[1].get(value, 0))
    found["staleness"] = float(moved)
    return found


def _gap(a: float | None, b: float | None) -> float:
    """The difference of two values, relative to the run's.

    A value that only one of them has (None: not finite) is infinitely far.
    """
    if a is None or b is None:
        return 0.0 if a is b else math.inf

    if a == b:
        return 0.0

    return abs(a - b) / max(abs(a), 1e-30)


def load(path: str | Path) -> Run:
    """The run in a file of a results folder. UsageError where the file holds none."""
    try:
        return Run.parse(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{path}: {said}; give a run file, <results>/<machine>/<cell id>/<run id>.json"
        ) from error


def compared(run: Run) -> dict[str, Any]:
    """A run beside its replay, by what a run file holds (the parameters are not in it).

    `pushes`: how many there were. `gaps`: as `gaps` gives them, None = finite in one of them only.
    `tolerance`: relative. `same`: whether they are the same run.
    """
    # The replay's records become sections as those of any virtual run do.
    again = replay(run)
    result, _, _ = sections(in_virtual_time(trained(run)), again.records, again.facts)

    found = gaps(run, result)
    tolerance = TOLERANCE[run.cell.precision]
    same = found["staleness"] == 0 and max(found["loss"], found["metric"]) <= tolerance

    return {
        "run_id": run.run_id,
        "cell": run.cell.label,
        "pushes": len(run.raw["push_log"]["worker"]),
        "gaps": {name: finite(gap) for name, gap in found.items()},
        "tolerance": tolerance,
        "same": same,
    }


def table(document: Mapping[str, Any]) -> str:
    """What `compared` found, for a terminal."""
    found = document["gaps"]
    lines = [
        f"{document['run_id']}: {document['pushes']} pushes of {document['cell']}, again in "
        "virtual time",
        f"  staleness  {found['staleness']:.0f} updates differ (0 allowed)",
    ]

    for name in ("loss", "metric"):
        gap = "finite in one of them only"
        if found[name] is not None:
            gap = f"{found[name]:.2g} apart at most"
        lines.append(f"  {name:<9}  {gap} (relative; {document['tolerance']:g} allowed)")

    return "\n".join([*lines, "  the same run" if document["same"] else "  another run"])
