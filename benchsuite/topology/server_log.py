"""What a parameter server notes of every push: the log that staleness, lock waits and lost updates
are read from.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np


class ServerLog:
    """One row per push in the order of arrival, preallocated. Times are this server's clock in ns.

    `abandoned`: gradients that had been given up before this push came.
    """

    FIELDS = (
        "worker",
        "tag",
        "version_read",
        "version_before",
        "version_next",
        "sent_ns",
        "apply_ns",
        "done_ns",
        "abandoned",
    )

    def __init__(self, num_pushes: int, num_workers: int) -> None:
        self._rows = np.full((max(num_pushes, 1), len(self.FIELDS)), -1, dtype=np.int64)
        self._claimed = 0
        self._lock = threading.Lock()
        self.version = 0  # optimiser steps done
        self.overlapped_replies = 0  # without lock: answers sent while another thread was applying
        self.replies = [0] * num_workers
        self.events: dict[str, int] = {}  # counts that the policy kept, e.g. drops
        self.losses: list[float] | None = None  # of the pushes, where the server computes them
        self.num_abandoned = 0  # gradients given up because an answer came first
        self.abandoned_versions = 0  # sum over them: version read next minus version read
        self.first_read = [0] * num_workers
        self.last_read = [0] * num_workers
        # versions that a worker was given and has not sent a ticket for: the first is what its next
        # ticket is about
        self._reads: list[deque[int]] = [deque([0]) for _ in range(num_workers)]
        self._open_row = [-1] * num_workers  # the worker's last push, unanswered
        self._waiting: list[deque[int]] | None = (
            None  # per worker its pushes that are applied later, oldest first
        )

    def push(self, worker: int, tag: int, sent_ns: int, now_ns: int) -> int:
        """Notes an arrival, returns its row."""
        with self._lock:
            row = self._claimed
            self._claimed = self._claimed + 1
            if row >= len(self._rows):
                self._rows = np.concatenate([self._rows, np.full_like(self._rows, -1)])

        reads = self._reads[worker]
        read = reads.popleft() if reads else self.last_read[worker]
        answered = (
            reads[0] if reads else -1
        )  # its version was over, and its answer sent, before it came

        self._rows[row] = (
            worker,
            tag,
            read,
            self.version,
            answered,
            sent_ns,
            now_ns,
            -1,
            self.num_abandoned,
        )

        self._open_row[worker] = row if answered < 0 else -1
        if self._waiting is not None:
            self._waiting[worker].append(row)

        return row

    def keep_waiting(self) -> None:
        """Pushes may be applied versions after their arrival: the policy says when (`applied`)."""
        self._waiting = [deque() for _ in self.replies]

    def read_ahead(self, pushes: int) -> None:
        """A worker sends so many pushes more than it has read answers: they too are about its first
        version.
        """
        for reads in self._reads:
            reads.extend([0] * pushes)

    def version_of(self, row: int) -> int:
        """The version that a push was computed on."""
        return int(self._rows[row, 2])

    def abandoned(self, worker: int) -> None:
        """Notes that the worker gave its gradient up for an answer that it has got."""
        reads = self._reads[worker]
        self.num_abandoned += 1
        self.abandoned_versions += reads[1] - reads[0]
        reads.popleft()

    def left(self, worker: int) -> None:
        """Notes a goodbye: answers that crossed with it count as read."""
        reads = self._reads[worker]
        self.abandoned_versions += reads[-1] - reads[0] if reads else 0
        reads.clear()

    def answered(self, worker: int) -> None:
        """Notes that `worker` now holds the current version."""
        version = self.version  # read once: without lock another thread may be applying
        self.last_read[worker] = version
        self._reads[worker].append(version)
        self.replies[worker] += 1
        row = self._open_row[worker]
        if row >= 0:
            self._rows[row, 4] = version
            self._open_row[worker] = -1

    def done(self, row: int, now_ns: int) -> None:
        """Notes that the policy has taken the push."""
        self._rows[row, 7] = now_ns

    def applied(self, oldest_of: Sequence[int] = ()) -> None:
        """One optimiser step is done. oldest_of: workers whose oldest waiting push was in it."""
        for worker in oldest_of:
            assert self._waiting is not None
            self._rows[self._waiting[worker].popleft(), 3] = self.version

        with self._lock:
            self.version += 1

    @property
    def num_pushes(self) -> int:
        """Pushes taken so far."""
        return self._claimed

    @property
    def num_used(self) -> int:
        """Batches used so far: pushed, or begun and given up."""
        return self._claimed + self.num_abandoned

    def columns(self) -> dict[str, list[int]]:
        """The log as columns of plain integers."""
        taken = self._rows[: self._claimed]
        return {name: taken[:, position].tolist() for position, name in enumerate(self.FIELDS)}

    @property
    def staleness(self) -> list[int]:
        """Per push: version just before its apply minus version read."""
        taken = self._rows[: self._claimed]
        return list((taken[:, 3] - taken[:, 2]).tolist())
