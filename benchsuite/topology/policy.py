"""What a parameter server does with pushes: the protocol `ServerPolicy`, which a strategy supplies.

The server loop (`topology/serving.py`) receives and answers; the policy decides which pushes are
applied when, and whom to answer when. It steps its slice by the `Apply` that the loop gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Steps(Protocol):
    """What a server steps its slice with.

    It is an `Updater`, or a `Load` where the server only averages.
    """

    def step(self, grad: Tensor, *, samples: int) -> None:
        """Makes one step of the slice with the gradient `grad`.

        `samples` of the budget were used before it: the learning-rate schedule goes by them.
        """


class Apply(Protocol):
    """What a policy calls to make one optimiser step on the server's slice."""

    def __call__(
        self, gradient: Tensor, *, num_gradients: int = 1, oldest_of: Sequence[int] = ()
    ) -> None:
        """Steps with `gradient`, in which there are `num_gradients` pushes; version += 1.

        A policy that `applies_later` says in `oldest_of` which workers' oldest push, of those not
        yet applied, is in it: the staleness of that push ends here, not at its arrival.
        """


class ServerPolicy(Protocol):
    """What a parameter server does with pushes. The server loop calls it.

    A policy inherits from this class; what is optional has its default here. Each server has a
    policy of its own, which knows of its own slice only; with several threads it is called by all
    of them.
    """

    several_steps: bool = False
    """Whether one push may be several optimiser steps.

    The parameters are then evaluated between pushes only, not between the steps of one.
    """

    applies_later: bool = False
    """Whether a push may be applied after its arrival; its staleness then ends at its apply."""

    reads_ahead: int = 0
    """How many answers to a worker may be under way while it computes on an older one."""

    losses: list[float] | None = None
    """Losses of the pushes, where the server computes them; None where it does not."""

    events: dict[str, int] | None = None
    """What the policy counted, by name; None where it counts nothing."""

    def start(self, shard: Tensor, apply: Apply) -> None:
        """Is called once, before the first push.

        `shard` is the server's slice of the parameters; `apply(gradient)` makes one optimiser step
        on it, and its version grows by 1.
        """

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        """Takes a gradient that `worker` computed on `version`; returns the workers to answer now.

        `flat` is the loop's memory: it is overwritten by the next push, so it is copied if kept.
        """

    def on_goodbye(self, worker: int) -> list[int]:
        """Notes that `worker` sends no more; returns the workers to answer now.

        Those who were held for this worker must be among them, or the run never ends.
        """

    def answer(self, worker: int) -> Tensor:
        """Gives the vector that `worker` is answered with, most often the shard itself."""

    def snapshot(self) -> Tensor:
        """Gives this server's share of the parameters that are evaluated."""
