"""Replicas that several ranks hold together (`pipeline`, `tensor`, `fsdp`): who talks to whom, what
is sent inside.

Every part of a replica agrees with the same part of the other replicas, over a comm of their own: a
strategy of the replica axis sees one part's vector, and does not know of the others. A server owns
slice j of every part's vector and serves each part in a thread of its own, with its own comm; of a
mean gradient that is clipped they add up the norm.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchsuite.comm import Comm, Handle, Traffic
from benchsuite.comm.groups import library_group
from benchsuite.parallel import PartOfReplica
from benchsuite.parallel.pieces import Piece, cut, num_owned, shapes_of
from benchsuite.parallel.replica import Replica
from benchsuite.plan import placement
from benchsuite.plan.cell import Cell
from benchsuite.sync import Events, Setting, Strategy, count
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.topology.server_log import ServerLog
from benchsuite.worker import devices, rollouts, setup
from benchsuite.worker.setup import Training
from benchsuite.worker.snapshots import checksum
from benchsuite.worker.traffic_mode import TrafficMode, derive
from benchsuite.workload import (
    Batch,
    Part,
    Ready,
    Recipe,
    Shapes,
    Workload,
    mapped,
    seeded_layers,
    trained_parameters,
)

Update = Callable[[int, int], None]
Wrap = Callable[[Part, int], Part]


def build(
    cell: Cell, world: Comm, *, wrap: Wrap | None, before_model: Callable[[], None]
) -> Training:
    """Builds and starts everything on this rank.

    Every rank of the run calls it: groups are made together.
    """
    outer = [
        world.split(placement.ranks_of_part(cell, part)) for part in range(cell.model_parallel)
    ]
    inner = [placement.ranks_of_replica(cell, replica) for replica in range(cell.replicas)]
    comms = [world.split(ranks) for ranks in inner]
    groups = [library_group(ranks) for ranks in inner]
    workload = setup.start_workload(cell)
    recipe = setup.make_recipe(cell, workload)
    before_model()

    if world.rank >= cell.num_workers:
        return _server(
            cell,
            world,
            workload,
            recipe,
            comms=[comm for comm in outer if comm is not None],
            wrap=wrap,
        )

    replica, number = placement.replica_and_part(cell, world.rank)
    comm = comms[replica]
    mine = outer[number]
    assert comm is not None and mine is not None
    joined = Replica(comm, groups[replica], devices.current(cell))
    part: PartOfReplica = setup.make_part(cell, workload, joined)
    training = setup.assemble(cell, mine, workload, recipe, part, wrap=wrap, number=number)
    training.replica = part
    return training


# -- servers ---------------------------------------------------------------------------------------


class HeldPart(Part):
    """A part's vector on a server: nothing is computed with it."""

    def __init__(self, pieces: Sequence[Piece], params: Tensor) -> None:
        self.module = nn.Module()
        self.shapes = shapes_of(pieces)
        self.params = params
        self.grad = torch.empty(0, dtype=params.dtype)
        self.num_owned = num_owned(pieces)

    def infer(self, x: Tensor) -> Tensor:
        raise AssertionError("a server computes nothing")

    def gradient(
        self, batch: Batch, ready: Ready | None = None, until: Handle | None = None
    ) -> float | None:
        raise AssertionError("a server computes nothing")

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        raise AssertionError("a server computes nothing")

    def backward(self, batch: Batch) -> float:
        raise AssertionError("a server computes nothing")


@dataclass
class PartSum:
    """A float64 per part, added in the order of the parts, for the threads that serve them."""

    num_parts: int
    _values: list[float] = field(init=False)
    _barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self._values, self._barrier = [0.0] * self.num_parts, threading.Barrier(self.num_parts)

    def __call__(self, part: int, value: float) -> float:
        self._values[part] = value
        self._barrier.wait()
        total = sum(self._values)
        self._barrier.wait()  # nobody writes the next one before all have read
        return total

    def abort(self) -> None:
        """Lets go of those who wait for a thread that has failed."""
        self._barrier.abort()


