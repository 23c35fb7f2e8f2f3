"""What the virtual clock says of a cell: virtual seconds, waiting, staleness.

These are never joined with wall seconds.
"""

from __future__ import annotations

import math

import pandas as pd

from benchsuite.analysis.scaling import per_cell

# frame column -> what it is called here; a missing time or number of samples of a run with a target
# is a miss
SOURCES = {
    "virtual_samples_per_s": "virtual_samples_per_s",
    "virtual_step_time_s_median": "virtual_step_s",
    "idle_share": "waiting",
    "staleness_mean": "staleness",
    "final_metric": "final_metric",
    "samples_to_target": "samples_to_target",
    "bytes_to_target": "bytes_to_target",
    "virtual_time_to_target_s": "virtual_seconds_to_target",
    "payload_bytes_per_sample": "bytes_per_sample",
    "busiest_port_bytes_per_step": "busiest_port_bytes_per_step",
}
ROUNDED = 9  # digits of a share: what is left of 1 - busy / total by rounding is no waiting
CENSORED = ("samples_to_target", "bytes_to_target", "virtual_time_to_target_s")


def virtual(frame: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """One row per cell of the virtual clock with a `Summary` per quantity; misses are infinite.

    `frame`: ok runs, columns of `export csv`. `cells`: `cells.describe`. waiting: share of the
    workers' virtual time in which they compute nothing. Cells without gradients have n = 0 where
    training decides.
    """
    table = frame.copy()
    has_target = table["target_metric"].notna()

    for column in CENSORED:
        numbers = pd.to_numeric(table[column]).astype(float)
        table[column] = numbers.mask(numbers.isna() & has_target, math.inf)

    table["idle_share"] = pd.to_numeric(table["idle_share"]).round(ROUNDED)
    merged = cells.merge(per_cell(table, tuple(SOURCES)), on="cell_id")
    return merged.rename(columns=SOURCES)
