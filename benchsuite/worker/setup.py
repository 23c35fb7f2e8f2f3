"""One rank's pieces, put together from a cell: workload, part, topology, compression, strategy.

The worker measures around what is built here, and the laws compare what comes out of it: both use
this file, so that what is proved is what is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import new_class
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.errors import UsageError
from benchsuite.parallel import Parallel, PartOfReplica
from benchsuite.parallel.replica import Replica
from benchsuite.plan import declared, placement, plugins
from benchsuite.plan.cell import Cell, global_batch
from benchsuite.sync import Events, Setting, Strategy, Work
from benchsuite.topology import Graph, Topology
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.topology.server_log import ServerLog
from benchsuite.update import state_vectors
from benchsuite.worker import devices, rollouts
from benchsuite.worker.rollouts import Batches
from benchsuite.workload import (
    Batch,
    Part,
    Recipe,
    Shapes,
    Workload,
    global_random_state,
    micro_batches,
)

# precision -> the type of parameters, gradients and optimiser state, and so of what travels. With
# bf16 all of these stay float32: only the forward pass and the loss run under autocast.
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32}


@dataclass
class Training:
    """What one rank works with; every piece is started."""

    cell: Cell
    comm: Comm
    workload: Workload
    recipe: Recipe
    part: Part
    topology: Topology
    compression: Compression
    strategy: Strategy
    batches: Batches
    # This rank's part of a replica that several ranks hold. `comm` then joins the same parts of all
    # replicas.
    replica: PartOfReplica | None = None
    acted_on: Tensor | None = None  # what the policy of such a replica saw last
    num_inferences: int = 0  # of that policy, those that sent something
    _num_acts: int = 0
    served: Any = None  # on a server of model-parallel replicas: `model_parallel.Served`

    @property
    def is_server(self) -> bool:
        """Whether this rank owns a slice of the parameters instead of computing gradients."""
        return self.comm.rank >= self.topology.num_workers

    @property
    def owns_snapshots(self) -> bool:
        """Whether this rank's `snapshot` is (a slice of, or a term of) the parameters that
        count.
        """
        owned_by = self.strategy.snapshot_of
        if self.is_server:
            return owned_by == "servers"

        return owned_by == "mean" or (owned_by == "replica" and self.comm.rank == 0)

    @property
    def setting(self) -> Setting:
        """What predictions about this training depend on besides shapes and events."""
        return setting(self.cell, self.topology, self.compression, self.recipe)

    @property
    def samples_per_push(self) -> float:
        """Samples that a server counts for each push."""
        return self.recipe.global_batch * self.batches.per_push / self.topology.num_workers

    def fetch(self, work: Work) -> Batch:
        """What this worker computes next: a batch of data, or what it collects by acting now."""
        if self.replica is None:
            return self.batches.fetch(work, self.part.infer)

        index, shard, num_shards = work
        # Slice `my_shard` of `num_slices` of the global batch is what this rank reads.
        my_shard, num_slices = self.replica.share(shard, num_shards)
        if not self.batches.collects:
            return self.batches.fetch((index, my_shard, num_slices), self.part.infer)

        # The parts act in lock-step: they play the same rollout, then each takes its share of it.
        before = self._num_acts
        with self.replica.whole():
            batch = self.batches.fetch(work, self._act)
        acted = self._num_acts - before
        # A whole policy has gathered its parameters once, and sends nothing when it acts again.
        self.num_inferences += min(acted, 1) if self.replica.acts_whole else acted

        slices_per_replica = num_slices // num_shards
        pieces = micro_batches(batch, slices_per_replica)
        return pieces[my_shard - shard * slices_per_replica]

    def _act(self, x: Tensor) -> Tensor:
        """The policy of a model-parallel replica: counts how often it acts, and keeps what it
        saw.
        """
        self.acted_on = x
        self._num_acts += 1

        return self.part.infer(x)

    def serve(self, on_update: Callable[[int, int], None] | None = None) -> ServerLog:
        """The life of a server rank, until every worker has said goodbye.

        on_update: called with samples and version after each update.
        """
        if self.served is None:
            return self.serve_alone(on_update)

        log: ServerLog = self.served.serve(on_update)
        return log

    def serve_alone(self, on_update: Callable[[int, int], None] | None = None) -> ServerLog:
        """Serves one vector: the parameters, or those of one part of model-parallel replicas."""
        assert isinstance(self.topology, ParameterServer)
        shard = self.shard()
        policy = self.strategy.policy()
        assert policy is not None

        return self.topology.serve(
            shard,
            lambda: self.strategy.make_updater(shard),
            policy,
            samples_per_push=self.samples_per_push,
            num_pushes=self.strategy.num_pushes(),
            clip_norm=self.recipe.clip_norm if self.strategy.clips_mean else None,
            on_update=on_update,
            survives=self.strategy.survives == "worker",
        )

    def events(self, log: ServerLog | None) -> dict[str, int]:
        """This rank's counts, by name: a server's are its updates and what its policy counted."""
        if log is not None and self.replica is None:
            return {"updates": log.version, **log.events}

        mine = {**self.strategy.events, **self.batches.events}

        if self.replica is not None:
            mine["gradients"] = self.replica.num_gradients
            if self.batches.collects:
                mine["inferences"] = self.num_inferences

        return mine

    def shard(self) -> Tensor:
        """A server's slice of the parameters."""
        assert isinstance(self.topology, ParameterServer)
        start, stop = self.topology.slice_of(self.topology.server, self.part.params.numel())

        return self.part.params[start:stop]


