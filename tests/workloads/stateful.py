"""A chain whose module carries something from gradient to gradient: running statistics, a counter,
random masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from benchsuite.workload import Batch, Infer, Recipe, Target

presets = {"default": {"global_batch": 16, "num_layers": 3, "budget_samples": 160}}


class Counter(nn.Module):
    """Scales by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x * (1 + 1 / (1 + self.calls))


@dataclass
class Workload:
    """Regression on random targets."""

    keeps: Literal["batch_norm", "counter", "dropout", "nothing", "constant"] = "nothing"
    """What is kept; `constant`: a buffer that never changes."""
    global_batch: int = 16
    """Samples per step."""

    target = Target("loss", easy=1e-3, target=1e-6, hard=1e-9, direction="min", evaluate_every=32)

    def start(self, *, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._x = torch.randn(64, 4, generator=generator, dtype=torch.float64).to(dtype)
        self._y = torch.randn(64, 1, generator=generator, dtype=torch.float64).to(dtype)

    def layers(self) -> list[nn.Module]:
        constant = nn.Identity()
        constant.register_buffer("scale", torch.ones(3))
        middle = {
            "batch_norm": nn.BatchNorm1d(8),
            "counter": Counter(),
            "dropout": nn.Dropout(0.5),
            "nothing": nn.Identity(),
            "constant": constant,
        }[self.keeps]
        return [nn.Linear(4, 8), middle, nn.Tanh(), nn.Linear(8, 1)]

    def tensor_plan(self) -> Mapping[str, str]:
        return {}

    def recipe(self) -> Recipe:
        return Recipe(
            make_optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
            lr=lambda progress: 0.05,
            global_batch=self.global_batch,
            budget=160,
        )

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        share = self.global_batch // num_shards
        first = (index * self.global_batch) % 64 + shard * share
        return Batch(self._x[first : first + share], self._y[first : first + share], share)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(output, batch.y)

    def evaluate(self, infer: Infer) -> float:
        return float(nn.functional.mse_loss(infer(self._x), self._y))
