"""How the ranks of a cell find each other under supervisors: all arrive at a shared store, then all
go.

Runs in the ranks' processes (torch is there). A rank that ends badly is announced in the store by
its supervisor, so that the others do not wait for the deadline. Control traffic: one key per rank,
one look per second.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import (
    PrefixStore,
    Store,
    TCPStore,
)  # typed, unlike the names in torch.distributed

from benchsuite.cluster.rank_entry import hold_lifeline
from benchsuite.measure.beat import Beat
from benchsuite.worker.job import EXIT_ABORTED, EXIT_OK, RankJob

GRACE_S = 1.0  # between the announcement of a lost rank and the end of the others
_CONNECT = timedelta(seconds=600)  # the supervisor ends this process earlier
_STAY_S = 60.0


def meet(job: RankJob) -> None:
    """Returns when all ranks of the cell have arrived, and from then on watches for the
    announcement of an end."""
    store = _connect(job)
    if store.add("arrived", 1) == job.world_size:
        store.set("go", "")
    while not store.check(["go"]):
        if store.check(["abort"]):
            os._exit(EXIT_ABORTED)
        time.sleep(0.02)
    Beat(job.beat_path)  # tells the supervisor that the cell's time begins
    threading.Thread(target=_watch, args=(store,), name="watch", daemon=True).start()


def _watch(store: Store) -> None:
    try:
        while not store.check(["abort"]):
            time.sleep(1.0)
    except RuntimeError:  # the store is gone, and with it the job
        return
    time.sleep(GRACE_S)
    os._exit(EXIT_ABORTED)


def announce_end(job: RankJob) -> None:
    """Says to the other ranks that this cell is over. A process of its own: the supervisor has no
    torch."""
    hold_lifeline()
    _connect(job).set("abort", "")
    os._exit(EXIT_OK)


def host_store(listener: socket.socket, world_size: int) -> None:
    """Hosts the store of a whole job, where the launcher hosts none, until every supervisor said
    `leave`."""
    hold_lifeline()
    host, port = listener.getsockname()[:2]
    store = TCPStore(
        host,
        port,
        is_master=True,
        timeout=_CONNECT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    while store.add("left", 0) < world_size:
        time.sleep(0.1)
    os._exit(EXIT_OK)


def leave(host: str, port: int) -> None:
    """The last word of a supervisor."""
    hold_lifeline()
    TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_STAY_S)).add("left", 1)
    os._exit(EXIT_OK)


def _connect(job: RankJob) -> Store:
    client = TCPStore(
        job.store_host,
        job.store_port,
        job.world_size,
        is_master=False,
        timeout=_CONNECT,
        wait_for_workers=False,
    )
    return PrefixStore(f"{job.store_prefix}/meet", client)
