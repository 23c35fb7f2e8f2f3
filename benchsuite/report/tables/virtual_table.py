"""All numbers in virtual time: the table that `table` prints of the wall clock."""

from __future__ import annotations

from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.printed import Table
from benchsuite.report.spec import FigureSpec
from benchsuite.report.tables import table

KIND = Kind(
    title="All numbers in virtual time",
    clock="virtual",
    keys={
        "columns": (
            "virtual_samples_per_s",
            "waiting",
            "staleness",
            "final_metric",
            "samples_to_target",
            "virtual_seconds_to_target",
            "bytes_to_target",
            "bytes_per_sample",
            "payload_minus_predicted",
            "notes",
        )
    },
    place=150,
)


def tabulate(spec: FigureSpec, material: Material) -> Table:
    """One row per cell of the virtual clock."""
    return table.tabulate(spec, material)
