"""When replicas agree: the base class `Strategy`, and what it is given and asked for.

One file in this folder is one strategy. A strategy computes a gradient per step on its replica and
decides when and how replicas agree, by means of a topology. One that uses a parameter server also
supplies a `ServerPolicy`, which is all that a server needs to know of it. The rest of a strategy
are its predictions: events of an undisturbed run, bytes on the wire, bytes of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.topology import Topology
from benchsuite.topology.policy import Apply, ServerPolicy, Steps
from benchsuite.workload import Batch, Part, Recipe, Shapes, TrajectoryShape

__all__ = [
    "Apply",
    "Cycle",
    "Events",
    "ServerPolicy",
    "Setting",
    "Strategy",
    "Work",
    "count",
    "hand_out",
]

# Recorded counts: name -> one number per world rank, e.g. {"pushes": [121, 119, 0]}.
Events = Mapping[str, Sequence[int]]

# What to compute next: (index of the global batch, shard of it, number of shards).
Work = tuple[int, int, int]


@dataclass(frozen=True)
class Setting:
    """What a prediction of traffic or memory may depend on besides shapes and events."""

    num_workers: int
    """Replicas: the ranks of the sync axis that compute."""

    num_servers: int
    """Ranks of the sync axis that are servers."""

    itemsize: int
    """Bytes of one element of the parameters."""

    topology: Topology
    """How vectors travel; not started, but told the hosts of ranks where it asks for them."""

    compression: Compression
    """What is done to vectors before they travel."""

    clip: bool
    """Whether gradients are clipped by their norm."""

    state_vectors: Callable[[Shapes], Sequence[int]] = lambda shapes: ()
    """Gives the lengths of the vectors that the optimiser keeps."""

    agreed_batches: int = 0
    """Minibatches of a rollout whose advantages the workers normalise together."""

    trajectory_bytes: int = 0
    """Bytes of a trajectory that a worker hands over in the place of a gradient."""


@dataclass(frozen=True)
class Cycle:
    """A stretch of a run in which the calls of the library repeat.

    Calls past `Comm` are not counted while the run goes on. Instead one cycle of each kind is made
    once more after it and watched, and what it sent is multiplied by `times`.
    """

    times: int
    """How many such cycles the run had."""

    steps: int = 1
    """Steps of one cycle."""

    rewind: Callable[[], None] = lambda: None
    """Puts the strategy where such a cycle begins."""


class Strategy(Protocol):
    """A strategy: one file in `sync/`, a dataclass that inherits from this class.

    Its fields are its options; state is created in `start`. What is optional has its default here,
    and a strategy that differs says so with a class attribute, which is no option.

    A worker's life is: `start`, then `next_index` and `step` in turn until the budget is used, then
    `finish` and `snapshot`. A server calls `start`, `policy` and `make_updater`, and serves until
    all workers have finished. The last three methods are asked before a run or after it, of an
    instance that may never have been started.
    """

    events: dict[str, int]
    """This rank's counts, by name; what is counted is up to the strategy."""

    survives: str = "none"
    """Whose death does not end the run: "worker", or "none"."""

    timing_free: bool = False
    """Whether the parameters do not depend on who is fast.

    The virtual clock then trains such a cell once, and only times it again under other links and
    compute times.
    """

    apart: bool = False
    """Whether workers step apart, so that batches are handed out to who asks for one.

    A strategy whose servers own the parameters is so by itself.
    """

    alone_is_plain: bool = True
    """Whether a single worker makes exactly the steps of the plain training loop."""

    state_is_a_bound: bool = False
    """Whether `state_bytes` is an upper bound instead of an exact number."""

    calls_library: bool = False
    """Whether communication goes past `Comm`, by calls that the library makes itself."""

    payload_source: str = ""
    """How bytes are known, "counted" or "derived", where the topology does not decide it."""

    blocked_reason: str | None = None
    """What the column "blocked" means in a run of this strategy, where that needs a word."""

    batches_per_trajectory: int = 0
    """Global batches that a trajectory stands for; 0 = workers hand over gradients.

    Where it is above 0 workers only act, and hand over trajectories in the place of gradients.
    """

    @property
    def snapshot_of(self) -> str:
        """Whose parameters are evaluated.

        "replica": all have the same, rank 0's are taken. "servers": those of the servers' slices.
        "mean": the mean over replicas, which differ.
        """

    @property
    def clips_mean(self) -> bool:
        """Whether clipping acts on the mean gradient, or on each replica's own."""

    @property
    def goes_on(self) -> bool:
        """Whether a replica that diverged goes on to the end of the budget.

        It must where replicas differ: the others have not diverged, and wait for it.
        """
        return False

    def expect(self, shape: TrajectoryShape) -> None:
        """Takes the shape of a trajectory.

        Called on every rank before `start`, where `batches_per_trajectory` is above 0.
        """

    def num_threads(self, num_workers: int) -> int:
        """Says how many threads of a server serve at once, each some of the workers."""
        return 1

    def cycles(self, num_steps: int) -> list[Cycle]:
        """Says what a run of so many steps was made of, where `calls_library` is true.

        By default all steps are alike.
        """
        return [Cycle(num_steps)]

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        """Creates the state of a run. Called once on every rank, servers too.

        `comm` has the ranks of the sync axis, `part` is this rank's part of a replica, and
        `topology` is started already.
        """

    def next_index(self) -> Work | None:
        """Says what to compute next; None = the budget is used."""

    def step(self, batch: Batch) -> float | None:
        """Computes one gradient, agrees as far as the strategy asks for it, returns the loss.

        The loss is this rank's own. None means that the gradient was given up, which happens
        under the virtual clock only; its samples count as used.
        """

    def finish(self) -> None:
        """Waits for what is under way, and says goodbye to servers."""

    def snapshot(self) -> Tensor:
        """Gives this rank's share of the parameters that are evaluated, as a flat vector."""

    def policy(self) -> ServerPolicy | None:
        """Makes what a server does with pushes; None where the strategy needs no server."""
        return None

    def make_updater(self, params: Tensor) -> Steps:
        """Makes what steps a server's slice `params`.

        The strategy's rule for the learning rate is in it.
        """

    def num_pushes(self) -> int:
        """Says how many pushes a server will see in an undisturbed run."""
        return 0

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        """Says how many bytes of vectors the strategy keeps on a worker, or on a server.

        Parameters, gradient, optimiser state, and what topology and compression keep are not in
        it.
        """

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        """Gives the counts of an undisturbed run over `num_batches` global batches."""

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        """Predicts the traffic of the whole run from its recorded events.

        The bytes are by (source, destination), ranks of the sync axis.
        """


def hand_out(comm: Comm, num_workers: int, total: int) -> tuple[int, Work | None]:
    """Takes the next of `total` shards of global batches: returns its number, and the work.

    The work is None when all are taken. The counter is shared by all workers, so every sample of
    the budget is used exactly once, whoever is fast.
    """
    number = comm.fetch_add("next batch", 1)

    if number >= total:
        return number, None

    batch = number // num_workers
    shard = number % num_workers
    return number, (batch, shard, num_workers)


def count(events: Events, name: str, rank: int) -> int:
    """Gives events[name][rank], or 0 where nothing was recorded.

    A rank that died has recorded nothing, and a server counts other things than a worker.
    """
    counts = events.get(name, ())
    return int(counts[rank]) if rank < len(counts) else 0
