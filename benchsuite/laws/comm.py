"""Laws of `Comm`, on which every strategy stands.

They are about lanes, splits, shared memory, locks, counters, tickets and strict mode.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchsuite.comm.process import ProcessComm, StrictError
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.plan.cell import Cell

TIMES = 20
Wrap = Callable[[ProcessComm], Any]


def whole(comm: ProcessComm) -> Any:
    """The comm as it is."""
    return comm


def _total(
    make_ranks: MakeRanks, cell: Cell, body: Callable[..., int], wrap: Wrap, what: str
) -> Figure:
    """The sum of what `body` counts on all ranks."""
    size = max(2, cell.replicas)
    wrong = sum(make_ranks(size, lambda comm: body(wrap(comm))))
    return Figure(wrong, 0, f"{wrong} {what}, {size} ranks")


def lock_loses_nothing(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """Under the lock no increment of a shared number is lost: it ends at ranks x times.

    Each rank reads, waits, adds one and writes. Bound: exact. The twin has no lock.
    """

    def body(comm: Any) -> int:
        number = comm.shared("number", 1, torch.int64)
        lock = comm.lock("number")
        for _ in range(TIMES):
            with lock:
                read = int(number[0])
                time.sleep(1e-4)
                number[0] = read + 1
        comm.barrier()
        return comm.size * TIMES - int(number[0]) if comm.rank == 0 else 0

    return _total(make_ranks, cell, body, wrap, "increments lost")


def counter_gives_each_number_once(
    make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole
) -> Figure:
    """`fetch_add` hands out 0, n, 2n and so on, each to one rank and once.

    Bound: exact. In the twin every rank counts for itself.
    """
    size = max(2, cell.replicas)
    taken = make_ranks(size, lambda comm: [wrap(comm).fetch_add("number", 3) for _ in range(TIMES)])
    wrong = len(
        set(range(0, 3 * size * TIMES, 3)) ^ {value for values in taken for value in values}
    )
    return Figure(wrong, 0, f"{wrong} of {size * TIMES} numbers missing or strange, {size} ranks")


def tickets_keep_their_order(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """The last rank gets every ticket, those of one source in order, and none before it was sent.

    Bound: exact. In the twin tickets come two by two in the wrong order.
    """

    def body(comm: Any) -> int:
        server = comm.size - 1
        if comm.rank != server:
            for tag in range(TIMES):
                comm.ticket(server, tag)
            return 0
        seen = [comm.next_ticket() for _ in range(server * TIMES)]
        ordered = sum(
            [tag for source, tag, _ in seen if source == rank] == list(range(TIMES))
            for rank in range(server)
        )
        return int(server - ordered + sum(sent_ns > comm.now_ns() for _, _, sent_ns in seen))

    return _total(make_ranks, cell, body, wrap, "sources out of order")


def lane_runs_in_order_beside(
    make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole, strict: str = ""
) -> Figure:
    """A lane's calls run in the order of calling, on a group of their own.

    Meanwhile the rank's own group works. Each call returns its result or raises its error. Bound:
    exact. The twins give the lane no group of its own or drop its work.
    """

    def body(comm: Any) -> int:
        order: list[int] = []

        def reduce(lane: Any, number: int) -> float:
            order.append(number)
            value = torch.full((257,), float(number * (lane.rank + 1)))
            lane.all_reduce(value)
            return float(value[0])

        ranks = comm.size * (comm.size + 1) / 2
        handles = [comm.lane(reduce, number) for number in range(TIMES)]
        own = torch.full((1001,), float(comm.rank))
        comm.all_reduce(own)
        wrong = int(float(own[0]) != sum(range(comm.size)))
        wrong += sum(bool(handle.wait() != number * ranks) for number, handle in enumerate(handles))
        failing = comm.lane(_fails)
        try:
            failing.wait()
        except ZeroDivisionError:
            return wrong + sum(a != b for a, b in zip(order, range(TIMES), strict=True))
        return wrong + 1

    size = max(2, cell.replicas)

    def guarded(comm: ProcessComm) -> int:
        try:
            return body(wrap(comm))
        except StrictError:
            return 1

    wrong = sum(make_ranks(size, guarded, strict=strict))
    return Figure(wrong, 0, f"{wrong} wrong sums, orders or errors, {size} ranks")


def _fails(lane: Any) -> None:
    """Raises an error that the lane must hand on."""
    raise ZeroDivisionError


def split_joins_its_ranks_only(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """A split joins the ranks that it names, and no others.

    Ranks outside get None; those inside are renumbered and sum among themselves, while traffic
    keeps the run's numbers of ranks. Bound: exact. In the twin a split is the whole comm.
    """

    def body(comm: Any) -> int:
        members = [rank for rank in range(comm.size) if rank % 2 == 0][::-1]
        part = comm.split(members)
        outside = comm.split([comm.size - 1])
        wrong = int((part is None) != (comm.rank % 2 == 1)) + int(
            (outside is None) == (comm.rank == comm.size - 1)
        )
        if part is None:
            return wrong
        if part.size != len(members):
            return wrong + 1
        value = torch.full((5,), float(comm.rank + 1))
        part.all_reduce(value)
        wrong += int(float(value[0]) != sum(rank + 1 for rank in members)) + int(
            members[part.rank] != comm.rank
        )
        if part.size > 1 and part.rank < 2:
            (part.send if part.rank == 0 else part.recv)(torch.zeros(3), 1 - part.rank)
        expected = {(members[0], members[1]): 12} if part.size > 1 and part.rank == 0 else {}
        return wrong + int(comm.traffic.payload != expected)

    return _total(make_ranks, cell, body, wrap, "wrong members, sums or edges")


def in_thread(call: Callable[[], None]) -> None:
    """Calls it in a thread of its own and raises what strict mode raised there."""
    errors: list[StrictError] = []

    def run() -> None:
        try:
            call()
        except StrictError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


# -- broken comms ----------------------------------------------------------------------------------


class _Twin:
    """A comm with one method replaced: a call of `name` becomes `instead(comm, ...)`."""

    def __init__(self, comm: Any, name: str, instead: Callable[..., Any]) -> None:
        self._comm = comm
        self._name = name
        self._instead = instead

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            return partial(self._instead, self._comm)
        return getattr(self._comm, name)


def with_instead(name: str, instead: Callable[..., Any]) -> Wrap:
    """The wrapper that replaces one method of a comm, which becomes `instead(comm, ...)`."""
    return lambda comm: _Twin(comm, name, instead)


class _SameGroup:
    """A lane on the rank's own group."""

    def __init__(self, comm: Any, fn: Callable[..., Any], *args: Any) -> None:
        self._result = fn, comm, args

    def wait(self) -> Any:
        fn, comm, args = self._result
        values: list[Any] = []
        in_thread(lambda: values.append(fn(comm, *args)))
        return values[0]


