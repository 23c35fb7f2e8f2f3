"""Snapshots: copies of the parameters that count, which are evaluated after the run.

Evaluation so never disturbs the run; only the copying is inside the clock. Copies over 64 MiB in
all are spilled to the run directory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchsuite.plan import hashing

SPILL_ABOVE_BYTES = 64 * 2**20


class Snapshots:
    """One rank's copies, taken when the samples consumed pass a multiple of `every`.

    every: 0 = only at the end. settled_ns: the clock of a device's rank, which waits for the
    device.
    """

    def __init__(
        self,
        every: int,
        run_dir: str | Path,
        name: str,
        *,
        settled_ns: Callable[[], int] | None = None,
    ) -> None:
        self._every = every
        self._next = 0  # samples at which the next copy is due
        self._settled_ns = settled_ns
        self._folder = Path(run_dir)
        self._name = name
        self._kept: list[Tensor | Path] = []
        self._bytes = 0
        self.samples: list[int] = []
        self.time_ns: list[int] = []
        self.version: list[int] = []

    def offer(
        self, flat: Tensor, *, samples: int, version: int, time_ns: int, last: bool = False
    ) -> None:
        """Takes a copy where one is due; `last` takes one in any case, once per number of samples.

        time_ns: now, by the clock of the run. On a device the copy's own end counts instead.
        """
        due = self._every > 0 and samples >= self._next
        taken_already = bool(self.samples) and self.samples[-1] == samples
        if not due and (not last or taken_already):
            return

        # The next one is due at a multiple of `every`, however far this one is behind its own.
        if self._every > 0:
            self._next = (samples // self._every + 1) * self._every
        self._keep(flat)
        self.samples.append(samples)
        self.version.append(version)
        self.time_ns.append(time_ns if self._settled_ns is None else self._settled_ns())

    def _keep(self, flat: Tensor) -> None:
        """Copies the vector to memory, or to a file once the copies are many.

        The first stays in memory.
        """
        self._bytes += flat.numel() * flat.element_size()

        if self._bytes <= SPILL_ABOVE_BYTES or not self._kept:
            self._kept.append(flat.detach().clone())
            return

        path = self._folder / f"snapshot-{self._name}-{len(self._kept)}.npy"
        np.save(path, flat.detach().cpu().numpy(), allow_pickle=False)
        self._kept.append(path)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, position: int) -> Tensor:
        kept = self._kept[position]
        if isinstance(kept, Tensor):
            return kept.cpu()

        return torch.from_numpy(np.load(kept, allow_pickle=False))


def checksum(vector: Tensor) -> str:
    """The sha256 of a vector's bytes."""
    content = vector.detach().cpu().contiguous().numpy().tobytes()
    return hashing.checksum(content)
