"""A `torch.distributed` store inside one process, where ranks that are threads meet.

torch's own stores do not fit. TCPStore formats the address of every connection with a reverse
look-up of ::ffff:127.0.0.1, which takes 5 s where the resolver is slow (the suite's processes run
in a private network namespace, where the look-up fails at once). HashStore wakes one waiter only,
so tickets get lost.
"""

from __future__ import annotations

import threading
from collections import deque
from datetime import timedelta

import torch.distributed as dist


class _Shared:
    """The content of one store, which all its prefixed views share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.values: dict[str, bytes] = {}
        self.queues: dict[str, deque[bytes]] = {}


class MemoryStore(dist.Store):
    """A store over a dictionary with set, get, add, wait and queues; `prefixed` gives a view of a
    part.
    """

    def __init__(
        self, *, timeout_s: float, prefix: str = "", shared: _Shared | None = None
    ) -> None:
        super().__init__()
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._shared = shared if shared is not None else _Shared()

    def prefixed(self, prefix: str) -> MemoryStore:
        """A view of the same store in which every key starts with `prefix/`."""
        return MemoryStore(
            timeout_s=self._timeout_s, prefix=f"{self._prefix}{prefix}/", shared=self._shared
        )

    def set(self, key: str, value: str | bytes) -> None:
        with self._shared.changed:
            self._shared.values[self._prefix + key] = (
                value.encode() if isinstance(value, str) else bytes(value)
            )
            self._shared.changed.notify_all()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._shared.values[self._prefix + key]

    def add(self, key: str, amount: int) -> int:
        with self._shared.changed:
            value = int(self._shared.values.get(self._prefix + key, b"0")) + amount
            self._shared.values[self._prefix + key] = str(value).encode()
            self._shared.changed.notify_all()
            return value

    def check(self, keys: list[str]) -> bool:
        return all(self._prefix + key in self._shared.values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        limit = self._timeout_s if timeout is None else timeout.total_seconds()
        with self._shared.changed:
            if not self._shared.changed.wait_for(lambda: self.check(keys), limit):
                raise dist.DistStoreError(f"{keys} not set within {limit} s")

    def queue_push(self, key: str, value: str | bytes) -> None:
        item = value.encode() if isinstance(value, str) else value
        with self._shared.changed:
            self._shared.queues.setdefault(self._prefix + key, deque()).append(item)
            self._shared.changed.notify_all()

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        queue = self._shared.queues.setdefault(self._prefix + key, deque())
        with self._shared.changed:
            if not self._shared.changed.wait_for(
                lambda: bool(queue), self._timeout_s if block else 0
            ):
                raise dist.DistStoreError(f"no ticket in {key} within {self._timeout_s} s")
            return queue.popleft()