def _own_number(comm: Any, name: str, n: int) -> int:
    """A counter that every rank keeps for itself."""
    comm.__dict__["numbers"] = comm.__dict__.get("numbers", -n) + n
    return int(comm.__dict__["numbers"])


def _swapped(comm: Any) -> Any:
    """Tickets that come two by two in the wrong order."""
    kept = comm.__dict__.setdefault("kept", [])
    if not kept:
        kept += [comm.next_ticket(), comm.next_ticket()]
    return kept.pop()


def _drops_its_work(comm: Any, fn: Callable[..., Any], *args: Any) -> Any:
    """A lane that leaves a call out and answers at once."""

    class Done:
        def wait(self) -> float:
            return 0.0

    return Done()


_ON = {"replicas": 3, "topology": "native"}
_UNLOCKED = with_instead("lock", lambda comm, name: contextlib.nullcontext())
_REAL = ("no lock", "the lane has no group of its own")
CELLS = cases.RANKS


def _several(cell: Cell) -> bool:
    """Whether the cell has several ranks on one host."""
    return cell.hosts == 1 and cell.replicas > 1


def _law(name: str, check: Callable[..., Figure], *controls: tuple[str, dict[str, Any]]) -> Law:
    """A law of comms, with its broken twins."""
    made = tuple(
        Control(broken, partial(check, **how), _ON, real_ranks=broken in _REAL)
        for broken, how in controls
    )
    return Law(name, check, _several, made)


LAWS = (
    _law(
        "with the lock no increment is lost", lock_loses_nothing, ("no lock", {"wrap": _UNLOCKED})
    ),
    _law(
        "a shared counter gives each number once",
        counter_gives_each_number_once,
        ("every rank counts for itself", {"wrap": with_instead("fetch_add", _own_number)}),
    ),
    _law(
        "tickets of one source keep their order",
        tickets_keep_their_order,
        ("tickets are swapped", {"wrap": with_instead("next_ticket", _swapped)}),
    ),
    _law(
        "a lane runs in order beside its rank",
        lane_runs_in_order_beside,
        ("the lane's work is dropped", {"wrap": with_instead("lane", _drops_its_work)}),
        (
            "the lane has no group of its own",
            {"wrap": with_instead("lane", _SameGroup), "strict": "nccl"},
        ),
    ),
    _law(
        "a split joins its ranks only",
        split_joins_its_ranks_only,
        ("a split is the whole", {"wrap": with_instead("split", lambda comm, ranks: comm)}),
    ),
)
