"""The server's loop on its edges: receives that are posted before their tickets, and what a goodbye
leaves behind."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from benchsuite.comm.process import EARLY_BYTES, ProcessComm
from benchsuite.compression import Compression
from benchsuite.compression.fp16 import Compression as Half
from benchsuite.compression.topk import Compression as TopK
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.programs.selfcheck.ranks import AddAndAnswer
from benchsuite.sync import Apply
from benchsuite.topology import serving
from benchsuite.topology.parameter_server import Topology as ParameterServer

# float32 of one slice
EARLY = 1_000
LATE = EARLY_BYTES // 4 + 1
WORKERS = 3
PUSHES = 4
SERVED = -1.0
WHOLE = [SERVED, *[7.0] * 5, SERVED, *[8.0] * 5]


class _Adds(AddAndAnswer):
    """Adds pushes that look like the slice."""

    def start(self, shard: torch.Tensor, apply: Apply) -> None:
        super().start(shard, apply)
        self._like = shard

    def on_push(self, worker: int, version: int, flat: torch.Tensor) -> list[int]:
        assert (flat.shape, flat.dtype) == (self._like.shape, self._like.dtype), (
            "a push is a vector of the slice"
        )
        return super().on_push(worker, version, flat)


def _serve_then_send(
    comm: ProcessComm,
    *,
    numel: int,
    servers: int,
    doors: int,
    compression: Compression | None = None,
    heard: list[float] | None = None,
) -> list[float]:
    """Twice: pushes, goodbye; then a message of worker 0 to each server, as any later use of the
    comm would send it."""
    heard = [] if heard is None else heard
    for message in (7.0, 8.0):
        # or tickets of the next round would reach a server that is still in this one
        comm.barrier()
        topology = ParameterServer()
        topology.start(comm, num_servers=servers)
        topology.use_threads(doors)
        if compression is not None:
            topology.use_compression(compression, {"vector": torch.Size([numel])}, torch.float32)
        params = torch.zeros(numel)
        later = torch.full((5,), message)
        if topology.server < 0:
            for push in range(PUSHES):
                topology.exchange(torch.ones(numel), params, tag=push)
            topology.goodbye()
            for server in range(servers if comm.rank == 0 else 0):
                door, dst = topology._door(server)
                door.send(later, dst)
            continue
        start, stop = topology.slice_of(topology.server, numel)
        shard = params[start:stop]
        log = topology.serve(
            shard, _nothing_steps, _Adds(), samples_per_push=1, num_pushes=PUSHES * WORKERS
        )
        assert log.num_pushes == PUSHES * WORKERS
        assert shard.eq(PUSHES * WORKERS).all(), (
            f"{shard} is not the sum of {PUSHES * WORKERS} pushes of ones"
        )
        door = topology._doors[topology.server][0]
        assert door is not None
        heard.append(SERVED)
        door.recv(later.zero_(), 0)
        heard += later.tolist()
    return heard


def _nothing_steps() -> serving.Steps:
    raise AssertionError("the policy adds by itself")


CASES = [(EARLY, 1, 1), (LATE, 1, 1), (EARLY, 2, 1), (1, 2, 1), (EARLY, 1, 2)]


@pytest.mark.parametrize(
    ("numel", "servers", "doors", "strict"),
    [
        (*case, strict) for strict in ("", "nccl") for case in CASES if not strict or case[2] == 1
    ],  # doors are groups
)
def test_a_message_after_the_goodbye_reaches_its_receiver(
    numel: int, servers: int, doors: int, strict: str
) -> None:
    def rank(comm: ProcessComm) -> list[float]:
        return _serve_then_send(comm, numel=numel, servers=servers, doors=doors)

    heard = thread_ranks(WORKERS + servers, rank, strict=strict)
    assert heard[WORKERS:] == [WHOLE] * servers


@pytest.mark.parametrize("numel", [EARLY, LATE, 1])
@pytest.mark.parametrize(
    "compression", [Half(), TopK(rho=1.0)], ids=lambda how: type(how).__module__.split(".")[-1]
)
def test_encoded_pushes_too_and_those_of_an_empty_slice(
    numel: int, compression: Compression
) -> None:
    def rank(comm: ProcessComm) -> list[float]:
        return _serve_then_send(
            comm, numel=numel, servers=2, doors=1, compression=copy.deepcopy(compression)
        )

    assert thread_ranks(WORKERS + 2, rank)[WORKERS:] == [WHOLE] * 2


@pytest.mark.parametrize(("numel", "farewell"), [(EARLY, False), (LATE, True)])
def test_without_a_farewell_or_without_its_receive_the_message_is_lost(
    numel: int, farewell: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receive that was left open takes the message; a farewell that nobody receives is taken for
    it."""
    monkeypatch.setattr(serving._Inbox, "close", lambda self, source: None)
    if not farewell:
        monkeypatch.setattr(ProcessComm, "farewell", lambda self, dst: None)
    heard: list[float] = []

    def rank(comm: ProcessComm) -> list[float]:
        return _serve_then_send(comm, numel=numel, servers=1, doors=1, heard=heard)

    with contextlib.suppress(RuntimeError, TimeoutError):  # ranks that wait for what was lost
        thread_ranks(WORKERS + 1, rank, timeout_s=2.0)
    assert heard[0] == SERVED and heard[1:6] != [7.0] * 5, (
        "the server ended its round, and the message did not come"
    )


@pytest.mark.parametrize(("numel", "early"), [(EARLY, True), (LATE, False)])
def test_small_pushes_are_received_before_their_tickets(
    numel: int, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order on the server: the receive, then the ticket; for large pushes the ticket first."""
    order: list[str] = []
    ticket = ProcessComm.next_ticket
    receive = ProcessComm.irecv

    def next_ticket(self: ProcessComm) -> tuple[int, int, int]:
        order.append("ticket")
        return ticket(self)

    def irecv(self: ProcessComm, x: torch.Tensor, src: int, *, tag: int = 0) -> object:
        if self.rank == WORKERS:
            order.append("receive")
        return receive(self, x, src, tag=tag)

    monkeypatch.setattr(ProcessComm, "next_ticket", next_ticket)
    monkeypatch.setattr(ProcessComm, "irecv", irecv)
    thread_ranks(WORKERS + 1, lambda comm: _serve_then_send(comm, numel=numel, servers=1, doors=1))
    assert order[:4] == (["receive"] * WORKERS + ["ticket"] if early else ["ticket", "receive"] * 2)
