"""One optimiser step: the learning rate of this progress, the clipping, the step.

Shared by workers that hold all parameters and by servers that hold a slice, so that both update alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from benchsuite.errors import UsageError
from benchsuite.workload import Recipe


class Updater:
    """Steps one vector (or a list of tensors) with the recipe's optimiser.

    `lr_scale` is the equal-sample rule of asynchronous training: batch/N per push goes with lr/N.
    """

    def __init__(self, params: Tensor | Iterable[Tensor], recipe: Recipe, *, lr_scale: float = 1.0) -> None:
        # An alias: several updaters of one vector (server threads) must not share its `.grad`.
        if isinstance(params, Tensor) and not recipe.elementwise:
            raise UsageError(
                "this optimiser treats tensors, not elements (recipe.elementwise = False); this strategy steps a flat "
                "vector: use sync = ddp, or an elementwise optimiser"
            )
        self.params = [params.detach()] if isinstance(params, Tensor) else list(params)
        self.optimizer = recipe.make_optimizer(self.params)
        self._recipe, self._lr_scale = recipe, lr_scale

    def step(self, grad: Tensor | None, *, samples: int) -> None:
        """Applies `grad` (None: the tensors carry their own) after `samples` of the budget were consumed."""
        progress = min(samples / self._recipe.budget, 1.0)
        lr = self._recipe.lr(progress) * self._lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if grad is not None:
            self.params[0].grad = grad
        self.optimizer.step()


class Load:
    """An updater of a server that only averages: the mean becomes what it holds."""

    def __init__(self, params: Tensor) -> None:
        self._params = params

    def step(self, grad: Tensor, *, samples: int) -> None:
        """Takes the vector as it is."""
        self._params.copy_(grad)


def state_vectors(recipe: Recipe) -> int:
    """Vectors as long as the parameters that the recipe's optimiser keeps: 0 SGD, 1 with momentum, 2 Adam."""
    probe = torch.zeros(2)
    updater = Updater(probe, recipe) if recipe.elementwise else None
    if updater is None:
        return 0
    updater.step(torch.zeros(2), samples=0)
    return len(state_of(updater))


def state_of(updater: Updater) -> list[Tensor]:
    """The optimiser's vectors as long as the parameters, in the order of their names; [] before the first step."""
    params = updater.params[0]
    state = updater.optimizer.state.get(params, {})
    return [
        state[name] for name in sorted(state)
        if isinstance(state[name], Tensor) and state[name].shape == params.shape and state[name].dim()
    ]  # fmt: skip


def clip_factor(norm: float, clip_norm: float) -> float:
    """Factor that brings a gradient of this global norm to at most `clip_norm` (torch's rule, eps 1e-6)."""
    return min(1.0, clip_norm / (norm + 1e-6))


def clip(grad: Tensor, clip_norm: float | None) -> None:
    """Scales a whole gradient in place so that its norm is at most `clip_norm`; nothing without one."""
    if clip_norm is None:
        return
    factor = clip_factor(float(torch.linalg.vector_norm(grad)), clip_norm)
    if factor < 1.0:
        grad.mul_(factor)
