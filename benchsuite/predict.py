"""Bytes that a run will send, before it runs: from the strategy's own file, shapes and expected events."""

from __future__ import annotations

import torch
from torch import nn

from benchsuite import training
from benchsuite.cell import Cell
from benchsuite.comm import Traffic
from benchsuite.compression import Compression
from benchsuite.sync import Strategy
from benchsuite.topology import Topology
from benchsuite.workload import trained_parameters


def predicted(cell: Cell) -> Traffic:
    """Traffic of an undisturbed run, from cell and shapes only (the model is built on the meta device)."""
    workload = training.make_workload(cell)
    workload.start(seed=cell.seed, dtype=training.DTYPES[cell.precision])
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in trained_parameters(nn.Sequential(*workload.layers())).items()}
    topology: Topology = training.make_topology(cell)
    compression: Compression = training.make("compression", cell.compression, training.options_for(cell, "compression"))
    compression.start(shapes, seed=cell.seed)
    strategy: Strategy = training.make("sync", cell.sync, training.options_for(cell, "sync"))
    recipe = training.make_recipe(cell, workload)
    described = training.setting(cell, topology, compression, recipe)
    events = strategy.expected_events(recipe.budget // recipe.global_batch, described)
    return strategy.predicted_traffic(shapes, events, described)
