"""The check of `benchsuite selfcheck` on divided replicas.

Each parallelism is compared with a script that uses the same class of the library, on two ranks and
the presets that load links. Launches are fresh and take turns. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.programs.bars import Figure
from benchsuite.programs.bench import Bench
from benchsuite.programs.selfcheck.cells import Effort, against_script

SCRIPTS = "benchsuite.programs.selfcheck.parallel_loops"
MODULES = (SCRIPTS,)  # for the fork server to import
BAR = 0.95
SIZE = 2
PRESET = "comm"

# A parallelism, its script, workloads and options.
COMPARED: tuple[tuple[str, str, tuple[str, ...], Mapping[str, Any]], ...] = (
    ("fsdp", "fsdp_loop", ("transformer", "cnn"), {}),
    ("tensor", "tensor_loop", ("transformer",), {}),
    ("pipeline", "pipeline_loop", ("transformer", "cnn"), {}),
)
# Few steps are enough, because each takes tenths of a second or more.
STEPS = 8
WARMUP = 2


def parallel(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measures the step times of the cell and of the script in turn."""
    effort = replace(
        effort, pairs=1, steps=min(effort.steps, STEPS), warmup=min(effort.warmup, WARMUP)
    )

    for name, script, workloads, options in COMPARED:
        for workload in workloads:
            cell = Cell(
                workload=workload,
                preset=PRESET,
                parallel=name,
                model_parallel=SIZE,
                options={name: dict(options)} if options else {},
                budget=Budget(steps=effort.steps),
            )
            yield from against_script(
                bench,
                resolve(cell),
                f"{SCRIPTS}:{script}",
                effort,
                name=f"{workload}, {script}",
                item="parallel",
                bar=BAR,
            )


CHECKS: Mapping[str, Callable[[Bench, Effort], Iterator[Figure]]] = {"parallel": parallel}
