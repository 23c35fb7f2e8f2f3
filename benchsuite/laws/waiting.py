"""The law of waiting under the virtual clock: with more slack workers wait less, down to nothing.

Compute times are exponential, there are no gradients, and links are free. With slack 0 a step takes
as long as the slowest of n, and the efficiency is 1 / H_n (Dutta et al. 2018). The same draws with
more slack never take longer, and without a bound nobody waits for anybody.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.runs import with_options
from benchsuite.laws.virtual_times import harmonic, timed
from benchsuite.plan.cell import Cell, resolve

SLACKS = (0, 1, 3, 8, 32)
UNBOUNDED = -1
GRADIENTS = 6_000
FIRST_TO = 0.02  # the first efficiency's distance from 1 / H_n
LAST_TO = 0.05  # the last one's from 1: fast workers end before the slowest


def efficiency_grows(
    make_ranks: MakeRanks, cell: Cell, *, slacks: Sequence[int] = SLACKS, gradients: int = GRADIENTS
) -> Figure:
    """Efficiency never falls with slack, and goes from 1 / H_n to 1.

    It is the share of the workers' time inside the window that they compute, over slack 0, 1, 3 and
    so on. The value is the largest step back plus what the ends lack. Bound: 0.002. In the twin
    slack shrinks.
    """
    cell = resolve(cell)
    found = [_efficiency(cell, slack, gradients) for slack in (*slacks, UNBOUNDED)]
    back = max(before - after for before, after in itertools.pairwise(found))
    synchronous = 1 / harmonic(cell.num_workers)
    lacks = max(abs(found[0] - synchronous) - FIRST_TO, 1 - LAST_TO - found[-1], 0.0)
    text = ", ".join(
        f"{slack}: {value:.3f}" for slack, value in zip((*slacks, "no bound"), found, strict=True)
    )
    text = f"efficiency by slack {text}; 1 / H_n = {synchronous:.4f}, {cell.label}"
    return Figure(max(back, 0.0) + lacks, 0.002, text)


def _efficiency(cell: Cell, slack: int, gradients: int) -> float:
    """The efficiency with this slack."""
    form = "per_push" if slack == UNBOUNDED else "per_clock"
    _, cost = timed(with_options(cell, "stale_synchronous", slack=slack, apply=form), gradients)
    return 1.0 - float(cost["idle_share"])


_ON: Mapping[str, Any] = {
    "workload": "mlp",
    "preset": "small",
    "sync": "stale_synchronous",
    "topology": "parameter_server",
    "servers": 1,
    "replicas": 8,
    "clock": "virtual",
    "compute_time": {"kind": "exponential", "mean_s": 1.0},
    "batch_mode": "fixed_per_worker",
    "gradients": "none",
    "options": {},
}


def _cells(asked: cases.Asked) -> list[Cell]:
    """One cell of eight exponential workers, whatever numbers are asked for."""
    wanted = asked.includes(
        sync="stale_synchronous", topology="parameter_server", compression="none"
    )
    return [resolve(Cell(**_ON))] if wanted and asked.clock == "virtual" else []


CELLS = cases.Cells(_cells, cases.subject_of)
LAWS = (
    Law(
        "the more slack, the less waiting",
        efficiency_grows,
        lambda cell: cell.sync == "stale_synchronous" and cell.gradients == "none",
        (
            Control(
                "slack shrinks", partial(efficiency_grows, slacks=SLACKS[::-1], gradients=2000), _ON
            ),
        ),
    ),
)
