"""`ServerPolicy`: what a parameter server does with pushes. A strategy supplies it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Steps(Protocol):
    """What a server applies with: `Updater`, or `Load` where it only averages."""

    def step(self, grad: Tensor, *, samples: int) -> None:
        """One step of the slice after so many samples of the budget."""


class Apply(Protocol):
    """One optimiser step on the server's slice."""

    def __call__(
        self, gradient: Tensor, *, num_gradients: int = 1, oldest_of: Sequence[int] = ()
    ) -> None:
        """`num_gradients`: how many pushes are in it. Version += 1. oldest_of: of a policy that
        `applies_later`, the workers whose oldest push of those not yet applied is in it: its
        staleness ends here, not at its arrival.
        """


class ServerPolicy(Protocol):
    """What a parameter server does with pushes. Called by the one loop,
    `topology/serving.py`.

    A policy inherits from this class; what is optional has its default here.
    """

    several_steps: bool = False
    """Whether one push may be several optimiser steps; between them nobody looks."""

    applies_later: bool = False
    """Whether a push may be applied after its arrival: its staleness ends there."""

    reads_ahead: int = 0
    """Answers of a worker that may be under way while it computes on an older one."""

    losses: list[float] | None = None
    """Losses of the steps, where the server computes them."""

    events: dict[str, int] | None = None
    """What the policy counted, by name; None where it counts nothing."""

    def start(self, shard: Tensor, apply: Apply) -> None:
        """`shard` is the server's slice; `apply(gradient)` is one optimiser step on it and version
        += 1.
        """

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        """Takes a gradient computed on `version`; returns the workers to answer now."""

    def on_goodbye(self, worker: int) -> list[int]:
        """A worker has finished; returns the workers to answer now."""

    def answer(self, worker: int) -> Tensor:
        """What `worker` is answered (default: the shard)."""

    def snapshot(self) -> Tensor:
        """The server's share of the parameters that count."""
