"""The barrier of ranks that share a host: unix stream sockets, one byte to and from every peer. No
spin.

16 us between two ranks and 60 us between four, where a process group's barrier takes milliseconds;
a peer that dies is the end of its stream, seen at once. A rank listens on an abstract socket of a
random name (no file is left behind), which it publishes in the store with a secret; every rank
connects to those before it.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Sequence
from typing import Any

_SECRET_BYTES = 16

# What a rank says first on a new connection: its own rank, and the secret of the rank it greets.
_GREETING = struct.Struct(f"<i{_SECRET_BYTES}s")

# The kernel's `struct timeval`, which SO_RCVTIMEO takes: seconds and microseconds.
_TIME = struct.Struct("@ll")


class SocketBarrier:
    """A barrier that all ranks of a comm make together.

    `names` says what each rank is called in errors, for instance its rank in the whole run.
    """

    def __init__(self, store: Any, *, rank: int, names: Sequence[int], timeout_s: float) -> None:
        self._names = names
        self._timeout_s = timeout_s

        # The other ranks in their order, each with the connection to it.
        self._peers: list[tuple[int, socket.socket]] = []
        size = len(names)

        # The secret keeps strangers out: anybody on the host may connect to an abstract socket.
        secret = secrets.token_bytes(_SECRET_BYTES)

        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.settimeout(timeout_s)
            address = f"benchsuite-{secrets.token_hex(12)}".encode()
            listener.bind(b"\0" + address)
            listener.listen(size)

            # Published only now that it listens, so that nobody is refused.
            store.set(f"barrier/{rank}", secret + address)

            # Of two ranks the later one connects and the earlier one accepts.
            found = {other: self._connect(store, rank, other) for other in range(rank)}

            while len(found) < size - 1:
                other, peer = self._accept(listener, secret)
                found[other] = peer

        self._peers = sorted(found.items())
        self._set_timeouts()

    def _set_timeouts(self) -> None:
        """Has the kernel end a receive that lasts too long.

        Python's own time-out polls before every receive, which is a system call more.
        """
        whole_s = int(self._timeout_s)
        rest_us = int((self._timeout_s - whole_s) * 1e6)
        limit = _TIME.pack(whole_s, rest_us)

        for _, peer in self._peers:
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def wait(self) -> None:
        """Returns when all have called it.

        RuntimeError names a peer that is gone, or that is late beyond the time-out.
        """
        # All are told before any is waited for. One byte always fits a socket's buffer, so the
        # sends do not block.
        for other, peer in self._peers:
            try:
                peer.send(b"\0")
            except ConnectionError:
                raise self._gone(other) from None

        for other, peer in self._peers:
            try:
                arrived = peer.recv(1)
            except ConnectionError:
                raise self._gone(other) from None
            except BlockingIOError:
                raise RuntimeError(
                    f"rank {self._names[other]} did not come to the barrier of its host: timed out "
                    "after "
                    f"{self._timeout_s:g} s"
                ) from None

            # The stream of a peer that is gone gives no byte, and no error either.
            if not arrived:
                raise self._gone(other)

    def close(self) -> None:
        """Ends the connections, by which the peers see that this rank is gone.

        The kernel does the same for a process that dies, so nobody waits for the time-out.
        """
        for _, peer in self._peers:
            peer.close()

    def _gone(self, other: int) -> RuntimeError:
        """The error to raise where the connection to a peer has ended.

        It names the peer as the run does, because the rank here is only that of a host.
        """
        return RuntimeError(
            f"rank {self._names[other]} is gone: its end of the host's barrier was closed by peer"
        )

    def _connect(self, store: Any, rank: int, other: int) -> socket.socket:
        """Connects to an earlier rank and says who this is.

        The store's `get` waits until that rank has published its secret and its address.
        """
        published = bytes(store.get(f"barrier/{other}"))
        secret = published[:_SECRET_BYTES]
        address = published[_SECRET_BYTES:]

        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(self._timeout_s)
        peer.connect(b"\0" + address)
        peer.sendall(_GREETING.pack(rank, secret))

        return peer

    def _accept(self, listener: socket.socket, secret: bytes) -> tuple[int, socket.socket]:
        """The next peer that knows the secret; whoever does not is hung up on.

        Later ranks connect in whatever order they come, so the greeting says which one it is.
        """
        while True:
            peer, _ = listener.accept()
            peer.settimeout(self._timeout_s)
            greeting = peer.recv(_GREETING.size, socket.MSG_WAITALL)

            if len(greeting) == _GREETING.size:
                other, told = _GREETING.unpack(greeting)
                if secrets.compare_digest(told, secret) and 0 <= other < len(self._names):
                    return other, peer

            peer.close()
