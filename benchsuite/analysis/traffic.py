"""Bytes per step and at the busiest port: predicted, counted or derived, and seen by the kernel."""

from __future__ import annotations

import pandas as pd

from benchsuite.analysis.scaling import per_cell
from benchsuite.results.record import LOST_WORKER

PER_STEP = (
    "predicted_bytes_per_step",
    "payload_bytes_per_step",
    "control_bytes_per_step",
    "wire_bytes_per_step",
    "busiest_port_bytes_per_step",
    "messages_per_step",
)


def traffic(frame: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """One row per cell with a `Summary` per quantity.

    Bytes are per step, or per update where updates are asynchronous. Adds
    `payload_bytes_per_sample`, `wire_ratio` = wire / (payload + control) over the whole run,
    `payload_source`, and `law`: `holds` where payload equals predicted exactly in every counted
    run, `broken` where it does not, and empty for derived rows (a formula compared with itself
    proves nothing). A run that lost a worker says nothing: what that one sent is not known.
    `num_counted`: the runs that the law was held against; `payload_minus_predicted`: their
    difference over the whole run.
    """
    table = frame.copy()
    sent = pd.to_numeric(table["payload_bytes"]) + pd.to_numeric(table["control_bytes"]).fillna(0)
    moved = (
        pd.to_numeric(table["payload_bytes"]) > 0
    )  # a ratio to control bytes alone says nothing of the payload
    table["wire_ratio"] = (pd.to_numeric(table["wire_bytes"]) / sent).where(moved)
    difference = pd.to_numeric(table["payload_bytes"]) - pd.to_numeric(table["predicted_bytes"])
    whole = ~table["flags"].fillna("").astype(str).str.contains(LOST_WORKER)
    table["payload_minus_predicted"] = difference.where(
        whole & (table["payload_source"] == "counted")
    )
    added = ("payload_bytes_per_sample", "payload_minus_predicted", "wire_ratio")
    merged = cells.merge(per_cell(table, (*PER_STEP, *added)), on="cell_id")
    grouped = table.groupby("cell_id", sort=False)
    sources = grouped["payload_source"].first()
    merged["payload_source"] = merged["cell_id"].map(sources)
    held = {str(cell_id): _law(group) for cell_id, group in grouped}
    merged["law"] = merged["cell_id"].map({cell_id: law for cell_id, (law, _) in held.items()})
    merged["num_counted"] = merged["cell_id"].map(
        {cell_id: count for cell_id, (_, count) in held.items()}
    )
    return merged


def _law(group: pd.DataFrame) -> tuple[str, int]:
    whole = group[~group["flags"].fillna("").astype(str).str.contains(LOST_WORKER)]
    if whole.empty or not (whole["payload_source"] == "counted").all():
        return "", 0
    equal = pd.to_numeric(whole["predicted_bytes"]) == pd.to_numeric(whole["payload_bytes"])
    return "holds" if bool(equal.fillna(False).all()) else "broken", len(whole)
