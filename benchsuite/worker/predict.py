"""Bytes that a run will send and keep, told before it runs.

They follow from the formulas in the strategy's own file, from shapes, and from the events that are
expected.
"""

from __future__ import annotations

from torch import nn

from benchsuite.comm import Traffic
from benchsuite.compression import Compression
from benchsuite.plan.cell import Cell
from benchsuite.sync import Events, Setting, Strategy
from benchsuite.topology import Topology
from benchsuite.worker import model_parallel, setup
from benchsuite.workload import Shapes, Workload, trained_parameters


def predicted(cell: Cell) -> Traffic:
    """Traffic of an undisturbed run, from the cell alone: the model is built on the meta device."""
    workload, strategy, shapes, described, num_batches = _described(cell)
    events = setup.expected_events(strategy, workload, num_batches, described)
    if setup.is_model_parallel(cell):
        events = model_parallel.expected_events(cell, workload, events, num_batches)
    return of_run(cell, strategy, shapes, events, described, workload=workload)


def of_run(
    cell: Cell,
    strategy: Strategy,
    shapes: Shapes,
    events: Events,
    described: Setting,
    *,
    workload: Workload | None = None,
) -> Traffic:
    """Traffic of a whole run, from its events: the one place where everything that a run sends is
    told.

    workload: started. Where none is given and a replica is held by several ranks, it is started
    here.
    """
    if setup.is_model_parallel(cell):
        started = workload or setup.start_workload(cell)
        return model_parallel.predicted(cell, started, strategy, events, described)

    return setup.predicted_traffic(strategy, shapes, events, described)


def kept(cell: Cell) -> dict[str, int | None]:
    """Bytes that the strategy keeps on a worker and on the fullest server (`state_bytes`).

    Of a model-parallel replica the fullest part counts; a server keeps something for every part.
    None: there is no server, or a user's strategy states no formula.
    """
    workload, strategy, shapes, described, _ = _described(cell)
    parts = [shapes]
    if setup.is_model_parallel(cell):
        parts = model_parallel.part_shapes(cell, workload)

    on_workers: list[int | None] = [strategy.state_bytes(part, described) for part in parts]
    known = [num_bytes for num_bytes in on_workers if num_bytes is not None]
    if len(known) < len(parts):  # a user's strategy that states no formula
        return {"worker": None, "server": None}

    server = None
    if described.num_servers:
        server = sum(strategy.state_bytes(part, described, server=True) for part in parts)
    return {"worker": max(known), "server": server}


def _described(cell: Cell) -> tuple[Workload, Strategy, Shapes, Setting, int]:
    """The workload, the strategy (not started), what its formulas take, and the number of global
    batches.
    """
    workload = setup.start_workload(cell)
    # Shapes are enough for bytes, so the largest model costs no memory here.
    layers = model_parallel.meta_layers(workload)
    shapes = {name: p.shape for name, p in trained_parameters(nn.Sequential(*layers)).items()}
    topology: Topology = setup.make_topology(cell)
    compression: Compression = setup.make(
        "compression", cell.compression, setup.options_for(cell, "compression")
    )
    compression.start(shapes, seed=cell.seed)
    strategy: Strategy = setup.make("sync", cell.sync, setup.options_for(cell, "sync"))
    recipe = setup.make_recipe(cell, workload)
    described = setup.setting(cell, topology, compression, recipe)

    return workload, strategy, shapes, described, recipe.budget // recipe.global_batch