def _server(
    cell: Cell,
    world: Comm,
    workload: Workload,
    recipe: Recipe,
    *,
    comms: Sequence[Comm],
    wrap: Wrap | None,
) -> Training:
    """The trainings of all parts; that of part 0, whose part is wrapped, knows the others."""
    dtype = setup.DTYPES[cell.precision]
    layers = seeded_layers(workload, cell.seed)
    parameters = trained_parameters(nn.Sequential(*layers).to(dtype))
    pieces = setup.make_parallel(cell).pieces(workload, layers, cell.model_parallel)
    total = PartSum(len(pieces))
    served = []

    for number, (comm, held) in enumerate(zip(comms, pieces, strict=True)):
        comm.traffic = Traffic()  # threads do not count into one
        part = HeldPart(held, cut(parameters, held))
        wrapped = wrap if number == 0 else None
        training = setup.assemble(cell, comm, workload, recipe, part, wrap=wrapped, number=number)
        topology = training.topology
        assert isinstance(topology, ParameterServer)
        start, stop = topology.slice_of(topology.server, part.params.numel())
        owned = max(0, min(part.num_owned, stop) - start)
        topology.one_of_parts(owned, partial(total, number))
        served.append(training)

    first = served[0]
    first.served = Served(served, total, world)
    return first


@dataclass
class Served:
    """What a server of divided replicas serves."""

    trainings: Sequence[Training]  # one per part
    total: PartSum
    world: Comm

    def serve(self, on_update: Update | None) -> ServerLog:
        """One thread per part, until every worker has said goodbye.

        The log is that of part 0, like all the others.
        """
        logs: list[ServerLog | None] = [None] * len(self.trainings)
        errors: list[BaseException] = []

        def serve_part(number: int) -> None:
            try:
                torch.set_num_threads(self.trainings[number].cell.threads)  # a thread's own setting
                logs[number] = self.trainings[number].serve_alone(
                    on_update if number == 0 else None
                )
            except BaseException as error:  # noqa: BLE001  the thread's outermost frame
                errors.append(error)
                self.total.abort()

        threads = [
            threading.Thread(target=serve_part, args=(at,), daemon=True)
            for at in range(1, len(logs))
        ]
        for thread in threads:
            thread.start()
        serve_part(0)
        for thread in threads:
            thread.join()

        if errors:
            broken = [
                error for error in errors if not isinstance(error, threading.BrokenBarrierError)
            ]
            raise (broken or errors)[0]

        for training in self.trainings:
            self.world.traffic.include(training.comm.traffic)
        assert logs[0] is not None
        return logs[0]


# -- traffic ---------------------------------------------------------------------------------------


def predicted(
    cell: Cell, workload: Workload, strategy: Strategy, events: Events, setting: Setting
) -> Traffic:
    """Of a whole run, by world rank: each part's agreement between replicas, and what every
    replica sends inside.
    """
    parallel = setup.make_parallel(cell)
    layers = meta_layers(workload)
    itemsize = setting.itemsize
    batch, acted_on = example(workload, layers, cell.replicas)
    total = Traffic()

    for part, held in enumerate(parallel.pieces(workload, layers, cell.model_parallel)):
        ranks = placement.ranks_of_part(cell, part)
        mine = {
            name: [counts[rank] if rank < len(counts) else 0 for rank in ranks]
            for name, counts in events.items()
        }
        here = dataclasses.replace(setting, topology=setup.make_topology(cell, part))
        total += setup.predicted_traffic(strategy, shapes_of(held), mine, here).moved(ranks)

    one = parallel.predicted_traffic(
        workload,
        layers,
        batch,
        size=cell.model_parallel,
        itemsize=itemsize,
        clip=setting.clip and clips_inside(strategy, setting),
        backend=cell.backend,
    )
    acting = Traffic()

    if acted_on is not None:
        acting = parallel.predicted_inference(
            workload, layers, acted_on, size=cell.model_parallel, itemsize=itemsize
        )

    for replica in range(cell.replicas):
        ranks = placement.ranks_of_replica(cell, replica)
        times = [count(events, name, ranks[0]) for name in ("gradients", "inferences")]
        total += (one.times(times[0]) + acting.times(times[1])).moved(ranks)

    return total


