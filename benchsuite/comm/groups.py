"""Process groups of our own: `World` says what they are made from, `make_group` makes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchsuite.errors import UsageError


@dataclass(frozen=True)
class World:
    """What new process groups are made from. Every rank has one.

    It is made once, at the start of a rank; all its groups share the store and the time-out.
    """

    store: Any  # torch.distributed.Store: this rank's client for rendezvous and counters
    connect: Callable[[], Any]  # makes a new client of the same store
    backend: str = "gloo"
    interface: str = "lo"
    timeout_s: float = 60.0
    strict: str = ""

    # Whose memory the backend moves.
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    # Whether vectors may be in the other memory, and are copied on their way.
    staged: bool = field(default_factory=torch.cuda.is_initialized)

    # gloo's device, with the thread that watches its sockets; None = every group has its own
    transport: Any = None


def prefixed(store: Any, prefix: str) -> Any:
    """A view of the part of a store whose keys begin with `prefix`.

    torch's own stores are wrapped; one of ours knows how to do it itself.
    """
    own = getattr(store, "prefixed", None)
    return own(prefix) if own is not None else dist.PrefixStore(prefix, store)


def make_group(world: World, name: str, rank: int, size: int) -> dist.ProcessGroup:
    """A process group of its own, outside torch's global table; UsageError for another backend.

    That table holds one world per process. Outside of it the ranks may be threads of one process,
    and a subset of them may make a group without the others.
    """
    store = prefixed(world.store, f"group/{name}")
    group = dist.ProcessGroup(store, rank, size)
    timeout = timedelta(seconds=world.timeout_s)

    if world.backend == "nccl":
        # The group's own time-out; torch's default is minutes, in which a run would hang unseen.
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        kind = dist.ProcessGroup.BackendType.NCCL
        backend: Any = dist.ProcessGroupNCCL(store, rank, size, nccl)

    elif world.backend == "gloo":
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
        options._devices = [
            world.transport or dist.ProcessGroupGloo.create_device(interface=world.interface)
        ]

        options._timeout = timeout
        kind = dist.ProcessGroup.BackendType.GLOO
        backend = dist.ProcessGroupGloo(store, rank, size, options)

    else:
        raise UsageError(f"backend {world.backend!r}: process groups are made for gloo and nccl")

    # Both calls: the first names the kind that the group's methods go to, the second fills it.
    group._set_default_backend(kind)
    group._register_backend(world.device, kind, backend)

    return group


def library_group(ranks: Sequence[int]) -> Any:
    """A process group in torch's own table, for libraries that ask for one there.

    Every rank of the default group calls it, in the same order; it means something on `ranks` only.
    """
    return dist.new_group(list(ranks))
