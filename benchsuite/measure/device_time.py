"""Times on a device's stream: events are recorded on the way and read once, after the window.

A host that hands work to a device runs ahead of it, so its clock says nothing about a step, and
asking after each step would make the device wait. Every step ends with an event; so do the spans in
it (the gradient; a wait for a collective on the stream). `settle` synchronises once and writes
device times into the rows of the step clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

NS_PER_MS = 1e6


class Event(Protocol):
    """What is used of `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None:
        """Marks where the current stream is."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this event to `end`, both passed."""


@dataclass(frozen=True)
class StepTimes:
    """Of one step, in ns: its end by the host's clock, and how long its spans took."""

    end_ns: int
    compute_ns: int
    blocked_ns: int


def cuda_event() -> Event:
    """A new event that carries a time."""
    event: Event = torch.cuda.Event(enable_timing=True)
    return event


class DeviceTimer:
    """One rank's.

    Made before the loop, `start`ed when it begins; then `begin`, `end`, `end_step`; then `settle`.
    """

    def __init__(
        self,
        event: Callable[[], Event] = cuda_event,
        synchronise: Callable[[], None] = torch.cuda.synchronize,
    ) -> None:
        self._event = event
        self._synchronise = synchronise
        self.running = False
        self._steps: list[Event] = []
        self._spans: list[tuple[int, str, Event, Event]] = []  # step, what, from, to
        self._open: dict[str, Event] = {}

    def start(self) -> None:
        """The window begins: everything before has passed."""
        self._synchronise()
        self._steps.clear()
        self._spans.clear()
        self._origin = self._mark()
        self.running = True
        self._origin_ns = time.perf_counter_ns()

    def begin(self, what: str) -> None:
        """A span begins here: `compute` or `blocked`."""
        if self.running:
            self._open[what] = self._mark()

    def end(self, what: str) -> None:
        """The span that was begun ends here."""
        if self.running and what in self._open:
            self._spans.append((len(self._steps), what, self._open.pop(what), self._mark()))

    def end_step(self) -> None:
        """A step ends here."""
        self._steps.append(self._mark())

    def now_ns(self) -> int:
        """The host's clock once the device has done what it was given."""
        self._synchronise()
        return time.perf_counter_ns()

    def settle(self) -> list[StepTimes]:
        """Waits for the device; the times of every step.

        What lies after the last step's end is not in them.
        """
        self._synchronise()
        self.running = False
        sums = [{"compute": 0.0, "blocked": 0.0} for _ in self._steps]
        for step, what, begin, end in self._spans:
            if step < len(sums):
                sums[step][what] += begin.elapsed_time(end)

        times = []
        at_ms = 0.0
        before = self._origin

        for event, spans in zip(self._steps, sums, strict=True):
            # A float32: fine from step to step, coarse from the start.
            at_ms += before.elapsed_time(event)
            before = event
            ends = self._origin_ns + round(at_ms * NS_PER_MS)
            times.append(
                StepTimes(
                    ends, round(spans["compute"] * NS_PER_MS), round(spans["blocked"] * NS_PER_MS)
                )
            )

        return times

    def _mark(self) -> Event:
        event = self._event()
        event.record()
        return event
