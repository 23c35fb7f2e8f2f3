"""A strategy that does nothing, so that what is left of a step is the harness itself.

`selfcheck` gives it to cells by its path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchsuite.comm.traffic import Traffic


@dataclass
class Strategy:
    """Takes a batch, computes nothing, sends nothing."""

    snapshot_of = "replica"
    clips_mean = True

    def start(self, comm: Any, part: Any, recipe: Any, topology: Any, compression: Any) -> None:
        self._part = part
        self._step = 0
        self._steps = recipe.budget // recipe.global_batch
        self.events: dict[str, int] = {}

    def next_index(self) -> tuple[int, int, int] | None:
        return None if self._step == self._steps else (self._step, 0, 1)

    def step(self, batch: Any) -> float:
        self._step += 1
        return 0.0

    def finish(self) -> None:
        """Does nothing, because nothing is under way."""

    def snapshot(self) -> Tensor:
        params: Tensor = self._part.params
        return params

    def predicted_traffic(
        self, shapes: Any, events: Mapping[str, Sequence[int]], setting: Any
    ) -> Traffic:
        return Traffic()
