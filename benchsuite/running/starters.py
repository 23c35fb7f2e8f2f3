"""Who starts the cells of a command, and how what they leave becomes a run.

Under the wall clock the engine that a cell names starts its ranks, one cell after the other. Under
the virtual clock simulators run several cells at once, in any order. `runner.py` chooses by the
cell's clock and knows no engine by name.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from benchsuite.cluster import Engine
from benchsuite.cluster.simulator_pool import SimulatorPool, groups
from benchsuite.errors import UsageError
from benchsuite.measure.load import CpuMeter
from benchsuite.plan import declared, plugins
from benchsuite.plan.cell import Cell
from benchsuite.results.assemble import assemble
from benchsuite.results.record import DIVERGED, TIMING_ONLY, Run
from benchsuite.running.setting import Setting


class Engines:
    """The engines that the cells of a command name, each opened once and closed at the end.

    flags: what the command line gave for the flags that an engine declares.
    """

    def __init__(self, flags: Mapping[str, str] | None = None) -> None:
        """Opens nothing yet: an engine starts with the first cell that names it."""
        self._flags = dict(flags or {})
        self._open: dict[str, Engine] = {}
        self._stack = contextlib.ExitStack()

    def check(self, cells: Iterable[Cell]) -> None:
        """UsageError where the user starts the ranks of a cell, or the engine cannot do so here.

        Asked for all cells before the first is launched, so that a plan does not stop half-way.
        """
        # One cell of each engine is enough: nothing here depends on the rest of the cell.
        for cell in {cell.cluster: cell for cell in cells}.values():
            engine = declared.cluster(cell.cluster)
            if engine.started_by:
                raise UsageError(
                    f"{cell.label}: cluster {cell.cluster!r} is started by your own command: "
                    f"{engine.started_by}"
                )

            unknown = [name for name in self._flags if name not in engine.flags]
            if unknown:
                raise UsageError(
                    f"{cell.label}: cluster {cell.cluster!r} takes no --{unknown[0]}: leave it out"
                )

            if cell.clock == "wall" and (refusal := self._class_of(cell.cluster).refusal()):
                raise UsageError(f"{cell.label}: {refusal}")

    def of(self, cell: Cell) -> Engine:
        """The engine that starts the ranks of a cell, opened at the first call.

        Kept open for all cells, because starting one costs seconds.
        """
        if cell.cluster not in self._open:
            engine = self._class_of(cell.cluster)(**self._flags)
            self._open[cell.cluster] = self._stack.enter_context(engine)
        return self._open[cell.cluster]

    def __enter__(self) -> Self:
        """Itself: engines are opened one by one, as cells ask for them."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes every engine that was opened, the last one first, and with it its processes."""
        self._stack.close()

    @staticmethod
    def _class_of(reference: str) -> type[Engine]:
        """The engine's class. UsageError where the file's class is none of ours."""
        found = plugins.load("cluster", reference)
        if not issubclass(found, Engine):
            raise UsageError(
                f"{plugins.find('cluster', reference).path}: its Cluster is no engine: derive it "
                "from benchsuite.cluster.Engine"
            )
        return found


def launch(engine: Engine, cell: Cell, here: Setting) -> Run:
    """Starts a cell's ranks, waits for them, and makes a run of the records that they left.

    The run directory is private to the cell and removed afterwards: a later cell must not find a
    record of an earlier one and take it for its own.
    """
    with _run_dir() as run_dir:
        # Read before and after: what other programs took of the cores meanwhile stands in the run
        # file, because it explains a slow run.
        meter = CpuMeter()
        outcome = engine.run(cell, run_dir)
        load = meter.read()
        return assemble(
            cell,
            run_dir,
            outcome,
            code_id=here.code_id(cell),
            machine=here.machine,
            environment_id=here.environment_id,
            cores=load.cores,
            foreign_cpu_share=load.foreign_share,
        )


def simulate(cells: Sequence[Cell], here: Setting) -> Iterator[tuple[Cell, Run]]:
    """Runs cells of the virtual clock, one process per core; yields them as they end.

    cells: resolved, each with its seed. The long ones are begun first. Left in the middle, it ends
    its processes.
    """
    with SimulatorPool() as simulators:
        for cell, sections, outcome in simulators.run(groups(cells)):
            flags = set(outcome.flags)
            if cell.gradients == "none":
                flags.add(TIMING_ONLY)
            if sections and sections["result"]["diverged_step"] is not None:
                flags.add(DIVERGED)

            run = Run(
                cell=cell,
                code_id=here.code_id(cell),
                status=outcome.status,
                reason=outcome.reason,
                culprit=outcome.culprit,
                flags=tuple(sorted(flags)),
                started_at=outcome.started_at,
                machine=here.machine,
                environment_id=here.environment_id,
                **sections,
            )
            yield cell, run


@contextlib.contextmanager
def _run_dir() -> Iterator[Path]:
    """A new folder that is removed at the end, also where the cell failed."""
    folder = Path(tempfile.mkdtemp(prefix="benchsuite-"))  # mode 0700
    try:
        yield folder
    finally:
        # A file that cannot be removed must not cost the run that was measured.
        shutil.rmtree(folder, ignore_errors=True)
