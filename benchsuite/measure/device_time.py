"""Times on a device's stream: events are recorded on the way and read once, after the window.

A host that hands work to a device runs ahead of it, so its clock says nothing about a step, and
asking after each step would make the device wait. Every step ends with an event; so do the spans in
it (the gradient; a wait for a collective on the stream). `settle` synchronises once and returns the
device's times, for the rows of the step clock.
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
    """One step in ns: its end by the host's clock, and how long its spans took on the device."""

    end_ns: int
    compute_ns: int
    blocked_ns: int


def cuda_event() -> Event:
    """A new event that carries a time."""
    event: Event = torch.cuda.Event(enable_timing=True)
    return event


class DeviceTimer:
    """Times of one rank's steps on a device.

    It is made before the loop and started when the loop begins. Then `begin` and `end` mark spans,
    `end_step` marks steps, and `settle` reads them all.
    """

    def __init__(
        self,
        event: Callable[[], Event] = cuda_event,
        synchronise: Callable[[], None] = torch.cuda.synchronize,
    ) -> None:
        self._event = event
        self._synchronise = synchronise
        self.running = False
        self._steps: list[Event] = []  # the end of each step
        self._spans: list[tuple[int, str, Event, Event]] = []  # step, what, from, to
        self._open: dict[str, Event] = {}  # spans that have begun and not ended

    def start(self) -> None:
        """The window begins: waits until everything that was handed over before has passed."""
        self._synchronise()
        self._steps.clear()
        self._spans.clear()
        self._origin = self._mark()
        self.running = True
        self._origin_ns = time.perf_counter_ns()

    def begin(self, what: str) -> None:
        """Marks the beginning of a span: `compute` or `blocked`."""
        if self.running:
            self._open[what] = self._mark()

    def end(self, what: str) -> None:
        """Marks the end of a span that was begun; does nothing where none was."""
        if self.running and what in self._open:
            self._spans.append((len(self._steps), what, self._open.pop(what), self._mark()))

    def end_step(self) -> None:
        """Marks the end of a step."""
        self._steps.append(self._mark())

    def now_ns(self) -> int:
        """The host's clock, once the device has done what it was given."""
        self._synchronise()
        return time.perf_counter_ns()

    def settle(self) -> list[StepTimes]:
        """Waits for the device; returns the times of every step.

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
            # Events give a float32: fine from step to step, coarse from the start of a long run.
            at_ms += before.elapsed_time(event)
            before = event

            ends = self._origin_ns + round(at_ms * NS_PER_MS)
            compute_ns = round(spans["compute"] * NS_PER_MS)
            blocked_ns = round(spans["blocked"] * NS_PER_MS)
            times.append(StepTimes(ends, compute_ns, blocked_ns))

        return times

    def _mark(self) -> Event:
        """A new event, recorded where the stream is now."""
        event = self._event()
        event.record()
        return event
