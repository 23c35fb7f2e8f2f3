"""MLP: a student network learns what a smaller teacher network knows. The workload for large
numbers of workers.

The article's section 4.1 network, h = tanh(W x + b), layer after layer. Data are unlimited: sample
i is drawn from (seed, i) alone, y = teacher(x) + noise, so no worker ever runs out and no sample
comes twice. The teacher and the held-out inputs are the task: all seeds have the same. The optimum
is known: the metric is the excess loss, the mean square of student(x) - teacher(x) over the
variance of teacher(x); 0 is perfect, 1 is a constant guess. `ballast` parameters travel with the
others and learn nothing: they load links.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchsuite import workload
from benchsuite.workload import Batch, Infer, Recipe, Target

presets = {
    "small": {"global_batch": 16, "num_layers": 5, "budget_samples": 262144, "hidden": 36},
    "wide": {
        "global_batch": 16,
        "num_layers": 5,
        "budget_samples": 262144,
        "hidden": 256,
        "inputs": 64,
    },
    "smoke": {"global_batch": 16, "num_layers": 5, "budget_samples": 4096, "hidden": 36},
}

BASE_BATCH = 16  # samples of one push; the batch that `lr` is meant for
BLOCK = 8192  # samples that are drawn at once
KEPT_BLOCKS = 4  # blocks in memory; workers that run apart are some blocks apart at most
HELD_OUT = 1024  # samples of an evaluation
BUDGET = 262144  # samples; a preset or the cell's budget comes first

# Purposes of random streams: each number begins the seed of its own, so that a task's data and its
# teacher have no numbers in common.
TEACHER = 1
DATA = 2
TEST = 3


class Ballast(nn.Module):
    """Parameters that the output does not depend on.

    Their gradient is 0, and it is sent like that of all others: more bytes, the same learning.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count))

    def forward(self, x: Tensor) -> Tensor:
        """Hands x on as it is."""
        return x


