"""Inside a run: where each rank's time went, and how stale the applied gradients were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from benchsuite.results.record import Run

PARTS = ("data", "compute", "blocked", "update", "idle")
SPLIT_COLUMNS = ("cell_id", "seed", "rank", "role", "straggler", "wall_s", *PARTS, "separable")


def rank_split(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run and rank: each part as a share of the rank's wall time.

    Columns: `SPLIT_COLUMNS`. Runs of the virtual clock have no wall time and no rows. `separable`
    is False where compute and communication overlap and could not be told apart: then `blocked` is
    0 and `compute` holds both. What is left of the wall time counts as idle, so that the shares add
    up to 1.
    """
    rows = []

    for run in runs:
        for rank in run.cost.get("ranks", ()):
            wall_s = rank.get("wall_s")
            if not wall_s:
                continue
            shares: dict[str, Any] = {
                part: (rank.get(f"{part}_s") or 0.0) / wall_s for part in PARTS
            }
            shares["idle"] = max(0.0, 1.0 - sum(shares[part] for part in PARTS if part != "idle"))
            slowed = rank.get("straggler")
            rows.append(
                {
                    "cell_id": run.cell_id,
                    "seed": run.cell.seed,
                    "rank": rank["rank"],
                    "role": rank["role"],
                    "straggler": float(slowed["factor"]) if slowed else 1.0,
                    "wall_s": wall_s,
                    **shares,
                    "separable": rank.get("blocked_s") is not None,
                }
            )

    return pd.DataFrame(rows, columns=list(SPLIT_COLUMNS))


def median_split(split: pd.DataFrame) -> pd.DataFrame:
    """The median share over the runs of a cell, per rank, with n.

    `blocked_low` and `blocked_high` are its range.
    """
    grouped = split.groupby(["cell_id", "rank", "role"], sort=False)
    table = grouped[list(PARTS)].median()
    table["straggler"] = grouped["straggler"].max()
    table["separable"] = grouped["separable"].all()
    table["blocked_low"], table["blocked_high"] = grouped["blocked"].min(), grouped["blocked"].max()
    table["n"] = grouped.size()
    return table.reset_index()


def staleness(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run and staleness value.

    Columns: cell_id, seed, staleness (versions), updates, share of the run's updates.
    """
    rows = []

    for run in runs:
        recorded = run.result.get("staleness")
        if not recorded:
            continue
        total = sum(recorded["histogram"].values())

        for value, count in sorted(
            (int(value), count) for value, count in recorded["histogram"].items()
        ):
            rows.append(
                (run.cell_id, run.cell.seed, value, count, count / total if total else math.nan)
            )

    return pd.DataFrame(rows, columns=["cell_id", "seed", "staleness", "updates", "share"])


def pooled_staleness(table: pd.DataFrame) -> pd.DataFrame:
    """Per cell and staleness value the median share over the runs, and its range.

    A value that a run never saw counts 0.
    """
    wide = table.pivot_table(
        index=["cell_id", "seed"], columns="staleness", values="share", fill_value=0.0
    )
    long = wide.reset_index().melt(
        id_vars=["cell_id", "seed"], var_name="staleness", value_name="share"
    )
    grouped = long.groupby(["cell_id", "staleness"], sort=False)["share"]
    pooled = grouped.agg(center="median", low="min", high="max", n="size").reset_index()
    return pooled[pooled["high"] > 0].reset_index(drop=True)
