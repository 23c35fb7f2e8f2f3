"""The law between the two worlds: a real run, replayed in virtual time, is the same run.

Real ranks (threads or processes) make the push log of an asynchronous run, and virtual ranks repeat
it. Parameters of every version, who read what, and which batch went into which push must agree.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness.runs import PushLog, relative, run, worst
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.laws.server_log import Read, as_written, has_lock
from benchsuite.plan.cell import Cell
from benchsuite.virtual.gradients import Graphs
from benchsuite.virtual.replay import PushOrder

FLOAT64 = 1e-10
_traced: dict[str, Graphs] = {}  # each gradient is traced once for all cells that share it


def replayed_is_real(make_ranks: MakeRanks, cell: Cell, *, read: Read = as_written) -> Figure:
    """The virtual run has every version of the server and every answer of the real one.

    Bound: 1e-10, the relative error of the parameters plus the number of entries that differ or
    lack. In the twin two pushes change places.
    """
    real = run(make_ranks, cell)
    log = real.logs[0]
    told = read(log)
    virtual = run(
        partial(virtual_ranks, graphs=_traced, order=PushOrder(told.worker, told.tag)), cell
    )
    again = virtual.logs[0]
    different = sum(
        a != b
        for name in ("worker", "tag", "version_read", "version_before", "version_next")
        for a, b in zip(getattr(log, name), getattr(again, name), strict=True)
    )
    value, where = worst(
        [
            (relative(mine - theirs, theirs), f"rank {a.rank}, vector {k}")
            for a, b in zip(virtual.ranks, real.ranks, strict=True)
            for k, (mine, theirs) in enumerate(zip(a.params, b.params, strict=False))
        ]
    )
    counts = [
        (len(a.params), len(b.params)) for a, b in zip(virtual.ranks, real.ranks, strict=True)
    ]
    missing = sum(abs(a - b) for a, b in counts)
    text = (
        f"||difference|| / ||parameters||, {where}; {different} entries of the log and "
        f"{missing} vectors differ"
    )
    stale = sum(log.staleness)
    return Figure(
        value + different + missing, FLOAT64, f"{text}; staleness {stale} in all, {cell.label}"
    )


def swapped(log: PushLog) -> PushLog:
    """The log in which two pushes of different workers, in the middle, have changed places."""
    middle = next(
        row
        for row in range(len(log.worker) // 2, len(log.worker) - 1)
        if log.worker[row] != log.worker[row + 1]
    )
    worker = list(log.worker)
    tag = list(log.tag)
    for column in (worker, tag):
        column[middle], column[middle + 1] = column[middle + 1], column[middle]
    return dataclasses.replace(log, worker=worker, tag=tag)


LAWS = (
    Law(
        "a real run replayed in virtual time is the same run",
        replayed_is_real,
        lambda cell: has_lock(cell) and cell.num_servers == 1 and cell.clock == "wall",
        (
            Control(
                "two pushes change places",
                partial(replayed_is_real, read=swapped),
                {
                    "sync": "asynchronous",
                    "topology": "parameter_server",
                    "servers": 1,
                    "replicas": 3,
                },
            ),
        ),
    ),
)
