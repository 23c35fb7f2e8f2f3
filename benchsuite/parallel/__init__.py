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
    """One way to hold a replica: a file in `parallel/`, whose class inherits from this one.

    Its fields are its options. What divides a replica over ranks inherits from `ModelParallel`.
    """

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
        """Makes this rank's part of the model.

        `replica` joins the ranks of one replica; it is None where a replica is one rank.
        """


class ModelParallel(Parallel, Protocol):
    """A way to hold a replica on several ranks, its parts."""

    def pieces(
        self, workload: Workload, layers: Sequence[nn.Module], size: int
    ) -> list[list[Piece]]:
        """Lists what each of `size` parts holds, in the order of its flat vector.

        What a part owns comes first, copies last. Parameters have their names in
        `nn.Sequential(*layers)`, and each stands once; layers may be on the meta device. Servers
        and predictions ask too: nothing is sent and no process group is needed.
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
        """Predicts the traffic of one step of one replica, between its parts 0 .. size-1.

        `batch` is a replica's share, on the meta device. Counted are what the library sends, our
        own numbers (`Replica.sum`, with `clip` that of the norm too), and tied gradients. On gloo a
        reduce-scatter costs what an all-reduce does; on nccl half of it.
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
        """Predicts the traffic of one `Part.infer(x)`, by which a policy acts inside the run."""


class PartOfReplica(Part, Protocol):
    """What `ModelParallel.build` returns beyond a `Part`."""

    replica: Replica
    num_gradients: int  # how many times `gradient` was called

    # The first so many elements of `params` and `grad` are this part's own; the rest are copies of
    # what another part owns, and count there.
    num_owned: int

    acts_whole: bool = False
    """Whether `whole` gathers the parameters, so that a policy sends once for a whole rollout."""

    def whole(self) -> AbstractContextManager[None]:
        """Inside, parameters do not change, and a policy acts many times: a rollout is played."""
        return nullcontext()

    def gradient_norm(self) -> float:
        """Norm of the whole gradient, over `grad` of all parts; all of them have to call it."""

    def finite(self) -> bool:
        """Whether the parameters of all parts are finite; all of them have to call it."""

    def share(self, shard: int, num_shards: int) -> tuple[int, int]:
        """Says which slice of a global batch this rank reads: its number, and out of how many.

        The replica as a whole was given slice `shard` of `num_shards`.
        """

    def facts(self) -> Mapping[str, Any]:
        """What the run file keeps of this part, in plain JSON: for instance balance and bubble."""
