"""Divided replicas beside undivided ones on equally many ranks: what is kept, what is sent.

Ranks are those that compute gradients, replicas x parts; a server is one more and is said, never
counted among them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import pandas as pd

from benchsuite.analysis.scaling import per_cell
from benchsuite.analysis.statistics import Summary, summarize
from benchsuite.plan import declared, plugins
from benchsuite.plan.cell import Cell
from benchsuite.results.record import Run

QUANTITIES = (
    "num_parameters",
    "held_parameters",
    "peak_model_bytes",
    "payload_bytes_per_step",
    "inside_bytes_per_step",
    "between_bytes_per_step",
    "messages_per_step",
    "bubble_predicted",
    "bubble_slots",
    "balance",
    "samples_per_s",
    "cpu_s_per_sample",
)
GROUP = ("workload", "ranks")  # what may be compared: equal work on equally many ranks
# Code that is touched for the first time is in a rank's memory too (measure/memory.py): some MB,
# and not the same code for every library class. Differences below this say nothing about what a
# form of parallelism keeps.
CODE_BYTES = 4 * 2**20
_NONE = summarize([])


def is_divided(cell: Cell) -> bool:
    """Whether several ranks hold a replica."""
    return cell.model_parallel > 1


def forms(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row per cell: cell_id, form, parts, ranks, every_step.

    The form of undivided replicas is `data`. every_step: replicas agree in every step, so that one
    process would do the same.
    """
    rows = [
        {
            "cell_id": cell.id,
            "form": plugins.stem(cell.parallel),
            "parts": cell.model_parallel,
            "ranks": cell.num_workers,
            "every_step": _agrees_in_every_step(cell),
        }
        for cell in cells
    ]
    return pd.DataFrame(
        rows, columns=["cell_id", "form", "parts", "ranks", "every_step"]
    ).drop_duplicates("cell_id")


def _agrees_in_every_step(cell: Cell) -> bool:
    says = declared.where_known("sync", cell.sync)
    return isinstance(says, declared.Strategy) and says.every_step


def parallel(frame: pd.DataFrame, cells: pd.DataFrame, of: Sequence[Cell]) -> pd.DataFrame:
    """`per_cell` of `QUANTITIES`, also for cells without a run, with the cells' names and `forms`.

    `frame`: the ok runs, columns of `export csv`. `cells`: `cells.describe` of the cells `of`. All
    that an undivided replica sends goes between replicas.
    """
    table = frame.copy()
    whole = table["model_parallel"] == 1
    table["inside_bytes_per_step"] = table["inside_bytes_per_step"].mask(
        whole, table["payload_bytes_per_step"] * 0
    )
    table["between_bytes_per_step"] = table["between_bytes_per_step"].mask(
        whole, table["payload_bytes_per_step"]
    )
    for column in ("bubble_slots", "bubble_predicted"):  # shares of whole slots: 1 - 4/5 is 0.2
        table[column] = table[column].round(9)
    merged = cells.merge(forms(of), on="cell_id").merge(
        per_cell(table, QUANTITIES), on="cell_id", how="left"
    )

    for column in QUANTITIES:
        merged[column] = merged[column].map(
            lambda each: each if isinstance(each, Summary) else _NONE
        )

    for column in ("oversubscribed", "contended"):
        merged[column] = merged[column].eq(True)  # no run: no flag
    for column in ("n", "num_contended"):
        merged[column] = merged[column].fillna(0).astype(int)
    return merged


def apart(first: Summary, second: Summary, *, margin: float = 0.0) -> bool:
    """Whether all that was seen of one is smaller than all of the other by more than `margin`."""
    return second.low - first.high > margin or first.low - second.high > margin


def loss_gaps(runs: Sequence[Run]) -> tuple[float, float]:
    """The largest difference of two runs' losses at equal seed: in the first step, and in any.

    NaN where they share no seed. In single precision the first step tells whether two forms do the
    same: later sums in another order may switch a ReLU or a maximum, and the difference jumps.
    """
    by_step: dict[tuple[int, int], list[float]] = defaultdict(list)

    for run in runs:
        for step, loss in enumerate(run.result["loss"]):
            by_step[run.cell.seed, step].append(math.nan if loss is None else float(loss))

    gaps = {key: max(losses) - min(losses) for key, losses in by_step.items() if len(losses) > 1}
    first = [gap for (_, step), gap in gaps.items() if step == 0]
    return max(first, default=math.nan), max(gaps.values(), default=math.nan)
