"""Replicas that several ranks hold together (`pipeline`, `tensor`, `fsdp`), their servers and
traffic.

Every part of a replica agrees with the same part of the other replicas, over a comm of their own. A
strategy of the replica axis so sees one part's vector, and does not know of the others.

A server owns slice j of every part's vector and serves each part in a thread of its own, with its
own comm. Where a mean gradient is clipped, these threads add up its norm.
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

    Every rank of the run calls it, because process groups are made together: one for each part
    (over replicas), and one for each replica (over its parts).
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

    # A worker: one part of one replica.
    replica, number = placement.replica_and_part(cell, world.rank)
    comm = comms[replica]
    mine = outer[number]
    assert comm is not None and mine is not None
    # The library's group and our comm join the same ranks: each sends its own things.
    joined = Replica(comm, groups[replica], devices.current(cell))
    part: PartOfReplica = setup.make_part(cell, workload, joined)
    training = setup.assemble(cell, mine, workload, recipe, part, wrap=wrap, number=number)
    training.replica = part

    return training


# -- servers ---------------------------------------------------------------------------------------


class HeldPart(Part):
    """A part's vector on a server, which steps it and computes nothing with it."""

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
    """Adds up one float64 of each part, for the threads of a server that serve them.

    The sum is made in the order of the parts, so all threads get the same bits.
    """

    num_parts: int
    _values: list[float] = field(init=False)
    _barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self._values = [0.0] * self.num_parts
        self._barrier = threading.Barrier(self.num_parts)

    def __call__(self, part: int, value: float) -> float:
        """Gives this part's value and returns the sum over all parts, once all have given
        theirs.
        """
        self._values[part] = value
        self._barrier.wait()
        total = sum(self._values)
        self._barrier.wait()  # nobody writes the next one before all have read

        return total

    def abort(self) -> None:
        """Lets go of those who wait for a thread that has failed; they get BrokenBarrierError."""
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
    """The training of every part, on a server; that of part 0 is returned and knows the others.

    Only part 0 is wrapped, because one part's timings are what the server reports.
    """
    dtype = setup.DTYPES[cell.precision]
    layers = seeded_layers(workload, cell.seed)
    parameters = trained_parameters(nn.Sequential(*layers).to(dtype))
    pieces = setup.make_parallel(cell).pieces(workload, layers, cell.model_parallel)
    total = PartSum(len(pieces))
    served = []

    for number, (comm, held) in enumerate(zip(comms, pieces, strict=True)):
        comm.traffic = Traffic()  # each thread counts for itself; `Served.serve` adds them up
        part = HeldPart(held, cut(parameters, held))
        wrapped = wrap if number == 0 else None
        training = setup.assemble(cell, comm, workload, recipe, part, wrap=wrapped, number=number)
        topology = training.topology
        assert isinstance(topology, ParameterServer)
        # Copies of other parts' elements lie behind the owned ones, and do not count in the norm.
        start, stop = topology.slice_of(topology.server, part.params.numel())
        owned = max(0, min(part.num_owned, stop) - start)
        topology.one_of_parts(owned, partial(total, number))
        served.append(training)

    first = served[0]
    first.served = Served(served, total, world)
    return first