def make(kind: str, reference: str, options: Mapping[str, Any]) -> Any:
    """An instance of a member with its options.

    kind: the axis. reference: a name, or the path of a user's file.
    """
    loaded: Any = plugins.load(kind, reference)
    return complete(kind, loaded)(**options)


# The class that a plug-in's class inherits from, by kind: what is optional has its default there.
BASES: Mapping[str, type[Any]] = {
    "workload": Workload,
    "parallel": Parallel,
    "sync": Strategy,
    "topology": Topology,
    "compression": Compression,
}


@cache
def complete(kind: str, found: Any) -> Any:
    """The class of a member with all defaults of its kind.

    A user's file may leave the base class out; it gets the defaults all the same.
    """
    base: Any = BASES[kind]
    # Its author left out the base class that would tell, so a method tells a graph instead.
    if kind == "topology" and hasattr(found, "neighbours"):
        base = Graph
    if base in found.__mro__:
        return found

    return new_class(found.__name__, (found, base))


def make_parallel(cell: Cell) -> Any:
    """How the cell's replicas compute their gradients."""
    return make("parallel", cell.parallel, options_for(cell, "parallel"))


def is_model_parallel(cell: Cell) -> bool:
    """Whether a replica is held by several ranks (`model_parallel.py`), or by one in such a
    form.
    """
    says = declared.of("parallel", cell.parallel)
    assert isinstance(says, declared.Parallel)

    return says.divides


def start_workload(cell: Cell) -> Workload:
    """The workload with its data and its random streams.

    UsageError where its options do not fit.
    """
    workload = make_workload(cell)

    try:
        with global_random_state:
            workload.start(seed=cell.seed, dtype=DTYPES[cell.precision])
    except (ValueError, OSError) as error:
        # Its options do not fit, or its data are not where they should be.
        raise UsageError(f"workload = {plugins.stem(cell.workload)}: {error}") from error

    return workload


def make_topology(cell: Cell, part: int = 0) -> Any:
    """The cell's topology or graph, not started.

    A topology that looks at hosts is told where its ranks are. part: it joins the ranks that hold
    this part of a replica.
    """
    topology = make("topology", cell.topology, options_for(cell, "topology"))

    if topology.by_host:
        hosts = placement.hosts(cell)
        topology.place([hosts[rank] for rank in placement.ranks_of_part(cell, part)])

    return topology


def make_workload(cell: Cell) -> Workload:
    """The workload with the cell's options and the cell's global batch; not started."""
    plugin = plugins.find("workload", cell.workload)
    options = dict(cell.options.get(plugin.name, {}))
    if "global_batch" in options:
        options["global_batch"] = global_batch(cell)
    workload: Workload = make("workload", cell.workload, options)
    return workload


def make_recipe(cell: Cell, workload: Workload) -> Recipe:
    """The workload's recipe with the cell's batch, budget and learning-rate factor."""
    assert cell.budget.samples is not None, "resolve the cell first"
    recipe = workload.recipe()
    factor = cell.lr_factor

    def scaled_lr(progress: float) -> float:
        return factor * recipe.lr(progress)

    return dataclasses.replace(
        recipe,
        lr=recipe.lr if factor == 1 else scaled_lr,
        global_batch=global_batch(cell),
        budget=cell.budget.samples,
    )


def options_for(cell: Cell, kind: str) -> Mapping[str, Any]:
    """The cell's options of its member on this axis."""
    return cell.options.get(plugins.stem(getattr(cell, kind)), {})


def setting(cell: Cell, topology: Topology, compression: Compression, recipe: Recipe) -> Setting:
    """What predictions depend on besides shapes and events."""
    return Setting(
        num_workers=cell.replicas,
        num_servers=cell.num_servers,
        itemsize=DTYPES[cell.precision].itemsize,
        topology=topology,
        compression=compression,
        clip=recipe.clip_norm is not None,
        state_vectors=partial(state_vectors, recipe),
        **_of_rollouts(cell),
    )


