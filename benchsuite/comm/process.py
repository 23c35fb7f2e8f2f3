"""`ProcessComm`: the `Comm` protocol on torch.distributed process-group objects, under the wall
clock.

It wraps group OBJECTS and never the default group, so that thread ranks (each with its own gloo
group) run the same code as processes. It is the only file that resolves renamed torch.distributed
names. Only this class counts payload; collectives of the library are noted (`calls`), and their
bytes derived (`measure/traffic_mode.py`).

`strict = "nccl"` refuses on gloo what NCCL cannot do, so that CPU tests prove GPU validity: a
receive from any source, two threads on one group, tags other than 0 (NCCL matches in posting order
only), a send behind an open receive from the same rank, and receives posted ahead of their round.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.comm.groups import World, make_group, prefixed
from benchsuite.comm.lane import Lane
from benchsuite.comm.shared_memory import FileLock, attach_vector, create_vector
from benchsuite.comm.socket_barrier import SocketBarrier
from benchsuite.comm.staging import StagedGroup
from benchsuite.comm.traffic import COUNTER_BYTES, TICKET_BYTES, Calls, note
from benchsuite.errors import UsageError

if TYPE_CHECKING:
    from benchsuite.measure.device_time import DeviceTimer

# The `group` of a comm that only hands out tickets: a process that speaks for a dead rank.
NO_GROUP = object()

# gloo asks its peer before it sends. That question is half the time of a message of 40 kB and
# nothing beside one of 13 MB, so only receives up to this size are worth posting early.
EARLY_BYTES = 1 << 20

# The source of a receive from whoever sends first. gloo only: `strict = "nccl"` refuses it.
ANY_SOURCE = -1

# torch 2.13 renamed the two flat collectives; older versions carry the old names.
_ALL_GATHER = (
    "all_gather_single" if hasattr(dist.ProcessGroup, "all_gather_single") else "_allgather_base"
)
_REDUCE_SCATTER = (
    "reduce_scatter_single"
    if hasattr(dist.ProcessGroup, "reduce_scatter_single")
    else "_reduce_scatter_base"
)

_TICKET = struct.Struct("<iqq")  # source, tag, sent_ns
assert _TICKET.size == TICKET_BYTES

Phase = Callable[[str], None]


class StrictError(RuntimeError):
    """A use that gloo accepts and NCCL does not.

    It is raised on gloo under `strict`, so that a test on CPUs fails where a GPU would hang.
    """


class _Work:
    """A torch Work whose waiting time is charged to its comm.

    `source` is the rank that a receive waits for, and -1 for everything else. `wait` may be called
    twice: the open receive is taken off its comm's count by the first call only.
    """

    __slots__ = ("_comm", "_phase", "_source", "_work")

    def __init__(self, comm: ProcessComm, work: Any, phase: str, source: int = -1) -> None:
        self._comm = comm
        self._work = work
        self._phase = phase
        self._source = source

    def wait(self) -> None:
        """Blocks until the operation is done, and closes the receive that it may have been."""
        self._comm._wait(self._work, self._phase)

        if self._source >= 0:
            self._comm._receiving[self._source] -= 1
            self._source = -1


class ProcessComm:
    """The door to other ranks by the wall clock; `Comm` says what its methods promise.

    One thread uses one instance; `lane` gives the second thread its own. So times (`wait_ns`,
    `ticket_wait_ns`) have one writer. Bytes and calls are counted into the rank's, which the
    instances of all its threads share and which are safe for that.

    `world_ranks` and `hosts` name each rank in the run and its host; without them this comm is the
    whole run, on one host. `on_phase` is told what a rank is about to wait for.
    """

    def __init__(
        self,
        world: World,
        *,
        rank: int,
        size: int,
        name: str = "world",
        group: Any = None,  # a ProcessGroup, NO_GROUP, or None = make one
        world_ranks: Sequence[int] = (),
        hosts: Sequence[int] = (),
        traffic: Traffic | None = None,
        calls: Calls | None = None,
        on_phase: Phase | None = None,
    ) -> None:
        # Who this is, and among whom.
        self.rank = rank
        self.size = size
        self.world_ranks: Sequence[int] = tuple(world_ranks) or tuple(range(size))
        self.hosts: Sequence[int] = tuple(hosts) or (0,) * size

        # What the run's report reads.
        self.traffic = traffic if traffic is not None else Traffic()
        self.calls: Calls = calls if calls is not None else {}
        self.wait_ns = 0
        self.ticket_wait_ns = 0  # a server's time without work

        # nccl pairs a send with a receive in posting order, so a receive posted ahead of its round
        # would take another message.
        self.posts_ahead = world.backend == "gloo" and not world.strict
        self.early_bytes = EARLY_BYTES if self.posts_ahead and group is not NO_GROUP else 0

        # A group of its own. The name tells the ranks that make it together where to meet.
        self._world = world
        self._name = name
        self._group = group if group is not None else make_group(world, name, rank, size)

        # Where vectors may be on a device and the backend on the host, copies travel.
        if world.staged and group is not NO_GROUP:
            self._group = StagedGroup(self._group, world.device)

        # On a GPU nccl's `wait` returns at once and only its stream waits: the clock of the host
        # sees nothing of it, so a timer of the device measures instead.
        self.timer: DeviceTimer | None = None

        # The store, and names in it that all ranks make alike because they count alike.
        self._store = prefixed(world.store, f"comm/{name}")
        self._ticket_client: Any = None
        self._splits = 0  # groups of ranks made so far
        self._num_made = 0  # shared vectors and locks made so far
        # Ranks of one host have a faster barrier, made when it is first needed.
        self._on_one_host = False  # whether this is a split of ranks that share a host
        self._sockets: SocketBarrier | None = None
        self._kept: list[Any] = []  # shared memory that must outlive its tensors
        # What `strict` checks: the one thread that may use the group, and the receives from each
        # source that are posted and not waited for.
        self._owner: int | None = None
        self._receiving = [0] * size
        self._on_phase = on_phase
        self._lane: Lane | None = None

    @property
    def device(self) -> torch.device:
        """The device whose memory the backend moves: a GPU under nccl, the CPU under gloo."""
        return self._world.device

    def lane_comm(self) -> ProcessComm:
        """A comm of the same ranks with a group of its own, for the second lane's thread.

        Two threads on one group would interleave their operations differently on every rank.
        """
        return self._child(f"{self._name}/lane", range(self.size))

    def close(self) -> None:
        """Ends the second lane's thread, where there is one.

        Only ranks whose process goes on need it: the thread does not keep a process alive.
        """
        if self._lane is not None:
            self._lane.close()

    # -- point to point ----------------------------------------------------------------------------

    def send(self, x: Tensor, dst: int, *, tag: int = 0) -> None:
        """Sends a vector, and returns when its memory may be used again."""
        self.isend(x, dst, tag=tag).wait()

    def recv(self, x: Tensor, src: int, *, tag: int = 0) -> None:
        """Receives a message that has exactly the size of `x`, and returns when it is there."""
        self.irecv(x, src, tag=tag).wait()

    def isend(self, x: Tensor, dst: int, *, tag: int = 0) -> _Work:
        """Begins a send without a copy: `x` may not change before `wait`.

        StrictError under `strict` for a use that NCCL does not allow.
        """
        self._check(tag)
        self._check_order(dst)

        return self._isend(x, dst, tag)

    def _isend(self, x: Tensor, dst: int, tag: int = 0) -> _Work:
        """Counts a send and begins it, without the check of order.

        `sendrecv` needs it so: its own receive is open, and both halves travel in one group call.
        """
        self._count(x, dst)
        return _Work(self, self._group.send([x], dst, tag), "send")

    def irecv(self, x: Tensor, src: int, *, tag: int = 0) -> _Work:
        """Begins a receive from one rank, or with ANY_SOURCE from whoever sends first.

        StrictError where the backend is NCCL, or stands for it, and the source is open.
        """
        self._check(tag)

        if src == ANY_SOURCE:
            if self._world.strict == "nccl" or self._world.backend == "nccl":
                raise StrictError(
                    "receive from any source: NCCL has none; receive from the rank that a ticket "
                    "names"
                )

            return _Work(self, self._group.recv_anysource([x], tag), "recv")

        self._receiving[src] += 1
        return _Work(self, self._group.recv([x], src, tag), "recv", src)

    def sendrecv(self, x: Tensor, dst: int, y: Tensor, src: int) -> None:
        """Sends `x` and receives `y` at once, so that a ring of ranks does not deadlock."""
        self._check(0)

        if self._world.backend == "nccl":
            # Both go into one group call. As two calls they run one after the other on the stream,
            # and two ranks that both begin with their receive wait for each other.
            self._count(x, dst)
            self._group._start_coalescing(self._world.device)
            self._group.recv([y], src, 0)
            self._group.send([x], dst, 0)

            both = self._group._end_coalescing(self._world.device)
            self._wait(both, "recv")

            return

        # gloo's own threads move the bytes, so the receive goes on while the send is waited for.
        receiving = self.irecv(y, src)
        self._isend(x, dst).wait()
        receiving.wait()

    # -- collectives of the library (derived, not counted) -----------------------------------------

    def all_reduce(self, x: Tensor) -> None:
        """Sums `x` over the ranks in place, by the backend's own algorithm."""
        self._check(0)
        self._call("allreduce", x)
        self._wait(self._group.allreduce([x]), "send")

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Puts every rank's `x` (n,) into `out` (size n,), in the order of ranks."""
        self._check(0)
        self._call("allgather", out)
        self._wait(getattr(self._group, _ALL_GATHER)(out, x), "send")

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """Sums `x` (size n,) over the ranks; `out` (n,) is this rank's slice of the sum."""
        self._check(0)
        self._call("reduce_scatter", x)
        self._wait(getattr(self._group, _REDUCE_SCATTER)(out, x), "send")

    def broadcast(self, x: Tensor, root: int) -> None:
        """Copies the `x` of rank `root` into that of every rank."""
        self._check(0)
        self._call("broadcast", x)

        options = dist.BroadcastOptions()
        options.rootRank = root
        self._wait(self._group.broadcast([x], options), "send")

    def barrier(self) -> None:
        """Returns when all ranks have come here.

        Ranks that share a host meet on sockets: 16 us for two of them, where a process group takes
        milliseconds.
        """
        self._check(0)

        if not self._on_one_host:
            self._wait(self._group.barrier(), "barrier")
            return

        if self._sockets is None:
            timeout_s = self._world.timeout_s
            self._sockets = SocketBarrier(
                self._store, rank=self.rank, names=self.world_ranks, timeout_s=timeout_s
            )

        self._wait(self._sockets, "barrier")

    # -- lanes and groups --------------------------------------------------------------------------

    def lane(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Runs `fn(lane_comm, *args)` on the second lane, in the order of the calls.

        The lane's thread is made by the first call: most strategies need none.
        """
        if self._lane is None:
            self._lane = Lane(self)

        return self._lane.submit(fn, *args)

    def split(self, ranks: Sequence[int]) -> ProcessComm | None:
        """A comm of some of the ranks; None on a rank that is not among them.

        Every rank calls it, in the same order, because the number of splits is part of the name
        under which the new group's members find each other in the store. A rank outside that
        skipped the call would count one less and wait under another name ever after.
        """
        members = "-".join(map(str, ranks))
        name = f"{self._name}/{self._splits}:{members}"
        self._splits += 1

        if self.rank not in ranks:
            return None

        part = self._child(name, list(ranks))
        part._on_one_host = len(ranks) > 1 and len(set(part.hosts)) == 1

        return part

    def _child(self, name: str, ranks: Sequence[int]) -> ProcessComm:
        """A comm of some of this one's ranks, with a group of its own.

        It counts into the same traffic and calls, under the ranks of the whole run, so that the sum
        of a rank's bytes does not depend on which comm they went through.
        """
        return ProcessComm(
            self._world,
            rank=list(ranks).index(self.rank),
            size=len(ranks),
            name=name,
            world_ranks=[self.world_ranks[rank] for rank in ranks],
            hosts=[self.hosts[rank] for rank in ranks],
            traffic=self.traffic,
            calls=self.calls,
            on_phase=self._on_phase,
            group=NO_GROUP if self._group is NO_GROUP else None,
        )

    # -- clock, counters, tickets ------------------------------------------------------------------

    def now_ns(self) -> int:
        """The wall clock in nanoseconds.

        Its start is this host's own: only ranks that share a host may compare what they read.
        """
        return time.perf_counter_ns()

    def fetch_add(self, name: str, n: int) -> int:
        """Adds `n` to a counter that the comm shares, and returns its value before.

        The store's server adds, so two ranks that ask at once get different values.
        """
        self.traffic.add_control(self.world_ranks[self.rank], COUNTER_BYTES)

        start = time.perf_counter_ns()
        value = int(self._store.add(name, n)) - n
        self.wait_ns += time.perf_counter_ns() - start

        return value

    def ticket(self, dst: int, tag: int) -> None:
        """Tells rank `dst`, through the store, that this rank's next message to it is ready."""
        self.traffic.add_control(self.world_ranks[self.rank], TICKET_BYTES)

        start = time.perf_counter_ns()
        ticket_store = self._ticket_store  # the first use connects, before the time of sending
        sent_ns = time.perf_counter_ns()
        ticket_store.queue_push(f"tickets/{dst}", _TICKET.pack(self.rank, tag, sent_ns))
        self.wait_ns += time.perf_counter_ns() - start

    def next_ticket(self) -> tuple[int, int, int]:
        """Waits for a ticket to this rank: (source, tag, sent_ns).

        The time is not counted as blocked in communication: a server without work is idle.
        """
        if self._on_phase is not None:
            self._on_phase("serve")

        start = time.perf_counter_ns()
        packed = self._ticket_store.queue_pop(f"tickets/{self.rank}")
        source, tag, sent_ns = _TICKET.unpack(packed)
        self.ticket_wait_ns += time.perf_counter_ns() - start

        return source, tag, sent_ns

    def farewell(self, dst: int) -> None:
        """Sends one byte that means nothing, to end a receive that `dst` has open.

        It is shorter than that receive, which gloo allows.
        """
        self.traffic.add_control(self.world_ranks[self.rank], 1)
        byte = torch.zeros(1, dtype=torch.uint8)
        self._wait(self._group.send([byte], dst, 0), "send")

    @property
    def _ticket_store(self) -> Any:
        """The store's client for tickets.

        It is a client of its own, because a pop that waits holds its client's connection, and every
        other call to the store would queue behind it. It is connected anew, because `clone()` of a
        store can stall.
        """
        if self._ticket_client is None:
            self._ticket_client = prefixed(self._world.connect(), f"comm/{self._name}")

        return self._ticket_client

    # -- one host only -----------------------------------------------------------------------------

    def shared(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """One zeroed vector (numel,) that all ranks of a host see.

        Rank 0 makes it and publishes its address; the others wait for that and open it. UsageError
        where the ranks are on several hosts.
        """
        self._one_host(f"shared({name!r})")
        key = self._once(f"shared/{name}")

        if self.rank == 0:
            vector, kept, address = create_vector(numel, dtype)
            self._store.set(key, address)
        else:
            vector, kept = attach_vector(self._store.get(key).decode(), numel, dtype)

        self._kept.append(kept)

        # Without it rank 0 could end, and its memory with it, before a peer has opened it.
        self.barrier()
        return vector

    def lock(self, name: str) -> AbstractContextManager[Any]:
        """A lock that excludes all ranks of a host from each other, made like `shared`."""
        self._one_host(f"lock({name!r})")
        key = self._once(f"lock/{name}")

        if self.rank == 0:
            lock, address = FileLock.create()
            self._store.set(key, address)
        else:
            lock = FileLock.attach(self._store.get(key).decode())

        self.barrier()
        return lock

    def _once(self, name: str) -> str:
        """A key of the store that no earlier call has used: all ranks call in the same order."""
        self._num_made += 1
        return f"{name}/{self._num_made}"

    def _one_host(self, what: str) -> None:
        """UsageError where the ranks are on several hosts.

        `what` is the call that they cannot make, with which the message begins.
        """
        if len(set(self.hosts)) > 1:
            raise UsageError(
                f"{what}: shared memory joins ranks of one host, these are on "
                f"{len(set(self.hosts))}: split by host"
            )

    # -- book-keeping ------------------------------------------------------------------------------

    def _wait(self, work: Any, phase: str) -> None:
        """Waits for an operation and charges the time to this rank, on both clocks.

        A staged operation has copied before it began (`copied_ns`): that is time of communication
        too.
        """
        if self._on_phase is not None:
            self._on_phase(phase)

        if self.timer is not None:
            self.timer.begin("blocked")

        start = time.perf_counter_ns()
        work.wait()
        self.wait_ns += time.perf_counter_ns() - start + getattr(work, "copied_ns", 0)

        if self.timer is not None:
            self.timer.end("blocked")

    def _call(self, name: str, whole: Tensor) -> None:
        """Notes a collective of the library, once for all its ranks: on the first of them.

        Its bytes are derived from the note (`measure/traffic_mode.py`), because what an algorithm
        of the library sends cannot be seen from here. `whole` is the larger of its vectors.
        """
        if self.rank == 0 and self.size > 1:
            call = (name, whole.numel(), whole.element_size(), tuple(self.world_ranks))
            note(self.calls, call)

    def _count(self, x: Tensor, dst: int) -> None:
        """Counts one message from this rank to `dst`, under the names of the whole run.

        Only the sender counts, so no byte is counted twice when ranks are added up.
        """
        source = self.world_ranks[self.rank]
        num_bytes = x.numel() * x.element_size()
        self.traffic.add(source, self.world_ranks[dst], num_bytes)

    def _check(self, tag: int) -> None:
        """StrictError, under `strict`, for a tag or for a second thread on this group.

        The group belongs to the thread that uses it first.
        """
        if not self._world.strict:
            return

        if tag != 0:
            raise StrictError(
                f"tag {tag}: NCCL has no tags, it matches in posting order; use tag 0"
            )

        thread = threading.get_ident()
        if self._owner is None:
            self._owner = thread

        if thread != self._owner:
            raise StrictError("two threads on one group: NCCL can deadlock; use `lane` or `split`")

    def _check_order(self, dst: int) -> None:
        """StrictError, under `strict = "nccl"`, for a send behind an open receive from its target.

        gloo runs the two side by side. NCCL runs them in posting order, and both ranks would wait.
        """
        if self._world.strict == "nccl" and self._receiving[dst] > 0:
            raise StrictError(
                f"send to rank {dst} behind an open receive from it: NCCL runs a pair's operations "
                "in posting order, "
                "so the answer would wait for a send that waits for the answer; send first, or use "
                "`sendrecv`"
            )


def _is_a_comm(comm: ProcessComm) -> Comm:
    """Lets the type checker hold ProcessComm against the protocol."""
    return comm