def part_shapes(cell: Cell, workload: Workload) -> list[Shapes]:
    """What each part of a replica holds."""
    pieces = setup.make_parallel(cell).pieces(workload, meta_layers(workload), cell.model_parallel)
    return [shapes_of(held) for held in pieces]


def clips_inside(strategy: Strategy, setting: Setting) -> bool:
    """Whether workers clip, and so ask their replica for its norm: a server of means does it
    itself.
    """
    return not (setting.num_servers and strategy.clips_mean)


def expected_events(cell: Cell, workload: Workload, events: Events, num_batches: int) -> Events:
    """Events of an undisturbed run, by rank on the replica axis -> by world rank.

    A policy acts in every step of a rollout and at its end (one that is made whole for a rollout
    sends once); that an episode runs out of time, when it acts once more, is not foreseen.
    """
    ranks = [placement.replica_and_part(cell, rank)[0] for rank in range(cell.num_workers)]
    servers = range(cell.replicas, cell.replicas + cell.num_servers)
    at = [*ranks, *servers]
    spread = {
        name: [counts[i] if i < len(counts) else 0 for i in at] for name, counts in events.items()
    }
    acting: Any = workload
    steps = acting.rollout_steps if workload.collects else 0
    times = 1 if setup.make_parallel(cell).acts_whole else steps + 1
    inferences = (
        {"inferences": [times * played for played in spread["rollouts"][: cell.num_workers]]}
        if steps
        else {}
    )
    return {**spread, "gradients": [num_batches] * cell.num_workers, **inferences}


def meta_layers(workload: Workload) -> list[nn.Module]:
    """The chain with shapes and no memory."""
    with torch.device("meta"):
        return workload.layers()


def example(
    workload: Workload, layers: Sequence[nn.Module], replicas: int
) -> tuple[Batch, Tensor | None]:
    """A replica's share of a batch, and what its policy sees at once (None where nobody acts),
    on the meta device.
    """
    seen: list[Tensor] = []

    if not workload.collects:
        batch: Batch = workload.batch(0, shard=0, num_shards=replicas)
    else:
        chain = nn.Sequential(*layers)

        def act(x: Tensor) -> Tensor:
            seen.append(x.to("meta"))
            return torch.zeros(chain(seen[0]).shape)

        batch = rollouts.example(workload, act, num_shards=replicas)

    x, y = (mapped(value, lambda tensor: tensor.to("meta")) for value in (batch.x, batch.y))
    return Batch(x, y, batch.num_samples), seen[0] if seen else None


def digests(training: Training) -> dict[int, str]:
    """sha256 of the parameters that this rank holds, by part: those of a worker are one part's,
    a server's all.
    """
    if training.served is not None:
        held = [(part, each.part) for part, each in enumerate(training.served.trainings)]
    else:
        held = [
            (training.replica.replica.part if training.replica is not None else 0, training.part)
        ]

    return {number: checksum(part.params) for number, part in held}


def derive_inside(training: Training, events: Mapping[str, int]) -> Traffic:
    """What the library sent in a run with these events of this rank, by world rank: from one more
    gradient and, where a policy acted, one more inference, watched here.

    Called on all parts of all replicas; the gradient is lost.

    The library's collectives are noted by part 0, messages from point to point by their sender.
    """
    part = training.replica
    acted_on = training.acted_on
    assert part is not None
    batch = training.fetch((0, training.comm.rank, training.topology.num_workers))
    backend = training.cell.backend
    traffic = watched(part, lambda: part.gradient(batch), backend).times(events["gradients"])
    if acted_on is not None:
        traffic += watched(part, lambda: part.infer(acted_on), backend).times(events["inferences"])
    return traffic


def watched(part: PartOfReplica, call: Callable[[], object], backend: str) -> Traffic:
    """What the library sends in a call, from this rank.

    What goes through our comm is seen too, and counted there.
    """
    comm = part.replica.comm
    before = comm.traffic + Traffic()
    with TrafficMode() as seen:
        call()
    seen_bytes = derive(seen.calls, comm.size, rank=comm.rank, backend=backend).moved(
        comm.world_ranks
    )
    return seen_bytes.minus(comm.traffic.minus(before))