def _of_rollouts(cell: Cell) -> dict[str, int]:
    """What workers that act send besides gradients, for `Setting`; {} where nobody acts."""
    if not plugins.find("workload", cell.workload).constants.get("collects"):
        return {}

    workload: Any = make_workload(cell)
    strategy = make("sync", cell.sync, options_for(cell, "sync"))
    length = strategy.batches_per_trajectory

    if not length:
        # Replicas that hold the same parameters normalise their advantages together.
        return {"agreed_batches": workload.per_rollout if rollouts.agrees(strategy) else 0}

    shape = workload.trajectory_shape(
        length, num_shards=cell.replicas, dtype=DTYPES[cell.precision]
    )
    return {"trajectory_bytes": shape.num_bytes}


def make_strategy(cell: Cell, workload: Any) -> Strategy:
    """The cell's strategy, not started. One that takes trajectories is told what they look like."""
    strategy: Any = make("sync", cell.sync, options_for(cell, "sync"))
    length = strategy.batches_per_trajectory

    if length:
        strategy.expect(
            workload.trajectory_shape(
                length, num_shards=cell.replicas, dtype=DTYPES[cell.precision]
            )
        )

    made: Strategy = strategy
    return made


def predicted_traffic(
    strategy: Strategy, shapes: Shapes, events: Events, described: Setting
) -> Traffic:
    """What the ranks of the replica axis send in a whole run: as the strategy, and about
    rollouts.
    """
    return strategy.predicted_traffic(shapes, events, described) + rollouts.predicted_traffic(
        events, described
    )


def expected_events(
    strategy: Strategy, workload: Workload, num_batches: int, described: Setting
) -> Events:
    """Events of an undisturbed run over so many global batches."""
    expected = strategy.expected_events(num_batches, described)
    return {**rollouts.expected_events(workload, num_batches, described), **expected}


def assemble(
    cell: Cell,
    comm: Comm,
    workload: Workload,
    recipe: Recipe,
    part: Part,
    *,
    wrap: Callable[[Part, int], Part] | None = None,
    number: int = 0,
) -> Training:
    """Topology, compression and strategy of the replica axis around a part, all started.

    comm: of this axis. wrap: puts something between strategy and part, e.g. a clock. number: of the
    part, where replicas are model parallel.
    """
    # Each piece is started before the one that works with it.
    topology = make_topology(cell, number)
    topology.start(comm, num_servers=cell.num_servers)
    compression: Compression = make(
        "compression", cell.compression, options_for(cell, "compression")
    )
    compression.start(part.shapes, seed=cell.seed)
    # A server decodes what workers push, so it has to know their codec.
    if cell.compression != "none" and isinstance(topology, ParameterServer):
        topology.use_compression(compression, part.shapes, part.params.dtype)
    if wrap is not None:
        part = wrap(part, comm.rank)
    strategy = make_strategy(cell, workload)
    if strategy.goes_on:
        part.goes_on = True
    strategy.start(comm, part, recipe, topology, compression)

    # Made after the strategy, on every rank: making it may make a process group.
    batches = Batches(
        workload,
        comm,
        num_workers=topology.num_workers,
        strategy=strategy,
        device=part.params.device,
    )
    return Training(cell, comm, workload, recipe, part, topology, compression, strategy, batches)


def build_part(
    cell: Cell, *, before_model: Callable[[], None] = lambda: None
) -> tuple[Workload, Part]:
    """A started workload and this rank's part of its model.

    before_model: called once the data are there, so that the model's memory can be told apart.
    """
    workload = start_workload(cell)
    before_model()

    return workload, make_part(cell, workload)


def make_part(cell: Cell, workload: Workload, replica: Replica | None = None) -> Any:
    """This rank's part of the model of a started workload, whose data go to the rank's device."""
    device = devices.current(cell)
    place(workload, device)
    # Only a parallelism that declares `autocast` takes the argument; rules refuse bf16 elsewhere.
    precision = {"autocast": True} if cell.precision == "bf16" else {}

    return make_parallel(cell).build(
        workload, replica, seed=cell.seed, dtype=DTYPES[cell.precision], device=device, **precision
    )


def place(workload: Workload, device: torch.device) -> None:
    """Moves data that can stay on a device there, where the rank has one."""
    if device.type != "cpu":
        workload.place(device)


def seed_rank(seed: int, rank: int) -> None:
    """Gives this rank random numbers of its own (dropout), the same in every run of the cell.

    A word of 32 bits: torch's CPU generator keeps no more of a seed.
    """
    word = np.random.SeedSequence([seed, rank]).generate_state(1)[0]
    torch.manual_seed(int(word))


def gather_events(per_rank: Sequence[Mapping[str, int]]) -> Events:
    """Turns one mapping per rank into one list per name, 0 where a rank counted nothing."""
    names = sorted({name for events in per_rank for name in events})
    return {name: [events.get(name, 0) for events in per_rank] for name in names}
