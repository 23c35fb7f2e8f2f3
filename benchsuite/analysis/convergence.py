"""Training curves against samples, seconds and bytes, and what it took to arrive at a target.

A target counts from the evaluation that satisfied it, never interpolated back before it was seen. A
run that did not arrive is a miss: infinite, kept in the median. Seconds include the warm-up;
evaluation itself is off the clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from benchsuite.analysis.scaling import per_cell
from benchsuite.results.record import Run

CURVE_COLUMNS = (
    "cell_id",
    "run_id",
    "seed",
    "point",
    "samples",
    "seconds",
    "bytes",
    "metric",
    "loss",
)
# `export csv` columns in which an empty field of an ok run means a miss.
TO_TARGET = (
    "samples_to_target",
    "bytes_to_target",
    "time_to_easy_s",
    "time_to_target_s",
    "time_to_hard_s",
)
AXES = ("samples", "seconds", "bytes")


def curves(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per evaluation of each run, columns `CURVE_COLUMNS`.

    `loss` is the mean training loss over the steps since the evaluation before (NaN where it was
    not finite), so that loss and metric share their samples, seconds (of this run's clock) and
    payload bytes (over all ranks).
    """
    rows = []

    for run in runs:
        evaluations = run.result["evaluations"]
        at = evaluations["samples"]
        losses = _means(run.result["loss"], run.result["loss_samples"], at)
        series = (
            at,
            run.cost["evaluation_s"],
            run.cost["evaluation_bytes"],
            evaluations["metric"],
            losses,
        )

        for point, (samples, seconds, num_bytes, metric, loss) in enumerate(
            zip(*series, strict=True)
        ):
            value = math.nan if metric is None else float(metric)
            rows.append(
                (
                    run.cell_id,
                    run.run_id,
                    run.cell.seed,
                    point,
                    samples,
                    seconds,
                    num_bytes,
                    value,
                    loss,
                )
            )

    return pd.DataFrame(rows, columns=list(CURVE_COLUMNS))


def _means(losses: Sequence[float | None], at: Sequence[int], stops: Sequence[int]) -> list[float]:
    """The mean of the losses with `before < samples <= stop`, for each stop.

    NaN where there is none, or where one is not finite.
    """
    means = []
    position = 0

    for stop in stops:
        window: list[float] = []

        while position < len(at) and at[position] <= stop:
            loss = losses[position]
            window.append(math.nan if loss is None else float(loss))
            position += 1

        means.append(sum(window) / len(window) if window else math.nan)

    return means


def band(curve: pd.DataFrame, *, x: str, y: str) -> pd.DataFrame:
    """Median line and range over the runs of one cell, evaluation by evaluation.

    Columns: x (median over runs at this evaluation), center, low, high, n. Against samples all runs
    share x; against seconds and bytes the band joins equal evaluations, not equal seconds.
    """
    finite = curve.dropna(subset=[y])
    grouped = finite.groupby("point", sort=True)
    return pd.DataFrame(
        {
            "x": grouped[x].median(),
            "center": grouped[y].median(),
            "low": grouped[y].min(),
            "high": grouped[y].max(),
            "n": grouped[y].size(),
        }
    ).reset_index(drop=True)


def to_target(frame: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """One row per cell with a `Summary` per column of `TO_TARGET`; misses are infinite.

    `frame`: ok runs only. Cells whose workload states no target get n = 0.
    """
    table = frame.copy()
    has_target = table["target_metric"].notna()

    for column in TO_TARGET:
        numbers = pd.to_numeric(table[column]).astype(float)
        table[column] = numbers.mask(numbers.isna() & has_target, math.inf)

    finals = [column for column in ("final_metric", "final_loss") if column in table]
    return cells.merge(per_cell(table, (*TO_TARGET, *finals)), on="cell_id")


def largest_gap(curve: pd.DataFrame, cell_ids: Sequence[str], *, y: str = "loss") -> float:
    """The largest difference of `y` between these cells at equal seed and samples.

    NaN where no two of them share a point.
    """
    rows = curve[curve["cell_id"].isin(list(cell_ids))]
    spread = rows.groupby(["seed", "samples"])[y].agg(["min", "max", "count"])
    shared = spread[spread["count"] > 1]
    return float((shared["max"] - shared["min"]).max()) if len(shared) else math.nan
