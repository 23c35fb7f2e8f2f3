"""The curve of a run: its snapshots, evaluated after the loop and off the clock, on the rank that owns them."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchsuite.measure.snapshots import Snapshots
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.training import Training


def evaluate(training: Training, snapshots: Snapshots) -> dict[str, Any] | None:
    """Metric of every snapshot; None on the ranks that own none. Several servers' slices are joined on the first.

    `checksum` is the sha256 of the last snapshot's bytes.
    """
    if training.strategy.snapshot_of == "servers" and training.is_server:
        vectors = _gather_slices(training, snapshots)
        if training.comm.rank != training.topology.num_workers:
            return None
    elif training.strategy.snapshot_of == "replica" and training.comm.rank == 0:
        vectors = [snapshots[position] for position in range(len(snapshots))]
    else:
        return None
    metrics: list[float | None] = []
    for vector in vectors:
        training.part.params.copy_(vector)
        value = training.workload.evaluate(training.part.infer)
        metrics.append(value if math.isfinite(value) else None)
    last = vectors[-1].detach().cpu().contiguous().numpy() if vectors else np.zeros(0)
    return {
        "samples": snapshots.samples[: len(vectors)],
        "version": snapshots.version[: len(vectors)],
        "time_ns": snapshots.time_ns[: len(vectors)],
        "metric": metrics,
        "checksum": hashlib.sha256(last.tobytes()).hexdigest(),
    }


def _gather_slices(training: Training, snapshots: Snapshots) -> list[Tensor]:
    """Slices of equal position, joined on the first server (traffic outside the run)."""
    topology, comm = training.topology, training.comm
    assert isinstance(topology, ParameterServer)
    first, params = topology.num_workers, training.part.params
    mine = [snapshots[position] for position in range(len(snapshots))]
    count = torch.tensor([len(mine)])
    if comm.rank != first:
        comm.send(count, first)
        for vector in mine:
            if vector.numel():
                comm.send(vector.contiguous(), first)
        return []
    slices = [mine]
    for rank in range(first + 1, comm.size):
        comm.recv(count, rank)
        start, stop = topology.slice_of(rank - first, params.numel())
        received = [torch.empty(stop - start, dtype=params.dtype) for _ in range(int(count))]
        for vector in received:
            if vector.numel():
                comm.recv(vector, rank)
        slices.append(received)
    return [torch.cat(pieces) for pieces in zip(*slices, strict=False)]
