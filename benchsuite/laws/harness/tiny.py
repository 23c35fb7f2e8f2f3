"""The workload of the laws: a small chain of dense layers that regresses random targets.

It has 9 layers with parameters, widths that divide by 4 and an odd number of parameters. The global
batch of 24 divides by 1, 2, 3, 4, 6, 8 and 12. Its data are fixed and random, so that shards
differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from benchsuite.workload import Batch, Infer, Recipe, Target, muon

presets = {
    "default": {"global_batch": 24, "num_layers": 9, "budget_samples": 240},
    "long": {"global_batch": 24, "num_layers": 9, "budget_samples": 2400},
}


class Residual(nn.Module):
    """A layer x + tanh(W x), whose shortcut keeps gradients alive through the chain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


@dataclass
class Workload:
    """Regression of random targets from random inputs; no teacher network stands behind them."""

    width: int = 8
    """Hidden width."""
    optimizer: Literal["sgd", "momentum", "nesterov", "adam", "adamw", "muon"] = "momentum"
    """Which optimiser the recipe makes."""
    lr: float = 0.05
    """Constant unless `schedule`."""
    schedule: bool = True
    """Linear decay to a tenth."""
    clip_norm: float = 0.0
    """0 = none."""
    global_batch: int = 24
    """Samples per synchronous step."""
    nan_at: int = -1
    """Global batch whose targets are NaN (-1 = none)."""

    tensor_divides = ("width",)
    target = Target(
        metric="loss", easy=2.0, target=1.0, hard=0.5, direction="min", evaluate_every=48
    )

    def start(self, *, seed: int, dtype: torch.dtype) -> None:
        self._seed = seed
        self._dtype = dtype
        generator = torch.Generator().manual_seed(seed + 1)
        self._x = torch.randn(960, self.width, generator=generator, dtype=torch.float64).to(dtype)
        noise = torch.randn(960, 1, generator=generator, dtype=torch.float64)
        self._y = (noise * 2 + self._x.double().sum(1, keepdim=True)).to(dtype)

    def layers(self) -> list[nn.Module]:
        return [Residual(self.width) for _ in range(8)] + [nn.Linear(self.width, 1)]

    def tensor_plan(self) -> Mapping[str, str]:
        return {f"{layer}.linear": "gathered" for layer in range(8)}

    def recipe(self) -> Recipe:
        made = {
            "sgd": lambda params: torch.optim.SGD(params, lr=1.0),
            "momentum": lambda params: torch.optim.SGD(
                params, lr=1.0, momentum=0.9, weight_decay=1e-3
            ),
            "nesterov": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9, nesterov=True),
            "adam": lambda params: torch.optim.Adam(params, lr=1.0),
            "adamw": lambda params: torch.optim.AdamW(params, lr=1.0, weight_decay=0.1),
            "muon": lambda named: muon(
                named, lambda name: "linear" in name, lr=1.0, weight_decay=0.1
            ),
        }[self.optimizer]
        lr = lambda progress: self.lr * (1 - 0.9 * progress) if self.schedule else self.lr  # noqa: E731
        return Recipe(
            make_optimizer=made,
            lr=lr,
            global_batch=self.global_batch,
            budget=presets["default"]["budget_samples"],
            clip_norm=self.clip_norm or None,
            elementwise=self.optimizer != "muon",
        )

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        share = self.global_batch // num_shards
        first = (index * self.global_batch) % 960 + shard * share
        y = self._y[first : first + share]
        return Batch(
            self._x[first : first + share], y * float("nan") if index == self.nan_at else y, share
        )

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(output, batch.y)

    def evaluate(self, infer: Infer) -> float:
        return float(nn.functional.mse_loss(infer(self._x[:96]), self._y[:96]))
