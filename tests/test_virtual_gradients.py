"""Gradients of groups: those of the module for every size of group, whatever its forward pass does
to its own results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchsuite.parallel.data import DataPart
from benchsuite.virtual.gradients import Gradients
from benchsuite.worker import setup
from benchsuite.workload import Batch

RANKS = 80


class Chain:
    """A workload around any layers: 5 numbers in, squares of what comes out."""

    def __init__(self, *layers: nn.Module) -> None:
        self._layers = list(layers)

    def layers(self) -> list[nn.Module]:
        return self._layers

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return (output - batch.y).square().mean()


class InPlace(nn.Module):
    """Computes twice the same, and changes one of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.linear(x) * 2
        second = self.linear(x) * 2
        seen = first.view(-1)
        first.add_(1).mul_(3)
        return second * seen.view_as(second)


class Twice(nn.Module):
    """One weight used twice, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight @ self.weight.t())[:, :3]


def chain(*layers: nn.Module) -> Callable[[], tuple[Any, Callable[[int], Batch]]]:
    def made() -> tuple[Any, Callable[[int], Batch]]:
        def batch(rank: int) -> Batch:
            stream = torch.Generator().manual_seed(rank)
            x = torch.randn(4, 5, generator=stream, dtype=torch.float64)
            return Batch(x, torch.randn(4, 3, generator=stream, dtype=torch.float64), 4)

        return Chain(*layers), batch

    return made


def workload(name: str, per_rank: int) -> Callable[[], tuple[Any, Callable[[int], Batch]]]:
    def made() -> tuple[Any, Callable[[int], Batch]]:
        of = setup.make("workload", name, {"global_batch": per_rank * RANKS})
        of.start(seed=0, dtype=torch.float64)
        return of, lambda rank: of.batch(0, shard=rank, num_shards=RANKS)

    return made


KINDS = {
    "mlp": workload("mlp", 2),
    "cnn, 1 sample": workload("cnn", 1),
    "cnn, 3 samples": workload("cnn", 3),
    "one parameter": chain(Twice()),
    "in place": chain(InPlace()),
    "layer norm": chain(nn.Linear(5, 3), nn.LayerNorm(3)),
    "inplace relu": chain(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True], ids=["own parameters", "one version"])
def test_a_group_of_any_size_has_the_gradients_of_the_module(kind: str, shared: bool) -> None:
    of, batch = KINDS[kind]()
    part = DataPart(of, seed=0, dtype=torch.float64, device=torch.device("cpu"))
    together = Gradients(of, part, seed=0)
    alone = Gradients(of, part, seed=0, batching=False)
    stream = torch.Generator().manual_seed(1)
    count = part.params.numel()
    params = part.params.repeat(RANKS, 1)
    if not shared:
        params += 0.1 * torch.randn(RANKS, count, generator=stream, dtype=torch.float64)
    for size in (2, 5, 70):
        rows = torch.randperm(RANKS, generator=stream)[:size].tolist()
        batches = [batch(row) for row in rows]
        found, expected = (torch.full((RANKS, count), 7.0, dtype=torch.float64) for _ in range(2))
        losses = [
            each.compute(params, rows, batches, into)
            for each, into in ((together, found), (alone, expected))
        ]
        assert together.reason == "", "a group that is not computed together proves nothing"
        gap = float((found - expected).abs().max() / expected[rows].abs().max())
        assert gap < 1e-12, f"{size} rows: {gap:.3g} is not < 1e-12"
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        assert bool((found[[row for row in range(RANKS) if row not in rows]] == 7).all()), (
            "a row of nobody was written"
        )


def test_a_group_twice_has_the_same_bits() -> None:
    of, batch = KINDS["cnn, 1 sample"]()
    part = DataPart(of, seed=0, dtype=torch.float64, device=torch.device("cpu"))
    params = part.params.repeat(RANKS, 1)
    params += 0.1 * torch.randn(
        params.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    rows = [5, 3, 70, 11, 0, 42]
    grads = [torch.zeros_like(params) for _ in range(2)]
    for into in grads:
        Gradients(of, part, seed=0).compute(params, rows, [batch(row) for row in rows], into)
    assert torch.equal(*grads)
