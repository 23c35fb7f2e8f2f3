"""What the ranks of `benchsuite selfcheck --only compression` do.

`codecs` times the work of every compression on a gradient. It calls `mean` of two workers on a
topology that moves nothing, so that only encoding and decoding are left, and leaves `{name:
{"encode": [ns, ..], "decode": [ns, ..], "wire_bytes", "dense_bytes", "nominal_ratio"}}`. `wires`
times the transfer of as many bytes.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchsuite.compression import Compression
from benchsuite.plan.cell import from_json
from benchsuite.programs.bench import read_order
from benchsuite.topology import ring_traffic
from benchsuite.topology.direct import Topology as Direct
from benchsuite.topology.native import Topology as Native
from benchsuite.topology.ring import Topology as Ring
from benchsuite.worker import setup
from benchsuite.worker.job import RankJob, write_rank_file
from benchsuite.worker.rendezvous import connect, open_store
from benchsuite.workload import Shapes, numel

WARMUP = 2
WORKERS = 2
ITEMSIZE = 4
# compression -> the one of its topologies with which its bytes are counted
OVER: dict[str, Any] = {
    "fp16": Ring,
    "bf16": Ring,
    "powersgd": Ring,
    "topk": Native,
    "sign": Native,
    "ef_sign": Native,
    "int8": Direct,
}


def codecs(job: RankJob) -> None:
    """Times all compressions in turn, in another order each time."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as a worker does
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    shapes = _shapes(job)
    repetitions = int(read_order(job.run_dir)["repetitions"])
    order = random.Random(job.cell["seed"])
    generator = torch.Generator().manual_seed(int(job.cell["seed"]))
    gradient = torch.randn(numel(shapes), generator=generator)
    flat = torch.empty(numel(shapes))
    made: dict[str, Compression] = {name: setup.make("compression", name, {}) for name in OVER}
    record = {name: _described(name, compression, shapes) for name, compression in made.items()}
    names = sorted(made)

    for repetition in range(WARMUP + repetitions):
        order.shuffle(names)
        for name in names:
            encode, decode = _timed(made[name], flat.copy_(gradient))
            if repetition >= WARMUP:
                record[name]["encode"].append(encode)
                record[name]["decode"].append(decode)

    write_rank_file(job.run_dir, job.rank, json.dumps(record))


def wires(job: RankJob) -> None:
    """Times two ranks that exchange as many bytes as each compression sends: `{name: [ns, ..]}`."""
    torch.set_num_threads(1)
    comm = connect(job, from_json(job.cell), open_store(job), None)
    order = read_order(job.run_dir)
    peer = 1 - comm.rank
    names = sorted(order["sizes"])
    sizes = {name: int(size) for name, size in order["sizes"].items()}
    vectors = {
        name: [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
        for name, size in sizes.items()
    }
    record: dict[str, list[int]] = {name: [] for name in names}

    for repetition in range(WARMUP + int(order["repetitions"])):
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            mine, other = vectors[name]
            comm.barrier()
            begin = time.perf_counter_ns()
            comm.sendrecv(mine, peer, other, peer)
            if repetition >= WARMUP:
                record[name].append(time.perf_counter_ns() - begin)

    write_rank_file(job.run_dir, job.rank, json.dumps(record))
    comm.barrier()


def _shapes(job: RankJob) -> Shapes:
    """The shapes of the cell's model, made without memory because nobody needs its numbers."""
    workload = setup.make_workload(from_json(job.cell))
    with torch.device("meta"):
        model = torch.nn.Sequential(*workload.layers())
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _described(name: str, compression: Compression, shapes: Shapes) -> dict[str, Any]:
    """A record with the bytes that leave one of two workers for one mean.

    `wire_bytes` is encoded; `dense_bytes` is what a ring sends of the vector as it is.
    """
    compression.start(shapes, seed=0)
    size = numel(shapes)
    wire = compression.predicted_traffic(shapes, ITEMSIZE, OVER[name](), num_workers=WORKERS)
    dense = ring_traffic(size, ITEMSIZE, WORKERS, longest=size)
    return {
        "encode": [],
        "decode": [],
        "nominal_ratio": compression.nominal_ratio,
        "wire_bytes": wire.payload_bytes / WORKERS,
        "dense_bytes": dense.payload_bytes / WORKERS,
    }


def _timed(compression: Compression, flat: Tensor) -> tuple[int, int]:
    """(ns until the last vector has set out, ns from its return on)."""
    nowhere = Nowhere()
    begin = time.perf_counter_ns()
    compression.mean(flat, nowhere)  # type: ignore[arg-type]  # all of a topology that a compression asks for
    end = time.perf_counter_ns()
    return nowhere.left_ns - begin - nowhere.before_ns, end - nowhere.back_ns


class Nowhere:
    """A topology that moves nothing: rank 0 of two workers, whose peer sent the same.

    The time that it needs itself is not counted.
    """

    num_workers = WORKERS
    rank = 0
    scatters = True  # as `direct` does: chunks are sent to their owners

    def __init__(self) -> None:
        self.left_ns = self.back_ns = self.before_ns = 0
        self._pieces: list[Tensor] = []

    def mean(self, flat: Tensor) -> None:
        """The mean of two vectors that are equal, which is the vector itself."""
        self._leave()
        self._return()

    def gather(self, wire: Tensor, sizes: Sequence[int] = ()) -> list[Tensor]:
        """This worker's bytes, and a copy of them that lies elsewhere."""
        self._leave()
        rows = [wire, self._pieces[1] if sizes else wire.clone()]
        self._return()
        return rows

    def scatter(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """This worker's own chunk, and the peer's."""
        self._leave()
        self._pieces = [piece.clone() for piece in pieces]
        rows = [pieces[0], self._pieces[0]]
        self._return()
        return rows

    def _leave(self) -> None:
        self.before_ns += (
            self.back_ns - self.left_ns
        )  # what the topology itself took in the call before
        self.left_ns = time.perf_counter_ns()

    def _return(self) -> None:
        self.back_ns = time.perf_counter_ns()
