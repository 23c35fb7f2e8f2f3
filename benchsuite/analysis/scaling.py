"""Throughput and CPU seconds per sample against the number of workers, flags respected.

Throughput is total samples over total wall time of a window, summed over workers. An oversubscribed
or contended point keeps its value and its mark, and claims nothing: no efficiency, and no line may
join it to another point.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchsuite.analysis.statistics import Summary, ratio, summarize
from benchsuite.results.record import CONTENDED, OVERSUBSCRIBED

QUANTITIES = ("samples_per_s", "cpu_s_per_sample")


def per_cell(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """One row per cell_id: n, flags, and a `Summary` per column over the runs that have a value.

    `oversubscribed` and `contended` are True where any of the runs carries the flag;
    `num_contended` counts them.
    """
    rows = []

    for cell_id, group in frame.groupby("cell_id", sort=False):
        flags = group["flags"].fillna("").astype(str)
        row: dict[str, object] = {
            "cell_id": cell_id,
            "n": len(group),
            "oversubscribed": bool(flags.str.contains(OVERSUBSCRIBED).any()),
            "contended": bool(flags.str.contains(CONTENDED).any()),
            "num_contended": int(flags.str.contains(CONTENDED).sum()),
        }
        for column in columns:
            row[column] = summarize(values(group, column))
        rows.append(row)

    return pd.DataFrame(
        rows, columns=["cell_id", "n", "oversubscribed", "contended", "num_contended", *columns]
    )


def values(frame: pd.DataFrame, column: str) -> list[float]:
    """The numbers of a column without its nulls."""
    return [float(value) for value in pd.to_numeric(frame[column]).dropna()]


def scaling(frame: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """`per_cell` of throughput and CPU seconds per sample, with the cells' names and `efficiency`.

    `frame`: the ok runs, columns of `export csv`. `cells`: `cells.describe`. efficiency =
    throughput at N over N times the throughput at 1 worker of the same series, a `Summary`; n = 0
    where either point is flagged or missing.
    """
    table = cells.merge(per_cell(frame, QUANTITIES), on="cell_id")
    efficiencies = []

    for row in table.itertuples():
        base = table[
            (table["workload"] == row.workload)
            & (table["series"] == row.series)
            & (table["straggler"] == row.straggler)
            & (table["replicas"] == 1)
        ]
        flagged = (
            row.oversubscribed
            or row.contended
            or base["oversubscribed"].any()
            or base["contended"].any()
        )

        if len(base) != 1 or flagged:
            efficiencies.append(summarize([]))
            continue

        here: Summary = row.samples_per_s  # type: ignore[assignment]  # itertuples is untyped
        alone: Summary = base["samples_per_s"].iloc[0]
        efficiencies.append(
            ratio(here.points, [int(str(row.replicas)) * value for value in alone.points])
        )

    table["efficiency"] = pd.Series(efficiencies, dtype=object, index=table.index)
    return table


def runs_of_line(points: pd.DataFrame) -> list[pd.DataFrame]:
    """The stretches of one series that a line may join.

    They are neighbours in `replicas`, none of them flagged.
    """
    stretches: list[pd.DataFrame] = []
    current: list[int] = []
    ordered = points.sort_values("replicas")

    for index, flagged in zip(
        ordered.index, ordered["oversubscribed"] | ordered["contended"], strict=True
    ):
        if flagged:
            stretches.append(ordered.loc[current])
            current = []
        else:
            current.append(index)

    stretches.append(ordered.loc[current])
    return [stretch for stretch in stretches if len(stretch) > 1]
