"""Builds what one rank works with, whether a replica is one rank or several."""

from __future__ import annotations

from collections.abc import Callable

from benchsuite.comm import Comm
from benchsuite.plan.cell import Cell
from benchsuite.worker import model_parallel, setup
from benchsuite.worker.setup import Training
from benchsuite.workload import Part, Recipe, Workload


def build(
    cell: Cell,
    comm: Comm,
    *,
    wrap: Callable[[Part, int], Part] | None = None,
    given: tuple[Workload, Recipe, Part] | None = None,
    before_model: Callable[[], None] = lambda: None,
) -> Training:
    """Builds and starts everything on this rank.

    The full model is built on the CPU from the one seed, so that every rank starts equal.

    wrap: `wrap(part, worker)` may stand between strategy and part. given: a started workload, a
    recipe and a part that are there already (ranks of one process share the first two).
    before_model: called once the workload has its data.
    """
    assert cell.tuning == "same", (
        "a tuned cell runs with the factor that its trials chose: tuned.with_factor"
    )
    if setup.is_model_parallel(cell):
        return model_parallel.build(cell, comm, wrap=wrap, before_model=before_model)

    if given is None:
        workload, part = setup.build_part(cell, before_model=before_model)
        recipe = setup.make_recipe(cell, workload)
    else:
        workload, recipe, part = given

    return setup.assemble(cell, comm, workload, recipe, part, wrap=wrap)
