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
# A store that does not answer for so long has ended, and needs no goodbye.
_LEAVE = timedelta(seconds=60)
_ARRIVAL_LOOK_S = 0.02
_ABORT_LOOK_S = 1.0


def await_all_ranks(job: RankJob) -> None:
    """Returns when all ranks of the cell are here.

    From then on a thread watches for the announcement of a bad end, and ends this process: a rank
    in a collective would not notice by itself that a peer on another host is gone.
    """
    store = _connect(job)
    # `add` counts in the store, so exactly one rank sees the full number; it lets the others go.
    if store.add("arrived", 1) == job.world_size:
        store.set("go", "")

    # Looked at, not waited for with `store.wait`: a wait would not see the announcement that one of
    # the others has failed on its way here.
    while not store.check(["go"]):
        if store.check(["abort"]):
            os._exit(EXIT_ABORTED)

        time.sleep(_ARRIVAL_LOOK_S)

    # Begun here and not before, so that slow imports on one host are not taken from the time of the
    # cell on all others.
    Beat(job.beat_path)  # tells the supervisor that the cell's time begins
    threading.Thread(target=_watch, args=(store,), name="watch", daemon=True).start()


def _watch(store: Store) -> None:
    """Ends this process when a supervisor has announced a bad end of another rank."""
    try:
        # Once a second: on thousands of ranks more would be a load of its own on the store.
        while not store.check(["abort"]):
            time.sleep(_ABORT_LOOK_S)
    except RuntimeError:  # the store is gone, and with it the job
        return

    # This rank may be about to hand in its record, or to raise an error that says more.
    time.sleep(GRACE_S)
    os._exit(EXIT_ABORTED)


def announce_bad_end(job: RankJob) -> None:
    """Tells the other ranks that this cell is over; ends this process.

    Announcing it twice does no harm: the key is set, not counted.
    """
    hold_lifeline()
    _connect(job).set("abort", "")
    os._exit(EXIT_OK)


def host_store(listener: socket.socket, world_size: int) -> None:
    """Hosts the store of a whole job, where the launcher hosts none; ends this process.

    listener: bound by the supervisor of rank 0. It stays until all `world_size` supervisors have
    said `leave`: a store that ended with the first rank that is done would take the others with it.
    """
    hold_lifeline()
    host, port = listener.getsockname()[:2]
    store = TCPStore(
        host,
        port,
        is_master=True,
        timeout=_CONNECT,
        wait_for_workers=False,
        # torch closes the descriptor; `detach` keeps Python from closing it too.
        master_listen_fd=listener.detach(),
    )

    # Adding 0 reads the counter, and also where nobody has set it yet.
    while store.add("left", 0) < world_size:
        time.sleep(0.1)

    os._exit(EXIT_OK)


def leave(host: str, port: int) -> None:
    """Says for a supervisor that it needs the job's store no more; ends this process.

    host, port: where the store listens. Where it cannot be reached within 60 s it is gone already.
    """
    hold_lifeline()
    TCPStore(host, port, is_master=False, timeout=_LEAVE).add("left", 1)
    os._exit(EXIT_OK)


def _connect(job: RankJob) -> Store:
    """A client of the job's store in which this cell has its own keys."""
    client = TCPStore(
        job.store_host,
        job.store_port,
        job.world_size,
        is_master=False,
        timeout=_CONNECT,
        wait_for_workers=False,
    )

    # Beside the keys that torch itself sets under the cell's prefix.
    return PrefixStore(f"{job.store_prefix}/meet", client)
