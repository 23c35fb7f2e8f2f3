"""How strategies, stragglers and numbers of workers are called on a page."""

from __future__ import annotations

_WORDS = {
    "native": "native all-reduce",
    "parameter_server": "parameter server",
    "ddp/native": "DistributedDataParallel",
    "local_sgd": "local SGD",
    "diloco": "DiLoCo",
    "powersgd": "PowerSGD",
    "topk": "top-k",
}
_SHORT = {
    **_WORDS,
    "native": "native",
    "synchronous": "sync",
    "asynchronous": "async",
    "stale_synchronous": "stale sync",
    "parameter_server": "server",
    "ddp/native": "DDP",
    "elastic_averaging": "elastic avg",
    "ring_neighbours": "ring",
    "random_matching": "matching",
    "halving_doubling": "halving-doubl.",
}


def label(series: str) -> str:
    """What a series is called.

    `synchronous/parameter_server lock=none` becomes `synchronous, parameter server (lock=none)`.
    """
    return _named(series, _WORDS, ", ")


def short(series: str) -> str:
    """A shorter label, for the axis of a small panel: `sync server`."""
    return _named(series, _SHORT, " ")


def _named(series: str, words: dict[str, str], separator: str) -> str:
    strategy, _, variant = series.partition(" ")
    named = words.get(strategy) or separator.join(
        words.get(p, p.replace("_", " ")) for p in strategy.split("/")
    )
    return f"{named} ({variant})" if variant else named


def slowed(straggler: str) -> str:
    """Who is slowed: `worker 0: 4x slower`, or `no straggler`."""
    return f"{straggler} slower" if straggler else "no straggler"


def workers(count: int) -> str:
    """A number of workers: `1 worker`, `2 workers`."""
    return f"{count} worker" if count == 1 else f"{count} workers"
