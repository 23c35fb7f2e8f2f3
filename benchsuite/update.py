"""One optimiser step: the learning rate of this progress, the clipping, the step.

Shared by workers that hold all parameters and by servers that hold a slice, so that both update alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchsuite.errors import UsageError
from benchsuite.workload import Recipe

CHUNK_BYTES = 2**20


class Updater:
    """Steps one vector (or a list of tensors) with the recipe's optimiser.

    A long vector is stepped in chunks of 1 MiB: an optimiser's temporaries then stay in the cache, where those of 45 MB
    get new pages from the kernel each time (SGD with momentum and decay: 48 ms whole, 8.5 in chunks). The same bits.
    `lr_scale` is the equal-sample rule of asynchronous training: batch/N per push goes with lr/N.
    """

    def __init__(self, params: Tensor | Iterable[Tensor], recipe: Recipe, *, lr_scale: float = 1.0) -> None:
        # Aliases: several updaters of one vector (server threads) must not share its `.grad`.
        if isinstance(params, Tensor) and not recipe.elementwise:
            raise UsageError(
                "this optimiser treats tensors, not elements (recipe.elementwise = False); this strategy steps a flat "
                "vector: use sync = ddp, or an elementwise optimiser"
            )
        self._params = in_chunks(params.detach()) if isinstance(params, Tensor) else list(params)
        self.optimizer = recipe.make_optimizer(self._params)
        self._recipe, self._lr_scale = recipe, lr_scale

    def step(self, grad: Tensor | None, *, samples: int) -> None:
        """Applies `grad` (None: the tensors carry their own) after `samples` of the budget were consumed."""
        progress = min(samples / self._recipe.budget, 1.0)
        lr = self._recipe.lr(progress) * self._lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if grad is not None:
            for params, chunk in zip(self._params, in_chunks(grad), strict=True):
                params.grad = chunk
        self.optimizer.step()

    def share_state(self, other: Updater) -> None:
        """Goes on with the state of another updater of the same vector, which stepped before."""
        for mine, theirs in zip(self._params, other._params, strict=True):
            self.optimizer.state[mine] = other.optimizer.state[theirs]

    def forget_state(self) -> None:
        """The next step is the optimiser's first."""
        self.optimizer.state.clear()

    def state(self) -> list[Tensor]:
        """The optimiser's vectors as long as the parameters, in the order of their names; [] before the first step.

        Whoever writes to them changes the optimiser's state.
        """
        states: list[dict[str, Any]] = [self.optimizer.state.get(params, {}) for params in self._params]
        return [
            _whole(states, name)
            for name in sorted(states[0])
            if all(_is_like(state[name], params) for state, params in zip(states, self._params, strict=True))
        ]


def in_chunks(flat: Tensor) -> list[Tensor]:
    """Views of 1 MiB, in order; one of all for a shorter vector."""
    length = CHUNK_BYTES // flat.element_size()
    return [flat] if flat.numel() <= length else list(flat.split(length))


def _is_like(value: Any, params: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == params.shape


def _whole(states: list[dict[str, Any]], name: str) -> Tensor:
    """One vector of the chunks' tensors of this name, which are views of it from now on."""
    chunks: list[Tensor] = [state[name] for state in states]
    if len(chunks) == 1:
        return chunks[0]
    length = sum(chunk.numel() for chunk in chunks)
    base = chunks[0]._base
    if base is None or base.numel() != length or any(chunk._base is not base for chunk in chunks):
        base = torch.cat(chunks)
        for state, chunk in zip(states, in_chunks(base), strict=True):
            state[name] = chunk
    return base


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
    return len(updater.state())


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
