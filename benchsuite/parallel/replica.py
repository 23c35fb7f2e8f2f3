"""The ranks of one replica, as its parts see them.

They are joined twice: by a process group, through which torch's libraries talk, and by a `Comm`,
through which our own numbers go (the loss, the norm of the gradient).
"""

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
    """How a part reaches the other parts of its replica.

    `comm.rank` is the number of the part. `group` holds the same ranks in the same order.
    """

    comm: Comm
    group: Any  # torch.distributed.ProcessGroup in torch's own table
    device: torch.device

    @property
    def part(self) -> int:
        """Number of this rank's part, from 0."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """Number of parts that the replica is divided into."""
        return self.comm.size

    def sum(self, value: float) -> float:
        """Sum of a number over the parts.

        It is added in the order of the parts, so all of them get the same bits; an all-reduce of
        the library may promise no order. Sends 2 (n-1) messages of 8 bytes.
        """
        return sum_number(self.comm, range(self.size), value, device=self.device)

    def norm(self, owned: Tensor) -> float:
        """Norm of the replica's whole gradient; `owned` is what this part owns of it.

        Copies of what another part owns (tied weights) are left out, or they would count twice.
        """
        square = float(torch.dot(owned, owned))
        return math.sqrt(self.sum(square))

    def all_finite(self, params: Tensor) -> bool:
        """Whether every part's parameters are finite.

        All parts ask it together, once the loss that they have in common is not finite.
        """
        mine = bool(torch.isfinite(params).all())
        num_broken = self.sum(0.0 if mine else 1.0)

        return num_broken == 0


def sum_traffic(size: int) -> Traffic:
    """Predicts the traffic of one `Replica.sum`."""
    return sum_number_traffic(range(size))


def tell_traffic(size: int, root: int) -> Traffic:
    """Traffic of a float64 that part `root` tells the others, one message to each."""
    traffic = Traffic()

    for part in range(size):
        if part != root:
            traffic.add(root, part, NUMBER_BYTES)

    return traffic
