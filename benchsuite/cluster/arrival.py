"""How the ranks of a cell find each other under supervisors: all arrive at a store, then all go.

Runs in processes that have torch: the ranks' own, and short ones that speak for a supervisor, which
has none. A rank that ends badly is announced in the store by its supervisor, so that the others do
not wait for the deadline. Control traffic: one key per rank, one look per second.
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

from benchsuite.cluster.lifeline import hold_lifeline
from benchsuite.measure.beat import Beat
from benchsuite.worker.job import EXIT_ABORTED, EXIT_OK, RankJob

GRACE_S = 1.0  # between the announcement of a lost rank and the end of the others
_CONNECT = timedelta(seconds=600)  # the supervisor ends this process earlier
_LEAVE = timedelta(seconds=60)
_ARRIVAL_LOOK_S = 0.02
_ABORT_LOOK_S = 1.0


def await_all_ranks(job: RankJob) -> None:
    """Returns when all ranks of the cell are here.

    From then on a thread watches for the announcement of a bad end, and ends this process.
    """
    store = _connect(job)
    if store.add("arrived", 1) == job.world_size:
        store.set("go", "")
    while not store.check(["go"]):
        if store.check(["abort"]):
            os._exit(EXIT_ABORTED)
        time.sleep(_ARRIVAL_LOOK_S)
    Beat(job.beat_path)  # tells the supervisor that the cell's time begins
    threading.Thread(target=_watch, args=(store,), name="watch", daemon=True).start()


def _watch(store: Store) -> None:
    try:
        while not store.check(["abort"]):
            time.sleep(_ABORT_LOOK_S)
    except RuntimeError:  # the store is gone, and with it the job
        return
    time.sleep(GRACE_S)
    os._exit(EXIT_ABORTED)


def announce_bad_end(job: RankJob) -> None:
    """Tells the other ranks that this cell is over; ends this process."""
    hold_lifeline()
    _connect(job).set("abort", "")
    os._exit(EXIT_OK)


def host_store(listener: socket.socket, world_size: int) -> None:
    """Hosts the store of a whole job, where the launcher hosts none; ends this process.

    It stays until all `world_size` supervisors have said `leave`.
    """
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
    """Says for a supervisor that it needs the job's store no more; ends this process."""
    hold_lifeline()
    TCPStore(host, port, is_master=False, timeout=_LEAVE).add("left", 1)
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
