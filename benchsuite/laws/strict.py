"""Laws of strict mode: on gloo it refuses what NCCL cannot do, and nothing else.

So tests on a CPU prove that code is valid on GPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.comm.process import ANY_SOURCE, ProcessComm, StrictError
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.comm import Wrap, in_thread, whole, with_instead
from benchsuite.laws.harness import cases
from benchsuite.plan.cell import Cell


def strict_refuses(make_ranks: MakeRanks, cell: Cell, *, strict: str = "nccl") -> Figure:
    """Strict mode raises for what gloo takes and NCCL cannot do.

    These are tags, any source, two threads, and a send behind an open receive. Bound: exact. In the
    twin strict mode is off.
    """

    def body(comm: ProcessComm) -> list[str]:
        other = 1 - comm.rank
        taken = []
        x = torch.ones(3)
        y = torch.zeros(3)
        attempts: dict[str, Callable[[], None]] = {
            "a tag": lambda: _pair(comm, other, x, y, tag=7),
            "any source": lambda: _pair(comm, other, x, y, source=ANY_SOURCE),
            "two threads": lambda: in_thread(comm.barrier),
            "a send behind a receive": lambda: _receive_first(comm, other, x, y),
        }
        for name, attempt in attempts.items():
            with contextlib.suppress(StrictError):
                attempt()
                taken.append(name)
        return taken

    taken = make_ranks(2, body, strict=strict)
    return Figure(sum(map(len, taken)), 0, f"accepted: {taken}")


def strict_takes_what_is_legal(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """Strict mode accepts what is legal on NCCL.

    These are rounds of sendrecv, sends before receives, collectives, lanes and splits. Bound:
    exact. In the twin a sendrecv receives first.
    """

    def body(comm: Any) -> int:
        x = torch.full((3,), float(comm.rank))
        y = torch.zeros(3)
        right = (comm.rank + 1) % comm.size
        left = (comm.rank - 1) % comm.size
        comm.sendrecv(x, right, y, left)
        wrong = int(float(y[0]) != left)
        sending = comm.isend(x, right)
        comm.irecv(y, left).wait()
        sending.wait()
        comm.barrier()
        comm.lane(lambda lane: lane.barrier()).wait()
        return wrong

    size = max(2, cell.replicas)

    def guarded(comm: ProcessComm) -> int:
        try:
            return body(wrap(comm))
        except StrictError:
            return 1

    wrong = sum(make_ranks(size, guarded, strict="nccl"))
    return Figure(wrong, 0, f"{wrong} legal uses refused or wrong, {size} ranks")


def _pair(
    comm: ProcessComm, other: int, x: Tensor, y: Tensor, *, tag: int = 0, source: int = 0
) -> None:
    """Rank 0 receives what rank 1 sends; a strict rank refuses before anything is posted."""
    if source == ANY_SOURCE and comm._world.strict:
        comm.irecv(y, ANY_SOURCE)
    elif comm.rank == 0:
        comm.irecv(y, source if source == ANY_SOURCE else other, tag=tag).wait()
    else:
        comm.send(x, other, tag=tag)


def _receive_first(comm: ProcessComm, other: int, x: Tensor, y: Tensor) -> None:
    """Posts a receive before its send; it is taken in the end, so that nothing is left over."""
    receiving = comm.irecv(y, other)
    try:
        comm.isend(x, other).wait()
    except StrictError:
        comm._isend(x, other).wait()
        receiving.wait()
        raise
    receiving.wait()


def _answer_first(comm: ProcessComm, x: Tensor, dst: int, y: Tensor, src: int) -> None:
    """A sendrecv that receives before it sends, so that of two ranks each waits for the other."""
    _receive_first(comm, dst, x, y)


def _several(cell: Cell) -> bool:
    """Whether the cell has several ranks."""
    return cell.replicas > 1


CELLS = cases.RANKS
LAWS = (
    Law(
        "strict mode refuses what NCCL cannot do",
        strict_refuses,
        _several,
        (
            Control(
                "strict mode is off",
                partial(strict_refuses, strict=""),
                {"replicas": 2},
                real_ranks=True,
            ),
        ),
    ),
    Law(
        "strict mode takes what NCCL can do",
        strict_takes_what_is_legal,
        _several,
        (
            Control(
                "a sendrecv that receives first",
                partial(strict_takes_what_is_legal, wrap=with_instead("sendrecv", _answer_first)),
                {"replicas": 2},
                real_ranks=True,
            ),
        ),
    ),
)
