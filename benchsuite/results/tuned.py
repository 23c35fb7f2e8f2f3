"""A tuned cell: `tuning = "per_strategy"`, whose learning rate trials choose before its runs.

A run of it keeps the cell as it was asked for; `result.tuning` of the run file says which factor on
the recipe's learning rate was chosen. How trials are made and judged stands in `running/tune.py`.
"""

from __future__ import annotations

import dataclasses

from benchsuite.plan.cell import Cell
from benchsuite.results.record import Run


def is_tuned(cell: Cell) -> bool:
    """Whether trials choose the cell's learning rate."""
    return cell.tuning == "per_strategy"


def with_factor(cell: Cell, factor: float) -> Cell:
    """The cell that is trained where a tuned one is asked for and `factor` was chosen."""
    return dataclasses.replace(cell, tuning="same", lr_factor=factor)


def trained(run: Run) -> Cell:
    """The run's cell as it was trained: a tuned one with the factor that was chosen for it."""
    if not is_tuned(run.cell):
        return run.cell

    return with_factor(run.cell, run.result["tuning"]["lr_factor"])
