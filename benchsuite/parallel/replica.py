"""The ranks of one replica, as its parts see them: for the library a process group, for our own numbers a `Comm`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchsuite.comm import Comm, Traffic

NUMBER_BYTES = 8  # one float64


@dataclass(frozen=True)
class Replica:
    """`comm.rank` is the number of the part. `group` holds the same ranks in the same order."""

    comm: Comm
    group: Any  # torch.distributed.ProcessGroup in torch's own table
    device: torch.device

    @property
    def part(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    def sum(self, value: float) -> float:
        """Sum over the parts, added in their order: the same bits on all. 2 (n-1) messages of 8 bytes."""
        mine, other = self._number(value), self._number(0.0)
        if self.part:
            self.comm.send(mine, 0)
            self.comm.recv(mine, 0)
            return float(mine)
        for part in range(1, self.size):
            self.comm.recv(other, part)
            mine.add_(other)
        for part in range(1, self.size):
            self.comm.send(mine, part)
        return float(mine)

    def tell(self, value: float, *, root: int) -> float:
        """The root's value, on all. n-1 messages of 8 bytes."""
        number = self._number(value)
        if self.part != root:
            self.comm.recv(number, root)
        else:
            for part in range(self.size):
                if part != root:
                    self.comm.send(number, part)
        return float(number)

    def norm(self, owned: Tensor) -> float:
        """Norm of the replica's whole gradient; `owned`: what this part owns of it."""
        return math.sqrt(self.sum(float(torch.dot(owned, owned))))

    def all_finite(self, params: Tensor) -> bool:
        """Whether every part's parameters are finite. Asked on all of them, where the common loss is not."""
        return not self.sum(0.0 if bool(torch.isfinite(params).all()) else 1.0)

    def _number(self, value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64, device=self.device)


def sum_traffic(size: int) -> Traffic:
    """Of one `Replica.sum`."""
    traffic = Traffic()
    for part in range(1, size):
        traffic.add(part, 0, NUMBER_BYTES)
        traffic.add(0, part, NUMBER_BYTES)
    return traffic


def tell_traffic(size: int, root: int) -> Traffic:
    """Of one `Replica.tell`."""
    traffic = Traffic()
    for part in range(size):
        if part != root:
            traffic.add(root, part, NUMBER_BYTES)
    return traffic
