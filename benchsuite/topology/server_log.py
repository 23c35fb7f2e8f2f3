"""The log of a parameter server: one row of versions and times for every push that it takes.

Staleness, lock waits and lost updates are read from it. Staleness of a push = version just before
its apply - version that its worker had read. The server loop (`topology/serving.py`) writes it;
several threads of one server may do so at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np


class ServerLog:
    """One row per push in the order of arrival, in preallocated memory.

    Times are in ns: `sent_ns` is when the worker sent the ticket, `apply_ns` when the push was
    there, `done_ns` when the policy had taken it. `version_next` is the version of the answer.
    `abandoned` is the number of gradients that had been given up before this push came.
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
        # (pushes, fields); -1 = not known yet
        self._rows = np.full((max(num_pushes, 1), len(self.FIELDS)), -1, dtype=np.int64)
        self._claimed = 0  # rows that are taken

        # Guards the claiming of rows and `version`, which threads share; the rest of a row belongs
        # to the thread that claimed it.
        self._lock = threading.Lock()

        self.version = 0  # optimiser steps done
        self.replies = [0] * num_workers

        # Answers that were sent while another thread was applying: only without a lock.
        self.overlapped_replies = 0

        # What the policy counted (drops, for example), and the losses of pushes where the server
        # computes them.
        self.events: dict[str, int] = {}
        self.losses: list[float] | None = None

        # Gradients given up because an answer came first, and the sum over them of version read
        # next minus version read.
        self.num_abandoned = 0
        self.abandoned_versions = 0

        self.first_read = [0] * num_workers
        self.last_read = [0] * num_workers

        # Versions that a worker was given and has not sent a ticket for yet: its next ticket is
        # about the first of them. All begin with version 0.
        self._reads: list[deque[int]] = [deque([0]) for _ in range(num_workers)]

        # Row of a worker's last push that is not answered yet; -1 = there is none.
        self._open_row = [-1] * num_workers

        # Rows of a worker's pushes that will be applied later, oldest first; None = pushes are
        # applied when they come.
        self._waiting: list[deque[int]] | None = None

    def push(self, worker: int, tag: int, sent_ns: int, now_ns: int) -> int:
        """Notes that a push has arrived, and returns the number of its row.

        `tag` is the number of the batch, `sent_ns` the time in the push's ticket.
        """
        with self._lock:
            row = self._claimed
            self._claimed = self._claimed + 1
            if row >= len(self._rows):
                self._rows = np.concatenate([self._rows, np.full_like(self._rows, -1)])

        # What follows concerns this worker alone, whom one thread serves: no lock is needed.
        reads = self._reads[worker]
        read = reads.popleft() if reads else self.last_read[worker]

        # A version left here means that the push came too late: its version was over, and its
        # answer sent, before it came.
        answered = reads[0] if reads else -1

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
        """Says that pushes may be applied after their arrival: `applied` will name them."""
        self._waiting = [deque() for _ in self.replies]

    def read_ahead(self, pushes: int) -> None:
        """Says that a worker sends its first pushes before it has read an answer.

        There are `pushes` of them beside the first one; they too are about version 0.
        """
        for reads in self._reads:
            reads.extend([0] * pushes)

    def version_of(self, row: int) -> int:
        """Gives the version that the push in this row was computed on."""
        return int(self._rows[row, 2])

    def abandoned(self, worker: int) -> None:
        """Notes that the worker gave its gradient up, because its next answer had come."""
        reads = self._reads[worker]

        # The next version that it was given minus the one that it gave up.
        self.num_abandoned += 1
        self.abandoned_versions += reads[1] - reads[0]
        reads.popleft()

    def left(self, worker: int) -> None:
        """Notes a worker's goodbye; answers that crossed with it on the way count as read."""
        reads = self._reads[worker]
        self.abandoned_versions += reads[-1] - reads[0] if reads else 0
        reads.clear()

    def answered(self, worker: int) -> None:
        """Notes that `worker` now holds the current version."""
        # Read once: without a lock another thread may be applying, and the three places below
        # would get different versions.
        version = self.version
        self.last_read[worker] = version
        self._reads[worker].append(version)
        self.replies[worker] += 1

        # Its last push was still waiting for this answer.
        row = self._open_row[worker]
        if row >= 0:
            self._rows[row, 4] = version
            self._open_row[worker] = -1

    def done(self, row: int, now_ns: int) -> None:
        """Notes that the policy has taken the push."""
        self._rows[row, 7] = now_ns

    def applied(self, oldest_of: Sequence[int] = ()) -> None:
        """Notes that one optimiser step is done.

        `oldest_of` names the workers whose oldest waiting push was in it.
        """
        # A row is complete now: its push was applied on the version that is about to end.
        for worker in oldest_of:
            assert self._waiting is not None
            self._rows[self._waiting[worker].popleft(), 3] = self.version

        with self._lock:
            self.version += 1

    @property
    def num_pushes(self) -> int:
        """How many pushes were taken so far."""
        return self._claimed

    @property
    def num_used(self) -> int:
        """How many batches were used so far: pushed, or begun and given up."""
        return self._claimed + self.num_abandoned

    def columns(self) -> dict[str, list[int]]:
        """Gives the log as columns of plain integers, by the names of `FIELDS`."""
        taken = self._rows[: self._claimed]  # (pushes, fields)
        return {name: taken[:, position].tolist() for position, name in enumerate(self.FIELDS)}

    @property
    def staleness(self) -> list[int]:
        """Gives for each push the version just before its apply minus the version read."""
        taken = self._rows[: self._claimed]
        return list((taken[:, 3] - taken[:, 2]).tolist())
