"""How one replica computes its gradient: `Parallel` makes a `Part` of the workload on each rank.

`data` holds a replica on one rank. The others divide it over `model_parallel` ranks, its parts: by
layer (`pipeline`), by weight (`tensor`), or by shards of the state (`fsdp`). What a strategy of the
replica axis sees of a part is the same: a flat vector of parameters and one of gradients, whose
elements agree with those of the same part elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchsuite.comm import Traffic
from benchsuite.parallel.pieces import Piece
from benchsuite.parallel.replica import Replica
from benchsuite.workload import Batch, Part, Workload


class Parallel(Protocol):
    """One file in `parallel/`: a class that inherits from this one (or from `ModelParallel`); its
    fields are its options."""

    autocast: bool = False
    """Whether forward and loss can run under autocast: `build` takes `autocast: bool` then."""

    acts_whole: bool = False
    """Whether a policy gathers its parameters once for a rollout, and sends nothing when it acts
    again."""

    def build(
        self,
        workload: Workload,
        replica: Replica | None,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Part:
        """This rank's part. `replica` joins the ranks of one replica (None where a replica is one
        rank)."""


class ModelParallel(Parallel, Protocol):
    """A replica on several ranks."""

    def pieces(
        self, workload: Workload, layers: Sequence[nn.Module], size: int
    ) -> list[list[Piece]]:
        """What each of `size` parts holds, in the order of its flat vector: what it owns first,
        copies last.

        Of the chain's parameters by their names in `nn.Sequential(*layers)`, each once; layers may
        be on the meta device. Servers and predictions ask too: nothing is sent and no process group
        is needed.
        """

    def predicted_traffic(
        self,
        workload: Workload,
        layers: Sequence[nn.Module],
        batch: Batch,
        *,
        size: int,
        itemsize: int,
        clip: bool,
        backend: str = "gloo",
    ) -> Traffic:
        """Of one step of one replica, between its parts 0 .. size-1. `batch` is a replica's share,
        on the meta device.

        What the library sends, and our own scalars (`Replica.sum`, with `clip` that of the norm)
        and tied gradients. On gloo a reduce-scatter costs what an all-reduce does; on nccl half of
        it.
        """

    def predicted_inference(
        self,
        workload: Workload,
        layers: Sequence[nn.Module],
        x: Tensor,
        *,
        size: int,
        itemsize: int,
    ) -> Traffic:
        """Of one `Part.infer(x)`: a policy acts inside the run."""


class PartOfReplica(Part, Protocol):
    """What `ModelParallel.build` returns beyond a `Part`."""

    replica: Replica
    num_gradients: int  # so many times `gradient` was called
    # Elements of `params` and `grad` that count here: the first ones. The rest are copies.
    num_owned: int

    acts_whole: bool = False
    """Whether `whole` gathers the parameters, so that a policy sends once for a whole rollout."""

    def whole(self) -> AbstractContextManager[None]:
        """Inside, parameters do not change, and a policy acts many times: a rollout is played."""
        return nullcontext()

    def gradient_norm(self) -> float:
        """Norm of the whole gradient in `grad` of all parts; called on all of them."""

    def finite(self) -> bool:
        """Whether all parts' parameters are finite; called on all of them."""

    def share(self, shard: int, num_shards: int) -> tuple[int, int]:
        """Which slice of a global batch this rank reads where its replica is given slice `shard` of
        `num_shards`."""

    def facts(self) -> Mapping[str, Any]:
        """What the run file keeps of this part, in plain JSON: balance, bubble, activation
        bytes."""
