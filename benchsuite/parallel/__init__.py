"""How one replica computes its gradient: `Parallel` makes a `Part` of the workload on each rank."""

from __future__ import annotations

from typing import Protocol

import torch

from benchsuite.comm import Comm
from benchsuite.workload import Part, Workload


class Parallel(Protocol):
    """One file in `parallel/`; the class's fields are its options."""

    def build(
        self, workload: Workload, comm: Comm | None, *, seed: int, dtype: torch.dtype, device: torch.device
    ) -> Part:
        """This rank's part. `comm` joins the ranks of one replica (None where a replica is one rank)."""
