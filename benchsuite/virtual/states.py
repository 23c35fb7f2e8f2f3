"""What a module carries from one gradient to the next besides parameters, kept apart for each rank.

These are buffers (running statistics, counters) and torch's random state (dropout). Ranks of one
process share the module: a rank's set is put in when it is its turn, as if it were in a process of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchsuite.worker.setup import seed_rank

_random = torch.default_generator


class ModuleStates:
    """One set of buffers and random state per rank, made when it is first needed.

    A fresh rank has the buffers as built and its own random state. changing: whether gradients
    change them at all; only then they are put in and taken out.
    """

    def __init__(self, module: nn.Module, seed: int) -> None:
        self._buffers = list(module.buffers())
        self._seed = seed
        # The buffers as built, with which every rank begins.
        self._start = [buffer.clone() for buffer in self._buffers]
        self._kept: dict[int, tuple[list[Tensor], Tensor]] = {}
        self.changing = False

    def look(self, gradient: Callable[[], object]) -> None:
        """Computes one gradient to see whether it changes anything; puts everything back."""
        outside = _random.get_state()
        gradient()

        moved = any(
            not _equal(now, then) for now, then in zip(self._buffers, self._start, strict=True)
        )
        self.changing = moved or not torch.equal(_random.get_state(), outside)
        self._put(self._start, outside)

    @contextmanager
    def of(self, rank: int) -> Iterator[None]:
        """A context inside which the module is the rank's."""
        if not self.changing:
            yield
            return

        outside = _random.get_state()
        if rank in self._kept:
            self._put(*self._kept[rank])
        else:
            self._put(self._start, outside)
            # Its first gradient: as a fresh process of this rank would begin.
            seed_rank(self._seed, rank)

        try:
            yield
        finally:
            buffers = [buffer.clone() for buffer in self._buffers]
            self._kept[rank] = (buffers, _random.get_state())
            self._put(self._start, outside)

    def _put(self, buffers: list[Tensor], random_state: Tensor) -> None:
        """Gives the module these buffers, and torch this random state."""
        with torch.no_grad():
            for buffer, value in zip(self._buffers, buffers, strict=True):
                buffer.copy_(value)

        _random.set_state(random_state)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two buffers are equal, NaN being equal to NaN."""
    if a.is_floating_point():
        return torch.equal(a.nan_to_num(), b.nan_to_num())

    return torch.equal(a, b)
