"""When replicas agree: `Strategy`, and `ServerPolicy`, all that a parameter-server strategy
supplies.
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
Work = tuple[int, int, int]  # (global batch index, shard, num_shards)


@dataclass(frozen=True)
class Setting:
    """What a traffic prediction may depend on besides shapes and events."""

    num_workers: int  # replicas: ranks of the sync axis that compute
    num_servers: int
    itemsize: int
    topology: Topology
    compression: Compression
    clip: bool
    state_vectors: Callable[[Shapes], Sequence[int]] = (
        lambda shapes: ()
    )  # lengths of those that the optimiser keeps
    agreed_batches: int = (
        0  # minibatches of a rollout whose advantages workers normalise together (rollouts.py)
    )
    trajectory_bytes: int = 0  # of a trajectory that a worker hands over in the place of a gradient


@dataclass(frozen=True)
class Cycle:
    """Steps of a run whose calls of the library repeat: `times` cycles of `steps` each.

    `rewind` puts the strategy where such a cycle begins.
    """

    times: int
    steps: int = 1
    rewind: Callable[[], None] = lambda: None


class Strategy(Protocol):
    """One file in `sync/`: a dataclass that inherits from this one.

    Its fields are its options; state is created in `start`. What is optional has its default here,
    and a strategy that differs says so with a class attribute, which is no option.
    """

    events: dict[str, int]
    """This rank's counts, by name."""

    survives: str = "none"
    """"worker": the death of a worker does not end the run."""

    timing_free: bool = False
    """Whether the parameters do not depend on who is fast. The virtual clock then trains such a
    cell once, and only times it again under other links and compute times.
    """

    apart: bool = False
    """Whether workers do not step together, so that batches are handed out. A strategy whose
    servers own the parameters is so by itself.
    """

    alone_is_plain: bool = True
    """Whether one worker makes the steps of the plain training loop."""

    state_is_a_bound: bool = False
    """Whether `state_bytes` is an upper bound instead of an exact number."""

    calls_library: bool = False
    """Whether communication goes past `Comm`, by the library's own calls."""

    payload_source: str = ""
    """"counted" or "derived", where the strategy decides it and not its topology."""

    blocked_reason: str | None = None
    """What "blocked" means in a run of this strategy, where it needs a word."""

    batches_per_trajectory: int = 0
    """Global batches that a trajectory stands for, where workers act and hand over trajectories in
    the place of gradients (0 = they do not).
    """

    @property
    def snapshot_of(self) -> str:
        """Whose parameters count: "replica" (any; rank 0's is taken), "servers" (their slices) or
        "mean" (over replicas).
        """

    @property
    def clips_mean(self) -> bool:
        """Whether clipping acts on the mean gradient (synchronous forms) or on each push."""

    @property
    def goes_on(self) -> bool:
        """Whether a replica that diverged goes on to the end of the budget: replicas differ, and
        others wait for it.
        """
        return False

    def expect(self, shape: TrajectoryShape) -> None:
        """Called before `start` where `batches_per_trajectory` > 0: what a trajectory looks
        like.
        """

    def num_threads(self, num_workers: int) -> int:
        """Threads of a server that serve at once, each some of the workers."""
        return 1

    def cycles(self, num_steps: int) -> list[Cycle]:
        """What a run of so many steps was made of, where `calls_library`: by default steps that are
        all alike.
        """
        return [Cycle(num_steps)]

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        """Called on every rank, servers too; `topology` is started."""

    def next_index(self) -> Work | None:
        """What to compute next; None = the budget is used."""

    def step(self, batch: Batch) -> float | None:
        """One gradient, one agreement as far as the strategy asks for it; returns this rank's loss.

        None: the gradient was given up (virtual clock only). Its samples count as used.
        """

    def finish(self) -> None:
        """Drains what is under way and says goodbye."""

    def snapshot(self) -> Tensor:
        """This rank's share of the parameters that count (flat)."""

    def policy(self) -> ServerPolicy | None:
        """What a server does with pushes; None where the strategy needs no server."""
        return None

    def make_updater(self, params: Tensor) -> Steps:
        """How a server steps its slice (the strategy's learning-rate rule is in it)."""

    def num_pushes(self) -> int:
        """Pushes that a server will see in an undisturbed run."""
        return 0

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        """Memory formula: bytes of the vectors that the strategy keeps on a worker (or server),
        beyond parameters, gradient, optimiser state, and what topology and compression keep.
        """

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        """The counts of an undisturbed run over `num_batches` global batches, for a dry run."""

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        """Bytes by (source, destination) of the whole run, from its recorded events."""


def hand_out(comm: Comm, num_workers: int, total: int) -> tuple[int, Work | None]:
    """Takes the next of `total` batches (shards of global batches): its number, and the work; None
    = all are taken.

    Every sample of the budget is used once, whoever is fast.
    """
    number = comm.fetch_add("next batch", 1)

    return number, None if number >= total else (
        number // num_workers,
        number % num_workers,
        num_workers,
    )


def count(events: Events, name: str, rank: int) -> int:
    """events[name][rank], 0 where nothing was recorded."""
    counts = events.get(name, ())
    return int(counts[rank]) if rank < len(counts) else 0
