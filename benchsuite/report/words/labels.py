"""How strategies, stragglers and numbers of workers are called on a page."""

from __future__ import annotations

from benchsuite.plan import declared


def label(series: str) -> str:
    """What a series is called.

    `synchronous/parameter_server lock=none` becomes `synchronous, parameter server (lock=none)`.
    """
    return _named(series, short=False, separator=", ")


def short(series: str) -> str:
    """A shorter label, for the axis of a small panel: `sync server`."""
    return _named(series, short=True, separator=" ")


def _named(series: str, *, short: bool, separator: str) -> str:
    """Each member under the label that its file declares."""
    strategy, _, variant = series.partition(" ")
    parts = strategy.split("/")
    named = declared.label_with_topology(parts[0], short=short) if len(parts) == 2 else ""
    named = named or separator.join(declared.labels(part, short=short) for part in parts)
    return f"{named} ({variant})" if variant else named


def slowed(straggler: str) -> str:
    """Who is slowed: `worker 0: 4x slower`, or `no straggler`."""
    return f"{straggler} slower" if straggler else "no straggler"


def workers(count: int) -> str:
    """A number of workers: `1 worker`, `2 workers`."""
    return f"{count} worker" if count == 1 else f"{count} workers"
