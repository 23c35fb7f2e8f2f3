"""Traffic of library collectives: from calls through `Comm`, or as a dispatch mode sees them.

Our own strategies call the library through `Comm`, which notes every call of the whole run. `ddp`
calls it by itself: a dispatch mode sees every operation of c10d with its tensors, but slows every
operator. So it watches untimed steps after the run, one of each kind, and the result is multiplied.

What is seen are calls and sizes; bytes follow from the algorithm's factor (a ring all-reduce of M
bytes sends 2 (N-1) M in all). Such bytes are `derived`: they are held against the wire, never
against the prediction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchsuite.comm import Traffic
from benchsuite.comm.traffic import Calls
from benchsuite.sync import Cycle
from benchsuite.topology import collective_traffic


@dataclass(frozen=True)
class Call:
    """One call of the library, by its largest tensor.

    name: in the c10d namespace. numel, itemsize: elements and bytes per element; of a gather or a
    scatter those of the whole vector. peer: whom a `send` goes to, in ranks of its group.
    """

    name: str
    numel: int
    itemsize: int
    peer: int = -1


# What c10d, torch's layer of collectives, calls one -> the collective whose cost it has.
KINDS = {
    "allreduce": "all_reduce",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "broadcast": "broadcast",
}

# Functional collectives, which DTensor calls -> what c10d calls the same.
FUNCTIONAL = {
    "all_reduce": "allreduce",
    "all_gather_into_tensor": "allgather",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast": "broadcast",
}


# Functional operators that only wait, or tie a result to autograd.
SENDS_NOTHING = ("wait_tensor", "_wrap_tensor_autograd")


class TrafficMode(TorchDispatchMode):
    """Sees the library's calls: `with TrafficMode() as seen: step()`, then `seen.calls`.

    A mode belongs to its thread. What a communication hook starts when something has arrived, it
    starts on a thread of the backend's, by `torch.distributed.all_reduce`: that function is watched
    there. So DDP's bucket all-reduces are seen too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.calls: list[Call] = []
        self._thread = threading.get_ident()
        # What stands there while nobody watches.
        self._all_reduce = dist.all_reduce

    def __enter__(self) -> TrafficMode:
        if dist.is_initialized():  # there is a default group: this process is one rank
            dist.all_reduce = self._elsewhere
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        dist.all_reduce = self._all_reduce

    def _elsewhere(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `torch.distributed.all_reduce`, and notes calls of other threads."""
        if threading.get_ident() != self._thread:
            self.calls.append(Call("allreduce", tensor.numel(), tensor.element_size()))
        return self._all_reduce(tensor, *args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it takes the operator apart, and comes back with plain tensors

        name = func.overloadpacket.__name__.rstrip("_")

        if func.namespace == "c10d" and name != "recv":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            largest = max(tensors, key=lambda t: t.numel() * t.element_size(), default=None)

            if largest is not None:
                peer = args[2] if name == "send" else -1
                self.calls.append(Call(name, largest.numel(), largest.element_size(), peer))
        elif func.namespace == "_c10d_functional" and name not in SENDS_NOTHING:
            shard = args[0]
            # A gather is given one rank's shard, and the size of the group as its second argument.
            num_shards = args[1] if name.startswith("all_gather") else 1
            collective = FUNCTIONAL.get(name, name)
            self.calls.append(Call(collective, shard.numel() * num_shards, shard.element_size()))

        return func(*args, **(kwargs or {}))


def derived_run(step: Callable[[], object], cycles: Sequence[Cycle], num_ranks: int) -> Traffic:
    """Traffic of a whole run, from one cycle of each kind of step, watched."""
    traffic = Traffic()

    for cycle in cycles:
        if not cycle.times:
            continue

        cycle.rewind()

        with TrafficMode() as seen:
            for _ in range(cycle.steps):
                step()

        traffic += derive(seen.calls, num_ranks).times(cycle.times)

    return traffic


def derived_total(calls: Calls) -> Traffic:
    """Traffic of a whole run's collectives, by world rank, from the calls that comms have noted."""
    total = Traffic()

    for (name, numel, itemsize, ranks), times in calls.items():
        one = derive([Call(name, numel, itemsize)], len(ranks)).moved(ranks)
        total = total + one.times(times)

    return total


def derive(calls: list[Call], num_ranks: int, *, rank: int = 0, backend: str = "gloo") -> Traffic:
    """Traffic of one step from the calls that a rank was seen to make.

    These are its own sends and, on rank 0, the collectives of all ranks. An all-reduce is a ring.
    On gloo a reduce-scatter costs as much as one, on nccl half of it. `numel` of a gather or
    scatter is that of the whole vector. ValueError for a call whose cost is not known.
    """
    traffic = Traffic()

    for call in calls:
        if call.name == "send":
            traffic.add(rank, call.peer, call.numel * call.itemsize)
            continue

        if rank:  # a collective is noted once for all its ranks, on the first of them
            continue

        if call.name in KINDS:
            traffic += collective_traffic(
                KINDS[call.name], call.numel, call.itemsize, num_ranks, backend=backend
            )
        elif call.name not in ("barrier", "monitored_barrier"):
            raise ValueError(
                f"c10d::{call.name}: its cost on the wire is not known; add it to derive()"
            )

    return traffic