@dataclass
class Workload(workload.Workload):
    """The student learns to answer as the teacher does, from noisy samples of its answers."""

    inputs: int = 20
    """Length of x."""

    hidden: int = 36
    """Width of the first hidden layer; the second has half of it."""

    teacher_hidden: int = 8
    """The same of the teacher's."""

    num_parameters: int = 0
    """Parameters in all, filled up with ballast (0 = no ballast), e.g. 1048576 for 4 MiB of
    fp32."""

    lr: float = 0.04
    """Peak learning rate of SGD for a global batch of 16."""

    lr_rule: Literal["sqrt", "linear", "none"] = "sqrt"
    """How the rate grows with the global batch: by the root of batch/16, by batch/16, or not."""

    momentum: float = 0.0
    """Momentum of SGD (0 = plain: staleness is momentum of its own)."""

    teacher_seed: int = 0
    """Another number is another teacher, with held-out inputs of its own."""

    noise: float = 0.1
    """Standard deviation of what is added to the teacher's outputs, which have variance 1."""

    global_batch: int = 16
    """Samples per synchronous step; with batch_mode = fixed_per_worker those of one worker."""

    evaluate_every: int = 1024
    """Samples between two evaluations."""

    tensor_divides = ("hidden",)
    trained_layers = 3  # the two between them have no parameters

    @property
    def target(self) -> Target:
        """The excess loss and the values of it that count as reached; a constant gets 1."""
        every = self.evaluate_every
        return Target(
            "excess loss", easy=0.2, target=0.1, hard=0.05, direction="min", evaluate_every=every
        )

    def start(self, *, seed: int, dtype: torch.dtype) -> None:
        """Makes the teacher and the held-out samples, in float64 and from `teacher_seed` alone.

        So the task is the same for every seed and every dtype: only the last step casts to `dtype`.
        """
        self._seed = seed
        self._dtype = dtype
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}  # number -> x, y

        self._teacher = nn.Sequential(*_chain(self.inputs, self.teacher_hidden)).double()
        stream = np.random.default_rng([TEACHER, self.teacher_seed])

        for layer in self._teacher:
            if isinstance(layer, nn.Linear):
                # Rows of norm about 1.5: the tanh bends, but does not saturate.
                gain = 1.5 / math.sqrt(layer.in_features)
                layer.weight.data = _normal(stream, *layer.weight.shape) * gain
                layer.bias.data = _normal(stream, *layer.bias.shape) * 0.5

        # The outputs' mean and deviation, by which `_answers` brings them to 0 and 1.
        with torch.no_grad():
            known = self._teacher(_normal(stream, BLOCK, self.inputs))
            self._mean = known.mean()
            self._scale = known.std()

        test_stream = np.random.default_rng([TEST, self.teacher_seed])
        test = _normal(test_stream, HELD_OUT, self.inputs)  # (held out, inputs)
        self._x_test = test.to(dtype)
        self._y_test = self._answers(test)  # (held out, 1)
        self._variance = float(self._y_test.var())

    def layers(self) -> list[nn.Module]:
        """The student, with its ballast as the last layer where it has one.

        ValueError where the network alone has more than `num_parameters`.
        """
        chain = _chain(self.inputs, self.hidden)

        if self.num_parameters:
            own = sum(p.numel() for layer in chain for p in layer.parameters())

            if self.num_parameters < own:
                raise ValueError(
                    f"num_parameters = {self.num_parameters}, but the network alone has {own}: set "
                    f"at least {own}"
                )

            chain.append(Ballast(self.num_parameters - own))

        return chain

    def tensor_plan(self) -> Mapping[str, str]:
        """The first hidden layer splits by its outputs, the second by its inputs.

        So the tanh between them works on what a part has, and one sum per pass is sent.
        """
        return {"0": "columns", "2": "rows"}

    def layer_flops(self) -> list[int]:
        """Counts the forward operations of each layer for one sample.

        A multiply-add of a matrix product counts as 2, everything else as nothing.
        """
        half = self.hidden // 2
        products = [2 * self.inputs * self.hidden, 0, 2 * self.hidden * half, 0, 2 * half]

        return [*products, 0] if self.num_parameters else products

    def recipe(self) -> Recipe:
        """SGD whose peak rate grows with the global batch as `lr_rule` says."""

        def make_optimizer(params: object) -> torch.optim.Optimizer:
            """Makes plain SGD; its learning rate is set anew before every step."""
            return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum)  # type: ignore[arg-type]

        ratio = self.global_batch / BASE_BATCH
        growth = {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[self.lr_rule]
        peak = self.lr * growth

        def lr(progress: float) -> float:
            """5 % warm-up, then a quarter of a cosine to nearly 0."""
            rising = (progress + 0.002) / 0.05
            falling = math.cos(0.49 * math.pi * progress)

            return peak * min(rising, falling)

        return Recipe(
            make_optimizer=make_optimizer, lr=lr, global_batch=self.global_batch, budget=BUDGET
        )

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        """Returns samples [index B + shard B/n, ..) of the endless stream, B/n of them.

        x is (B/n, inputs), y is (B/n, 1).
        """
        # B/n, and the number of the first sample in the stream.
        share = self.global_batch // num_shards
        first = index * self.global_batch + shard * share

        # Most often all of them stand in one block.
        number, begin = divmod(first, BLOCK)
        x, y = self._block(number)

        if begin + share <= BLOCK:
            return Batch(x[begin : begin + share], y[begin : begin + share], share)

        # Otherwise they begin at the end of one and go on in the next ones.
        pieces = [(x[begin:], y[begin:])]
        left = share - (BLOCK - begin)

        while left > 0:
            number += 1
            x, y = self._block(number)
            pieces.append((x[:left], y[:left]))
            left -= BLOCK

        xs = torch.cat([x for x, _ in pieces])  # (B/n, inputs)
        ys = torch.cat([y for _, y in pieces])  # (B/n, 1)

        return Batch(xs, ys, share)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean square of the student's error, noise included: at best the noise's variance."""
        return nn.functional.mse_loss(output, batch.y)

    def evaluate(self, infer: Infer) -> float:
        """Returns the excess loss over the 1024 held-out inputs.

        It is the mean square of student - teacher, over the variance of the teacher's answers.
        """
        errors = infer(self._x_test) - self._y_test  # (held out, 1)
        return float(errors.square().mean()) / self._variance

    def _block(self, number: int) -> tuple[Tensor, Tensor]:
        """Samples [number BLOCK, (number + 1) BLOCK), noise included: x and y.

        A block has a random stream of its own, so it can be drawn by whoever needs it, without
        those before it. Drawing all of it at once is what makes single samples cheap.
        """
        found = self._blocks.get(number)

        if found is None:
            stream = np.random.default_rng([DATA, self._seed, number])
            x = _normal(stream, BLOCK, self.inputs)
            noise = _normal(stream, BLOCK, 1) * self.noise
            y = self._answers(x) + noise.to(self._dtype)

            found = (x.to(self._dtype), y)
            self._blocks[number] = found

            # A dictionary keeps its order, so the first one is the oldest.
            while len(self._blocks) > KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]

        return found

    def _answers(self, x: Tensor) -> Tensor:
        """Returns what the teacher says to x (n, inputs), scaled to mean 0 and variance 1.

        The answers are (n, 1). They are computed in float64 whatever the student's dtype is.
        """
        with torch.no_grad():
            answers: Tensor = (self._teacher(x) - self._mean) / self._scale

        return answers.to(self._dtype)


def _chain(inputs: int, hidden: int) -> list[nn.Module]:
    """Makes the article's network: three matrices, with tanh between them.

    The second hidden layer is half as wide as the first, and the output is one number.
    """
    half = hidden // 2

    return [
        nn.Linear(inputs, hidden),
        nn.Tanh(),
        nn.Linear(hidden, half),
        nn.Tanh(),
        nn.Linear(half, 1),
    ]


def _normal(stream: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal numbers of this shape, in float64.

    numpy's generators are used because a stream is made from a list of numbers, (purpose, seed,
    block), and is the same on every machine.
    """
    return torch.from_numpy(stream.standard_normal(shape))
