"""A benchmark suite for distributed training: throughput, bytes sent and convergence side by side.

`run(plan_or_cell)` runs what is missing, `load_results(path)` is the tidy table of stored runs,
`Cell` is one experiment. Importing the package imports neither torch nor pandas: names are resolved
when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchsuite.measure.version import VERSION

if TYPE_CHECKING:
    from benchsuite.plan.cell import Cell
    from benchsuite.running.api import load_results, run

__version__ = VERSION
__all__ = ["Cell", "__version__", "load_results", "run"]


def __getattr__(name: str) -> Any:
    if name == "Cell":
        from benchsuite.plan.cell import Cell

        return Cell
    if name in ("run", "load_results"):
        from benchsuite.running import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
