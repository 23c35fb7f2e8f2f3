"""A rank's second lane: a thread with its own process group, so that communication overlaps computation."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchsuite.comm.process import ProcessComm


class LaneHandle:
    """What one lane call returned or raised."""

    def __init__(self, comm: ProcessComm) -> None:
        self._comm, self._done = comm, threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

    def wait(self) -> Any:
        start = time.perf_counter_ns()
        self._done.wait()
        self._comm.wait_ns += time.perf_counter_ns() - start
        if self._error is not None:
            raise self._error
        return self._value


class Lane:
    """A thread with its own group that runs what it is handed, in order."""

    def __init__(self, comm: ProcessComm) -> None:
        self._comm = comm
        self._queue: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], LaneHandle] | None]
        self._queue = queue.SimpleQueue()
        threading.Thread(target=self._run, name="lane", daemon=True).start()

    def submit(self, fn: Callable[..., Any], *args: Any) -> LaneHandle:
        handle = LaneHandle(self._comm)
        self._queue.put((fn, args, handle))
        return handle

    def close(self) -> None:
        """Ends the thread after what was submitted."""
        self._queue.put(None)

    def _run(self) -> None:
        lane_comm: ProcessComm | None = None
        while (submitted := self._queue.get()) is not None:
            fn, args, handle = submitted
            try:
                if lane_comm is None:
                    lane_comm = self._comm._child(f"{self._comm._name}/lane", range(self._comm.size))
                handle._value = fn(lane_comm, *args)
            except BaseException as error:  # noqa: BLE001  handed to whoever waits
                handle._error = error
            handle._done.set()
