"""f(x) = |x|^2 / 2 in 8 dimensions: plain gradient descent, whose stability under delay has a
closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchsuite.workload import Batch, Infer, Recipe, Target

presets = {"default": {"global_batch": 4, "num_layers": 1, "budget_samples": 4000}}


class Point(nn.Module):
    """The position; whatever is put in, it comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(8))

    def forward(self, _: Tensor) -> Tensor:
        return self.x


@dataclass
class Workload:
    """Curvature 1 everywhere."""

    lr: float = 0.1
    """Constant."""
    global_batch: int = 4
    """Samples per step; they change nothing."""
    look_at: str = ""
    """A reason why this loss cannot be batched: `value`, `memory`, `dropout`; "" = it can."""

    target = Target("loss", easy=1e-3, target=1e-6, hard=1e-9, direction="min", evaluate_every=400)

    def start(self, *, seed: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._calls = 0

    def layers(self) -> list[nn.Module]:
        return [Point(), *([nn.Dropout(0.5)] if self.look_at == "dropout" else [])]

    def tensor_plan(self) -> Mapping[str, str]:
        return {}

    def recipe(self) -> Recipe:
        return Recipe(
            make_optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
            lr=lambda progress: self.lr,
            global_batch=self.global_batch,
            budget=4000,
        )

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        x = torch.full((1,), float(index), dtype=self._dtype)
        return Batch(x, x, self.global_batch // num_shards)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        self._calls += 1
        if self.look_at == "value" and float(output.detach().sum()) > 1e9:
            return output.sum()
        scale = 1 + 1 / self._calls if self.look_at == "memory" else 1
        return scale * output.square().sum() / 2

    def evaluate(self, infer: Infer) -> float:
        return float(infer(torch.zeros(1, dtype=self._dtype)).detach().square().sum() / 2)