@dataclass
class Served:
    """What a server of model-parallel replicas serves: all parts, each in a thread."""

    trainings: Sequence[Training]  # one per part
    total: PartSum
    world: Comm

    def serve(self, on_update: Update | None) -> ServerLog:
        """Serves until every worker has said goodbye.

        Returns the log of part 0, which is like the others.

        Where a thread fails, the others are let go, and its error is raised here.
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
            # A broken barrier is what the other threads meet when one has failed: not the cause.
            causes = [
                error for error in errors if not isinstance(error, threading.BrokenBarrierError)
            ]
            raise (causes or errors)[0]

        for training in self.trainings:
            self.world.traffic.include(training.comm.traffic)
        assert logs[0] is not None
        return logs[0]


# -- traffic ---------------------------------------------------------------------------------------


def predicted(
    cell: Cell, workload: Workload, strategy: Strategy, events: Events, setting: Setting
) -> Traffic:
    """Traffic of a whole run, by world rank: between replicas, and inside of every replica.

    Between replicas each part has its own agreement, on its own shapes. Inside, a replica sends
    what its parallelism says for each gradient, and for each time that its policy acts.
    """
    parallel = setup.make_parallel(cell)
    layers = meta_layers(workload)
    itemsize = setting.itemsize
    # Shapes are enough: nothing below computes on memory.
    batch, acted_on = example(workload, layers, cell.replicas)
    total = Traffic()

    for part, held in enumerate(parallel.pieces(workload, layers, cell.model_parallel)):
        ranks = placement.ranks_of_part(cell, part)
        # Events of the ranks that hold this part, by their rank on the replica axis.
        mine = {name: [count(events, name, rank) for rank in ranks] for name in events}
        here = dataclasses.replace(setting, topology=setup.make_topology(cell, part))
        total += setup.predicted_traffic(strategy, shapes_of(held), mine, here).moved(ranks)

    # One gradient of one replica, from part to part.
    one = parallel.predicted_traffic(
        workload,
        layers,
        batch,
        size=cell.model_parallel,
        itemsize=itemsize,
        clip=setting.clip and clips_inside(strategy, setting),
        backend=cell.backend,
    )

    # One inference of one replica: where nobody acts it sends nothing.
    acting = Traffic()
    if acted_on is not None:
        acting = parallel.predicted_inference(
            workload, layers, acted_on, size=cell.model_parallel, itemsize=itemsize
        )

    for replica in range(cell.replicas):
        ranks = placement.ranks_of_replica(cell, replica)
        num_gradients = count(events, "gradients", ranks[0])  # the same on all its parts
        num_inferences = count(events, "inferences", ranks[0])
        total += (one.times(num_gradients) + acting.times(num_inferences)).moved(ranks)

    return total


def part_shapes(cell: Cell, workload: Workload) -> list[Shapes]:
    """Names and shapes of what each part of a replica holds."""
    pieces = setup.make_parallel(cell).pieces(workload, meta_layers(workload), cell.model_parallel)
    return [shapes_of(held) for held in pieces]


def clips_inside(strategy: Strategy, setting: Setting) -> bool:
    """Whether workers clip, and so ask all parts of their replica for the norm.

    They do not where a server clips the mean: it adds up the norm by itself.
    """
    return not (setting.num_servers and strategy.clips_mean)


def expected_events(cell: Cell, workload: Workload, events: Events, num_batches: int) -> Events:
    """Events of an undisturbed run: given by rank of the replica axis, returned by world rank.

    A policy acts in every step of a rollout and once at its end; one that gathers its parameters
    for a rollout sends once. It acts once more where an episode runs out of time, which nobody can
    foresee.
    """
    ranks = [placement.replica_and_part(cell, rank)[0] for rank in range(cell.num_workers)]
    servers = range(cell.replicas, cell.replicas + cell.num_servers)

    # World rank -> the rank on the replica axis whose events it repeats.
    repeated = [*ranks, *servers]
    spread = {name: [count(events, name, rank) for rank in repeated] for name in events}

    acting: Any = workload  # `rollout_steps` is of a workload that collects
    steps = acting.rollout_steps if workload.collects else 0
    inferences = {}

    if steps:
        sends_per_rollout = 1 if setup.make_parallel(cell).acts_whole else steps + 1
        played = spread["rollouts"][: cell.num_workers]
        inferences = {"inferences": [sends_per_rollout * rollouts for rollouts in played]}

    return {**spread, "gradients": [num_batches] * cell.num_workers, **inferences}


def meta_layers(workload: Workload) -> list[nn.Module]:
    """The workload's layers with shapes and without memory."""
    with torch.device("meta"):
        return workload.layers()


def example(
    workload: Workload, layers: Sequence[nn.Module], replicas: int
) -> tuple[Batch, Tensor | None]:
    """A replica's share of a batch, and what its policy sees at once, both on the meta device.

    The second is None where nobody acts.
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

    def to_meta(tensor: Tensor) -> Tensor:
        return tensor.to("meta")

    x = mapped(batch.x, to_meta)
    y = mapped(batch.y, to_meta)
    return Batch(x, y, batch.num_samples), seen[0] if seen else None


def digests(training: Training) -> dict[int, str]:
    """The sha256 of the parameters that this rank holds, by part.

    A worker holds one part, a server a slice of all of them.
    """
    if training.served is not None:
        held = [(part, each.part) for part, each in enumerate(training.served.trainings)]
    else:
        number = training.replica.replica.part if training.replica is not None else 0
        held = [(number, training.part)]

    return {part: checksum(holder.params) for part, holder in held}


def derive_inside(training: Training, events: Mapping[str, int]) -> Traffic:
    """What the library sent inside this rank's replica in a run with these events, by world rank.

    It is watched during one more gradient and, where a policy acted, one more inference. Called on
    all parts of all replicas; the gradient is lost. The library's collectives are noted by part 0,
    messages from point to point by their sender.
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
    """What the library sends during a call, as this rank sees it.

    What goes through our own comm is seen too, but is counted there already, and so is taken off.
    """
    comm = part.replica.comm
    before = comm.traffic + Traffic()  # a copy: the call counts into the comm's own
    with TrafficMode() as seen:
        call()
    derived = derive(seen.calls, comm.size, rank=comm.rank, backend=backend)
    counted = comm.traffic.minus(before)
    return derived.moved(comm.world_ranks).minus(counted)
