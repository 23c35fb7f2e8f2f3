"""When replicas agree: `Strategy`, and `ServerPolicy`, all that a parameter-server strategy
supplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.topology import Topology
from benchsuite.topology.policy import Apply, ServerPolicy
from benchsuite.update import Updater
from benchsuite.workload import Batch, Part, Recipe, Shapes

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
    """One file in `sync/`, a dataclass whose fields are its options; state is created in `start`.

    `survives = "worker"` (a class attribute, not an option) says that a worker's death does not end
    the run; `timing_free = True`, that the parameters do not depend on who is fast (then the
    virtual clock trains a cell once, and only times it again under other links and compute times).
    `snapshot_of`: whose parameters count: "replica" (any, rank 0's is taken), "servers" (their
    slices) or "mean" (over replicas). `apart = True`: workers do not step together, batches are
    handed out (a strategy whose servers own the parameters is so by itself). `goes_on = True`:
    replicas differ, so one may diverge while others wait for it: it goes on to the end of the
    budget. `alone_is_plain = False`: one worker is not the plain loop. `batches_per_trajectory` (an
    option): workers act, and hand over trajectories that stand for so many batches. `calls_library
    = True`: past `Comm`; `cycles() -> list[Cycle]` then tells what a run was made of (default:
    steps that are all alike).
    """

    events: dict[str, int]  # this rank's counts
    snapshot_of: str
    clips_mean: bool  # whether clipping acts on the mean (synchronous forms) or on each push

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

    def make_updater(self, params: Tensor) -> Updater:
        """How a server steps its slice (the strategy's learning-rate rule is in it)."""

    def num_pushes(self) -> int:
        """Pushes that a server will see in an undisturbed run."""

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        """Memory formula: bytes of the vectors that the strategy keeps on a worker (or server),
        beyond parameters, gradient, optimiser state, and what topology and compression keep."""

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
