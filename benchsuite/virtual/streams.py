"""How long each gradient of each worker takes, by counter-based random streams.

Strategies so meet the same draws: the k-th gradient of worker w under seed s takes the same time in
every cell, because a draw is a function of (seed, worker, purpose, step) alone. Philox blocks of
256 steps are drawn at once and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchsuite.plan import compute_time

BLOCK = 256
LONGEST_NS = 2**60  # 36 years
# Purposes of a stream: each has draws of its own.
COMPUTE = 1
SPELL = 2

Floats = np.ndarray[Any, np.dtype[np.float64]]


def generator(seed: int, worker: int, purpose: int, block: int) -> np.random.Generator:
    """The stream of one block of steps: Philox4x64-10 (Salmon et al. 2011).

    Its key and counter are these four numbers.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, worker, block], dtype=np.uint64)

    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class ComputeTimes:
    """The compute time of each step of each worker, in ns.

    table: the cell's `compute_time`. samples: the batch of one worker. factors: worker -> how many
    times slower it is.
    """

    def __init__(
        self,
        table: Mapping[str, Any],
        *,
        seed: int,
        samples: float,
        factors: Mapping[int, float] | None = None,
    ) -> None:
        self._kind = str(table["kind"])
        self._table = table
        self._seed = seed
        self._factors = factors or {}
        self._draw: Callable[[np.random.Generator], Floats] = getattr(self, f"_{self._kind}")
        # Draws have the mean 1, or that of the measured times; the scale turns them into ns.
        mean = compute_time.mean_s(table, samples)
        self._measured = (
            np.array(compute_time.values(table)) if self._kind == "resampled" else np.ones(1)
        )
        self._scale = 1e9
        if mean is not None:
            self._scale = 1e9 * mean / float(self._measured.mean())
        self._blocks: dict[int, tuple[int, list[int]]] = {}  # worker -> (number, its times)
        # Of kind = markov: worker -> whether its last block ended in a slow spell.
        self._slow: dict[int, bool] = {}

    def ns(self, worker: int, step: int) -> int:
        """Time of the worker's step-th gradient. Steps of a worker are asked for in order."""
        # Blocks are drawn whole, so the k-th draw does not depend on how far a run has come.
        number, at = divmod(step, BLOCK)
        block = self._blocks.get(worker)
        if block is None or block[0] != number:
            block = self._blocks[worker] = (number, self._block(worker, number))
        return block[1][at]

    def _block(self, worker: int, number: int) -> list[int]:
        """The times of one block of a worker's steps, in whole ns."""
        if self._kind == "markov":
            drawn = self._markov_block(worker, number)
        else:
            drawn = self._draw(generator(self._seed, worker, COMPUTE, number))

        scaled = drawn * self._scale * self._factors.get(worker, 1.0)
        # Clipped before it is an integer: a heavy tail may leave 64 bits.
        within = np.clip(scaled, 1, LONGEST_NS)
        times: list[int] = np.rint(within).astype(np.int64).tolist()
        return times

    # -- distributions with mean 1 -----------------------------------------------------------------

    def _fixed(self, stream: np.random.Generator) -> Floats:
        """Every gradient takes the mean."""
        return np.ones(BLOCK)

    def _exponential(self, stream: np.random.Generator) -> Floats:
        return np.asarray(stream.standard_exponential(BLOCK))

    def _shifted_exponential(self, stream: np.random.Generator) -> Floats:
        """A fixed share of the mean, and an exponential rest."""
        shift = float(self._table["shift"])
        return shift + (1 - shift) * stream.standard_exponential(BLOCK)

    def _gamma(self, stream: np.random.Generator) -> Floats:
        """Gamma with the coefficient of variation `cv`."""
        # Gamma(k) / k has the mean 1 and the coefficient of variation k^(-1/2).
        shape = float(self._table["cv"]) ** -2
        return stream.standard_gamma(shape, BLOCK) / shape

    def _log_normal(self, stream: np.random.Generator) -> Floats:
        """Log-normal with the coefficient of variation `cv`."""
        # exp(N(-v/2, v)) has the mean 1 and the coefficient of variation sqrt(e^v - 1).
        variance = math.log1p(float(self._table["cv"]) ** 2)
        drawn: Floats = np.exp(math.sqrt(variance) * stream.standard_normal(BLOCK) - variance / 2)

        return drawn

    def _pareto(self, stream: np.random.Generator) -> Floats:
        """Pareto with the tail index `shape`: rare gradients take very long."""
        shape = float(self._table["shape"])
        # numpy draws Lomax, Pareto from 0: 1 + it has the mean shape / (shape - 1).
        return (1 + stream.pareto(shape, BLOCK)) * (shape - 1) / shape

    def _resampled(self, stream: np.random.Generator) -> Floats:
        """Measured times, drawn with replacement."""
        return np.array(self._measured[stream.integers(0, len(self._measured), BLOCK)])

    def _markov(self, stream: np.random.Generator) -> Floats:
        raise AssertionError("a spell goes on from block to block: `_markov_block`")

    def _markov_block(self, worker: int, number: int) -> Floats:
        """Fast and slow spells of a worker, which go on from block to block.

        In the long run a share enter / (enter + leave) of the steps is slow.
        """
        enter = float(self._table["enter"])
        leave = float(self._table["leave"])
        share = enter / (enter + leave)
        factor = float(self._table["slow_factor"])
        fast = 1 / (1 - share + share * factor)  # so that the mean is 1
        uniform = generator(self._seed, worker, SPELL, number).random(BLOCK + 1)
        # The first block begins slow with the share that it has in the long run.
        slow = bool(uniform[BLOCK] < share) if number == 0 else self._slow[worker]
        times = np.empty(BLOCK)

        for step in range(BLOCK):
            times[step] = fast * factor if slow else fast
            if slow:
                slow = not uniform[step] < leave
            else:
                slow = bool(uniform[step] < enter)

        self._slow[worker] = slow
        return times
