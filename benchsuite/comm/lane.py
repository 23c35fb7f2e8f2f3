"""A rank's second lane: a thread with its own process group, so that communication overlaps
computation."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchsuite.measure.device_time import DeviceTimer


class Owner(Protocol):
    """What a lane asks of the comm that it belongs to."""

    wait_ns: int
    timer: DeviceTimer | None

    @property
    def device(self) -> torch.device:
        """Where the backend works."""

    def lane_comm(self) -> Any:
        """The comm that the lane's thread uses, with a group of its own."""


class LaneHandle:
    """What one lane call returned or raised."""

    def __init__(self, comm: Owner) -> None:
        self._comm = comm
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None
        self._given: Any = None  # events, where the lane has a stream of its own
        self._passed: Any = None

    def wait(self) -> Any:
        start = time.perf_counter_ns()
        self._done.wait()
        self._comm.wait_ns += time.perf_counter_ns() - start
        if self._passed is not None:
            timer = self._comm.timer
            if timer is not None:
                timer.begin("blocked")
            torch.cuda.current_stream(self._comm.device).wait_event(self._passed)
            if timer is not None:
                timer.end("blocked")
        if self._error is not None:
            raise self._error
        return self._value


class Lane:
    """A thread with its own group that runs what it is handed, in order.

    Where the backend works on a device (nccl), on a stream of its own: it begins when the stream of
    whoever submits has come so far, and does not hold it up.
    """

    def __init__(self, comm: Owner) -> None:
        self._comm = comm
        self._stream = torch.cuda.Stream(comm.device) if comm.device.type == "cuda" else None
        self._queue: queue.SimpleQueue[
            tuple[Callable[..., Any], tuple[Any, ...], LaneHandle] | None
        ]
        self._queue = queue.SimpleQueue()
        threading.Thread(target=self._run, name="lane", daemon=True).start()

    def submit(self, fn: Callable[..., Any], *args: Any) -> LaneHandle:
        handle = LaneHandle(self._comm)
        if self._stream is not None:
            handle._given = torch.cuda.current_stream(self._comm.device).record_event()
        self._queue.put((fn, args, handle))
        return handle

    def close(self) -> None:
        """Ends the thread after what was submitted."""
        self._queue.put(None)

    def _run(self) -> None:
        lane_comm: Any = None
        while (submitted := self._queue.get()) is not None:
            fn, args, handle = submitted
            try:
                if lane_comm is None:
                    lane_comm = self._comm.lane_comm()
                handle._value = self._call(handle, fn, lane_comm, *args)
            except BaseException as error:  # noqa: BLE001  handed to whoever waits
                handle._error = error
            handle._done.set()

    def _call(self, handle: LaneHandle, fn: Callable[..., Any], *args: Any) -> Any:
        if self._stream is None:
            return fn(*args)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(handle._given)
            value = fn(*args)
            handle._passed = self._stream.record_event()
        return value
