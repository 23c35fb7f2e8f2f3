"""Three small cells for asv, each launched a few times by the harness.

Every `track_*` method reads its figure from that one set of runs.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from typing import Any

# Parameter of the benchmarks -> how its cell differs from cnn/smoke with two workers.
CELLS: dict[str, dict[str, Any]] = {
    "synchronous/ring": {"sync": "synchronous", "topology": "ring"},
    "synchronous/native": {"sync": "synchronous", "topology": "native"},
    "asynchronous/parameter_server": {"sync": "asynchronous", "topology": "parameter_server"},
}
SEEDS = (0, 1, 2)  # a fresh launch each, which is the unit, and never a pooled step

Figures = dict[str, dict[str, list[float]]]
Track = dict[str, Any] | float


class Cells:
    """Two workers on this machine, with a fresh launch per seed for every cell."""

    params = list(CELLS)
    param_names = ["cell"]
    timeout = 300

    def setup_cache(self) -> Figures:
        """Runs the cells once and returns their figures, which asv hands to every method.

        asv keeps a pickle, so they are plain floats. The ranks' output goes to files: no child of
        ours holds asv's pipes, and all of them have ended on return.
        """
        from benchsuite.plan.cell import Cell
        from benchsuite.running import api

        figures: Figures = {}

        with tempfile.TemporaryDirectory(prefix="benchsuite-asv-") as folder:
            cells = [
                Cell(workload="cnn", preset="smoke", replicas=2, **fields)
                for fields in CELLS.values()
            ]
            api.run(cells, results=folder, seeds=SEEDS)
            table = api.load_results(folder)

        for name, fields in CELLS.items():
            mine = table[
                (table.sync == fields["sync"])
                & (table.topology == fields["topology"])
                & (table.status == "ok")
            ]
            per_sample = 1.0 / mine.samples_per_s
            figures[name] = {
                "step_time_s": _floats(mine.step_time_s_median),
                "seconds_per_sample": _floats(per_sample),
                "payload_bytes": _floats(mine.payload_bytes),
                "final_loss": _floats(mine.final_loss),
            }

        return figures

    def setup(self, figures: Figures, cell: str) -> None:
        """Skips a cell that this machine cannot run.

        asv skips what raises NotImplementedError here and shows "n/a", where another error would
        show a failure.
        """
        if not figures[cell]["payload_bytes"]:
            raise NotImplementedError(
                f"{cell} has no ok run on this machine; see benchsuite doctor"
            )

    def track_step_time(self, figures: Figures, cell: str) -> Track:
        return samples(figures[cell]["step_time_s"])

    track_step_time.unit = "seconds"  # type: ignore[attr-defined]

    def track_seconds_per_sample(self, figures: Figures, cell: str) -> Track:
        return samples(figures[cell]["seconds_per_sample"])

    track_seconds_per_sample.unit = "seconds"  # type: ignore[attr-defined]

    def track_payload_bytes(self, figures: Figures, cell: str) -> Track:
        return samples(figures[cell]["payload_bytes"])

    track_payload_bytes.unit = "bytes"  # type: ignore[attr-defined]

    def track_final_loss(self, figures: Figures, cell: str) -> Track:
        return samples(figures[cell]["final_loss"])

    track_final_loss.unit = "loss"  # type: ignore[attr-defined]


def samples(values: list[float]) -> Track:
    """The form from which asv makes an interval: one value per fresh launch.

    asv does not document that form; tests/test_asv.py notices where it changes.
    """
    if not values:
        return math.nan
    return {"samples": values, "number": 1} if len(values) > 1 else statistics.median(values)


def _floats(column: Any) -> list[float]:
    """The values as plain floats, because asv cannot pickle numpy's and write them as JSON."""
    return [float(value) for value in column.dropna()]
