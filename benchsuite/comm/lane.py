"""A rank's second lane: a thread with its own process group, so that communication overlaps
computation.

The first lane is the rank's main thread. It hands a function to the second one (`Lane.submit`),
goes on computing, and asks for the result when it needs it (`LaneHandle.wait`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchsuite.measure.device_time import DeviceTimer


class Owner(Protocol):
    """What a lane asks of the comm that it belongs to.

    It is a protocol of its own so that this file need not know of process groups: the lane only
    asks for a comm to hand to its functions.
    """

    wait_ns: int  # time the main thread was blocked in communication
    timer: DeviceTimer | None  # the same on a device

    @property
    def device(self) -> torch.device:
        """The device whose memory the backend moves."""

    def lane_comm(self) -> Any:
        """The comm that the lane's thread uses, with a group of its own."""


class LaneHandle:
    """What one call on the lane returned or raised.

    The lane's thread writes the value or the error before it sets `_done`, and the main thread
    reads them after: the event is all the locking that they need.
    """

    def __init__(self, comm: Owner) -> None:
        self._comm = comm
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

        # Two events of the device, where the lane has a stream of its own: how far the main stream
        # had come when the call was submitted, and the end of the call on the lane's stream.
        self._given: Any = None
        self._passed: Any = None

    def wait(self) -> Any:
        """Blocks until the call is done; returns what it returned, or raises what it raised.

        Only the time spent here counts as blocked: what the lane did meanwhile was hidden behind
        the computation.
        """
        start = time.perf_counter_ns()
        self._done.wait()
        self._comm.wait_ns += time.perf_counter_ns() - start

        # The thread is done when its work is queued, not when the device has run it: the main
        # stream waits for the lane's, or it would read a vector that is still being received.
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

    Where the backend works on a device (nccl), the lane has a stream of its own there: it begins
    when the stream of whoever submits has come so far, and does not hold that stream up.
    """

    def __init__(self, comm: Owner) -> None:
        self._comm = comm
        self._stream = torch.cuda.Stream(comm.device) if comm.device.type == "cuda" else None

        # What is to be run, in order; None is the end.
        self._queue: queue.SimpleQueue[
            tuple[Callable[..., Any], tuple[Any, ...], LaneHandle] | None
        ]

        self._queue = queue.SimpleQueue()

        # A daemon: a rank that fails elsewhere must not hang in a receive of its lane.
        threading.Thread(target=self._run, name="lane", daemon=True).start()

    def submit(self, fn: Callable[..., Any], *args: Any) -> LaneHandle:
        """Queues `fn(lane_comm, *args)` and returns at once.

        On a device the handle carries an event of the caller's stream, because the vectors that
        `fn` will send may still be under way there.
        """
        handle = LaneHandle(self._comm)

        if self._stream is not None:
            main_stream = torch.cuda.current_stream(self._comm.device)
            handle._given = main_stream.record_event()

        self._queue.put((fn, args, handle))
        return handle

    def close(self) -> None:
        """Ends the thread after what was submitted, and does not wait for that."""
        self._queue.put(None)

    def _run(self) -> None:
        """The thread's loop. The comm is made by its first call, on the thread that will use it.

        Making a process group takes as long as the slowest rank needs to come to it. Here that
        holds up this thread only, and its failure reaches whoever waits for the call.
        """
        lane_comm: Any = None

        while (submitted := self._queue.get()) is not None:
            fn, args, handle = submitted

            try:
                if lane_comm is None:
                    lane_comm = self._comm.lane_comm()

                handle._value = self._call(handle, fn, lane_comm, *args)
            except BaseException as error:  # noqa: BLE001  handed to whoever waits
                handle._error = error

            # Last of all: from here on the main thread reads the handle.
            handle._done.set()

    def _call(self, handle: LaneHandle, fn: Callable[..., Any], *args: Any) -> Any:
        """Calls `fn`, on the lane's stream where there is one, between the handle's two events."""
        if self._stream is None:
            return fn(*args)

        with torch.cuda.stream(self._stream):
            self._stream.wait_event(handle._given)
            value = fn(*args)
            handle._passed = self._stream.record_event()

        return value
