"""When a run has arrived: `Target`, and the rule by which a curve reaches it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """When a run has arrived. `criterion = "twice"`: in two consecutive evaluations."""

    # Three bounds of one metric, so that a strategy that misses the hard one still has a time.
    metric: str
    easy: float
    target: float
    hard: float
    direction: str = "max"  # or "min"
    criterion: str = "once"  # or "twice"
    evaluate_every: int = 0  # samples between two evaluations
    unit: str = ""  # of the metric, e.g. "%"

    def reached(self, value: float, bound: float) -> bool:
        """Whether one evaluation satisfies `bound`.

        NaN never does: every comparison with it is false, in both directions.
        """
        return value >= bound if self.direction == "max" else value <= bound


def first_reached(target: Target, bound: float, metrics: Sequence[float | None]) -> int | None:
    """Index of the evaluation that satisfies the criterion for `bound`; None = a miss.

    metrics: one per evaluation, None where it was left out. Not interpolated back before it was
    seen; with `twice` it is the second of two in a row, so that a lucky evaluation is no arrival.
    """
    needed = 2 if target.criterion == "twice" else 1

    in_a_row = 0

    for position, value in enumerate(metrics):
        # An evaluation that was left out breaks the row, as one below the bound does.
        in_a_row = in_a_row + 1 if value is not None and target.reached(value, bound) else 0
        if in_a_row >= needed:
            return position

    return None
