"""The curve of a run: its snapshots, evaluated by the rank that owns them.

This happens after the loop and off the clock, so that evaluation takes nothing from the run.
"""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor

from benchsuite.plan.hashing import finite
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.worker.setup import Training
from benchsuite.worker.snapshots import Snapshots, checksum


def evaluate(training: Training, snapshots: Snapshots) -> dict[str, Any] | None:
    """The metric of every snapshot; None on the ranks that own no curve.

    Slices that several servers hold are joined on the first server; where the mean over replicas
    counts it is made on rank 0. `checksum` is the sha256 of the last snapshot's bytes.
    """
    if training.strategy.snapshot_of == "servers" and training.is_server:
        vectors = _gather_slices(training, snapshots)
        if training.comm.rank != training.topology.num_workers:
            return None
    elif training.strategy.snapshot_of == "mean" and not training.is_server:
        vectors = _mean_of_replicas(training, snapshots)
        if training.comm.rank != 0:
            return None
    elif training.strategy.snapshot_of == "replica" and training.comm.rank == 0:
        vectors = [snapshots[position] for position in range(len(snapshots))]
    else:
        return None

    metrics: list[float | None] = []

    for vector in vectors:
        # The model that was trained is free now, and evaluates each snapshot in turn.
        training.part.params.copy_(vector)
        metrics.append(finite(training.workload.evaluate(training.part.infer)))

    return {
        "samples": snapshots.samples[: len(vectors)],
        "version": snapshots.version[: len(vectors)],
        "time_ns": snapshots.time_ns[: len(vectors)],
        "metric": metrics,
        "checksum": checksum(vectors[-1] if vectors else torch.empty(0)),
    }


def _mean_of_replicas(training: Training, snapshots: Snapshots) -> list[Tensor]:
    """On rank 0: the mean over replicas at each of its own snapshots; [] on the others.

    Replicas are added in rank order, so that the bits repeat. A replica may go at its own pace: its
    newest snapshot that is not newer in samples counts. What is sent here is outside the run.
    """
    comm = training.comm
    mine = [snapshots[position] for position in range(len(snapshots))]
    counts = torch.tensor([len(mine)])

    if comm.rank != 0:
        comm.send(counts, 0)  # (1,)
        comm.send(torch.tensor(snapshots.samples), 0)  # (snapshots,)
        for vector in mine:
            comm.send(vector.contiguous(), 0)  # (P,)
        return []

    # The snapshots of rank 0 say at which samples the curve has points.
    sums = [vector.clone() for vector in mine]

    for rank in range(1, training.topology.num_workers):
        comm.recv(counts, rank)
        samples = torch.empty(int(counts), dtype=torch.int64)
        comm.recv(samples, rank)
        theirs = [torch.empty_like(mine[0]) for _ in range(int(counts))]
        for vector in theirs:
            comm.recv(vector, rank)

        for total, at in zip(sums, snapshots.samples, strict=True):
            newest = bisect.bisect_right(samples.tolist(), at) - 1
            total.add_(theirs[max(newest, 0)])

    return [total.div_(training.topology.num_workers) for total in sums]


def _gather_slices(training: Training, snapshots: Snapshots) -> list[Tensor]:
    """On the first server: the servers' slices of equal position, joined; [] on the others.

    What is sent here is outside the run.
    """
    topology = training.topology
    comm = training.comm
    assert isinstance(topology, ParameterServer)
    # Workers have the lower ranks, servers follow.
    first = topology.num_workers
    params = training.part.params
    mine = [snapshots[position] for position in range(len(snapshots))]
    count = torch.tensor([len(mine)])

    if comm.rank != first:
        comm.send(count, first)

        for vector in mine:
            if vector.numel():
                comm.send(vector.contiguous(), first)

        return []

    # Server -> its slice at each snapshot. A rank without parameters sends no vectors.
    slices = [mine]

    for rank in range(first + 1, comm.size):
        comm.recv(count, rank)
        start, stop = topology.slice_of(rank - first, params.numel())
        received = [torch.empty(stop - start, dtype=params.dtype) for _ in range(int(count))]

        for vector in received:
            if vector.numel():
                comm.recv(vector, rank)

        slices.append(received)

    # Not strict: where a server was lost or late, only what all of them have is joined.
    return [torch.cat(pieces) for pieces in zip(*slices, strict=False)]
