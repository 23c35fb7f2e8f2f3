"""Two layers that learn the sign of a sum."""

from dataclasses import dataclass

import torch
from torch import nn

from benchsuite.workload import Batch, Recipe, Target

presets = {"default": {"global_batch": 16, "num_layers": 3, "budget_samples": 160}}


@dataclass
class Workload:
    """Signs of sums."""

    width: int = 12
    """Hidden width."""
    lr: float = 0.1
    """Of plain SGD."""
    global_batch: int = 16
    """Samples per step."""

    target = Target("accuracy", easy=50.0, target=60.0, hard=99.0, evaluate_every=80, unit="%")

    def start(self, *, seed, dtype):
        self.dtype, self.seed = dtype, seed

    def layers(self):
        return [nn.Linear(4, self.width), nn.Tanh(), nn.Linear(self.width, 1)]

    def tensor_plan(self):
        return {}

    def recipe(self):
        def make(params):
            return torch.optim.SGD(params, lr=1.0)

        return Recipe(
            make_optimizer=make,
            lr=lambda progress: self.lr,
            global_batch=self.global_batch,
            budget=160,
        )

    def _data(self, count, index):
        x = torch.randn(
            count,
            4,
            generator=torch.Generator().manual_seed(1000 * self.seed + index),
            dtype=self.dtype,
        )
        return x, (x.sum(1, keepdim=True) > 0).to(self.dtype)

    def batch(self, index, *, shard, num_shards):
        share = self.global_batch // num_shards
        x, y = self._data(self.global_batch, index)
        return Batch(
            x[shard * share : (shard + 1) * share], y[shard * share : (shard + 1) * share], share
        )

    def loss(self, output, batch):
        return nn.functional.binary_cross_entropy_with_logits(output, batch.y)

    def evaluate(self, infer):
        x, y = self._data(64, 999)
        return 100.0 * float(((infer(x) > 0) == (y > 0.5)).double().mean())
