"""CNN: image classification, the article's worked example. 1797 real 8x8 digits, or ResNet-18 shapes.

`digits`: scikit-learn's bundled digits, stratified 1280 train / 517 test; four convolutions with GroupNorm, two
linear layers, 25,370 parameters; reaches 97.5 % in about 4 epochs. `comm`: a ResNet-18 on synthetic 32x32 images,
11,173,962 parameters (44.7 MB per gradient), to load links rather than to learn.
GroupNorm instead of BatchNorm: a shard's statistics must not depend on how the batch is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchsuite.workload import Batch, Infer, Recipe, Target

presets = {
    "digits": {"global_batch": 64, "num_layers": 8, "budget_samples": 15360, "num_samples": 1280},
    "smoke": {"global_batch": 64, "num_layers": 8, "budget_samples": 2560, "num_samples": 1280},
    "comm": {
        "global_batch": 8, "num_layers": 11, "budget_samples": 96, "num_samples": 64, "model": "resnet18", "lr": 0.01,
    },
}  # fmt: skip

TRAIN, TEST = 1280, 517  # 1280 = 20 x 64: no ragged batch
BUDGET = 240 * 64  # samples; a preset or the cell's budget comes first
GROUPS = 8


@dataclass
class Workload:
    """Digits or synthetic images."""

    model: Literal["digits", "resnet18"] = "digits"
    """Which chain of layers and which data."""
    lr: float = 0.03
    """Peak learning rate of SGD with Nesterov momentum 0.9."""
    momentum: float = 0.9
    """Nesterov momentum (0 = plain SGD)."""
    weight_decay: float = 5e-4
    """L2 penalty of the optimiser."""
    global_batch: int = 64
    """Images per synchronous step."""
    evaluate_every: int = 320
    """Images between two evaluations."""

    @property
    def target(self) -> Target:
        """Test accuracy in percent; synthetic images have nothing to reach and are not evaluated on the way."""
        every = self.evaluate_every if self.model == "digits" else 0
        return Target("accuracy", easy=96.0, target=97.5, hard=98.0, evaluate_every=every, unit="%")

    def start(self, *, seed: int, dtype: torch.dtype) -> None:
        self._seed = seed
        if self.model == "digits":
            self._x, self._y, self._x_test, self._y_test = _digits(dtype)
        else:
            self._x, self._y, self._x_test, self._y_test = _synthetic(seed, dtype)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def layers(self) -> list[nn.Module]:
        return _digits_chain() if self.model == "digits" else _resnet18_chain()

    def tensor_plan(self) -> Mapping[int, str]:
        return {}

    def recipe(self) -> Recipe:
        def make_optimizer(params: object) -> torch.optim.Optimizer:
            return torch.optim.SGD(
                params,  # type: ignore[arg-type]
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.momentum > 0,
                weight_decay=self.weight_decay,
            )

        return Recipe(make_optimizer=make_optimizer, lr=self._lr, global_batch=self.global_batch, budget=BUDGET)

    def _lr(self, progress: float) -> float:
        """10 % linear warm-up, then linear to 1 %."""
        if progress < 0.1:
            return self.lr * (progress + 0.004) / 0.104
        return self.lr * (1 - 0.99 * (progress - 0.1) / 0.9)

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        """Rows [index B, (index + 1) B) of the epoch's permutation; the shard takes its slice of them.

        x is (B / num_shards, channels, height, width), y is (B / num_shards,) of class numbers.
        """
        per_epoch = len(self._x) // self.global_batch
        epoch, position = divmod(index, per_epoch)
        if epoch != self._epoch:
            self._order = torch.from_numpy(np.random.default_rng([self._seed, epoch]).permutation(len(self._x)))
            self._epoch = epoch
        share = self.global_batch // num_shards
        first = position * self.global_batch + shard * share
        rows = self._order[first : first + share]
        return Batch(self._x[rows], self._y[rows], share)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(output, batch.y)

    def evaluate(self, infer: Infer) -> float:
        """Test accuracy in percent over every test image once."""
        right = (infer(self._x_test).argmax(1) == self._y_test).sum()
        return 100.0 * float(right) / len(self._y_test)


def _digits(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """load_digits as (1280, 1, 8, 8), (1280,), (517, 1, 8, 8), (517,): one fixed stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, train_size=TRAIN, test_size=TEST, stratify=labels, random_state=0)
    x, x_test = (torch.tensor(part / 16.0, dtype=dtype).view(-1, 1, 8, 8) for part in split[:2])
    y, y_test = (torch.tensor(part, dtype=torch.long) for part in split[2:])
    return x, y, x_test, y_test


def _synthetic(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """64 random 32x32 colour images with random labels, 16 more as a test set."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 3, 32, 32, generator=generator, dtype=torch.float32).to(dtype)
    y = torch.randint(0, 10, (80,), generator=generator)
    return x[:64], y[:64], x[64:], y[64:]


def _digits_chain() -> list[nn.Module]:
    """Chain of 8: four convolution blocks, pooling inside blocks 2 and 4, then the two linear layers.

    (B, 1, 8, 8) -> (B, 16, 8, 8) -> (B, 16, 4, 4) -> (B, 32, 4, 4) -> (B, 32, 2, 2) -> (B, 64) -> (B, 10)
    """

    def block(inputs: int, outputs: int, *, pool: bool) -> nn.Module:
        parts: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, outputs), nn.ReLU(),
        ]  # fmt: skip
        return nn.Sequential(*parts, nn.MaxPool2d(2)) if pool else nn.Sequential(*parts)

    return [
        block(1, 16, pool=False),
        block(16, 16, pool=True),
        block(16, 32, pool=False),
        block(32, 32, pool=True),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ]


class ResidualBlock(nn.Module):
    """Basic block of He et al. 2016, GroupNorm for BatchNorm (the same number of affine parameters)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(GROUPS, outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.GroupNorm(GROUPS, outputs),
        )  # fmt: skip
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(GROUPS, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return torch.relu(self.body(x) + self.skip(x))


def _resnet18_chain() -> list[nn.Module]:
    """CIFAR form of ResNet-18 for 10 classes: 11,173,962 parameters, chain of 11."""
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(GROUPS, 64), nn.ReLU())
    widths = [
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
        (256, 512, 2),
        (512, 512, 1),
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return [stem, *(ResidualBlock(*width) for width in widths), head, nn.Linear(512, 10)]
