"""`ServerPolicy`: what a parameter server does with pushes. A strategy supplies it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Apply(Protocol):
    """One optimiser step on the server's slice."""

    def __call__(
        self, gradient: Tensor, *, num_gradients: int = 1, oldest_of: Sequence[int] = ()
    ) -> None:
        """`num_gradients`: how many pushes are in it. Version += 1. oldest_of: of a policy that
        `applies_later`, the workers whose oldest push of those not yet applied is in it: its
        staleness ends here, not at its arrival."""


class ServerPolicy(Protocol):
    """What a parameter server does with pushes. Called by the one loop,
    `topology/serving.py`.

    `several_steps = True` (a class attribute): one push may be several optimiser steps; between
    them nobody looks.
    """

    def start(self, shard: Tensor, apply: Apply) -> None:
        """`shard` is the server's slice; `apply(gradient)` is one optimiser step on it and version
        += 1."""

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        """Takes a gradient computed on `version`; returns the workers to answer now."""

    def on_goodbye(self, worker: int) -> list[int]:
        """A worker has finished; returns the workers to answer now."""

    def answer(self, worker: int) -> Tensor:
        """What `worker` is answered (default: the shard)."""

    def snapshot(self) -> Tensor:
        """The server's share of the parameters that count."""
