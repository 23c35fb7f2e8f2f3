"""The ranks of one replica, as its parts see them: for the library a process group, for our own
numbers a `Comm`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.topology import NUMBER_BYTES, sum_number, sum_number_traffic


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
        """Sum over the parts, added in their order: the same bits on all. 2 (n-1) messages of 8
        bytes."""
        return sum_number(self.comm, range(self.size), value, device=self.device)

    def norm(self, owned: Tensor) -> float:
        """Norm of the replica's whole gradient; `owned`: what this part owns of it."""
        return math.sqrt(self.sum(float(torch.dot(owned, owned))))

    def all_finite(self, params: Tensor) -> bool:
        """Whether every part's parameters are finite. Asked on all of them, where the common loss
        is not."""
        return not self.sum(0.0 if bool(torch.isfinite(params).all()) else 1.0)


def sum_traffic(size: int) -> Traffic:
    """Of one `Replica.sum`."""
    return sum_number_traffic(range(size))


def tell_traffic(size: int, root: int) -> Traffic:
    """Of a float64 that part `root` tells the others."""
    traffic = Traffic()
    for part in range(size):
        if part != root:
            traffic.add(root, part, NUMBER_BYTES)

    return traffic
