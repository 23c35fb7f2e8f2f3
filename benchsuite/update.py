"""One optimiser step: the learning rate of this progress, the clipping, the step.

Shared by workers that hold all parameters and by servers that hold a slice, so that both update
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchsuite.errors import UsageError
from benchsuite.workload import Part, Recipe, Shapes, numel, views

CHUNK_BYTES = 2**20
CLIP_EPS = 1e-6  # torch's


class Updater:
    """Steps one vector (or a list of tensors) with the recipe's optimiser.

    A long vector is stepped in chunks of 1 MiB: an optimiser's temporaries then stay in the cache,
    where those of 45 MB get new pages from the kernel each time (SGD with momentum and decay: 48 ms
    whole, 8.5 in chunks). The same bits. `lr_scale` is the equal-sample rule of asynchronous
    training: batch/N per push goes with lr/N. An optimiser that is not elementwise steps the
    tensors that `shapes` names, as views of the vector.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        recipe: Recipe,
        *,
        shapes: Shapes | None = None,
        lr_scale: float = 1.0,
    ) -> None:
        if not recipe.elementwise and shapes is None:
            raise UsageError(
                "this optimiser treats tensors, not elements (recipe.elementwise = False), and "
                "this strategy steps a "
                "slice of a flat vector: use one over a collective, e.g. topology = native, or an "
                "elementwise optimiser"
            )

        self._cut: Callable[[Tensor], list[Tensor]] = in_chunks
        if not isinstance(params, Tensor):
            self._params = list(params)
        else:
            if shapes is not None and not recipe.elementwise:
                self._cut = lambda flat: list(views(flat, shapes).values())

            # Aliases: several updaters of one vector (server threads) must not share its `.grad`.
            self._params = self._cut(params.detach())

        named = (
            None if recipe.elementwise or shapes is None else zip(shapes, self._params, strict=True)
        )

        self.optimizer = recipe.make_optimizer(self._params if named is None else named)
        if any(params.is_cuda for params in self._params):
            fuse(self.optimizer)

        self._recipe = recipe
        self._lr_scale = lr_scale

    def step(self, grad: Tensor | None, *, samples: int) -> None:
        """Applies `grad` after `samples` of the budget were consumed.

        None: the tensors carry their own gradients.
        """
        # The schedule ends with the budget; a step behind it keeps the last rate.
        progress = min(samples / self._recipe.budget, 1.0)
        lr = self._recipe.lr(progress) * self._lr_scale

        for group in self.optimizer.param_groups:
            group["lr"] = lr

        if grad is not None:
            # Cut as the parameters are: views, nothing is copied.
            for params, chunk in zip(self._params, self._cut(grad), strict=True):
                params.grad = chunk

        self.optimizer.step()

    def share_state(self, other: Updater) -> None:
        """Goes on with the state of another updater of the same vector, which stepped before."""
        for mine, theirs in zip(self._params, other._params, strict=True):
            self.optimizer.state[mine] = other.optimizer.state[theirs]

    def forget_state(self) -> None:
        """Forgets what the optimiser keeps, so that the next step is its first."""
        self.optimizer.state.clear()

    def state(self) -> list[Tensor]:
        """Returns the optimiser's vectors, one per name in alphabetical order.

        Each is about all parameters that have such a state; before the first step there are none.
        Whoever writes to them changes the optimiser's state.
        """
        # Name of a vector -> the states that hold a piece of it, in the order of the parameters.
        kept: dict[str, list[dict[str, Any]]] = {}

        for params in self._params:
            state = self.optimizer.state.get(params, {})
            for name, value in state.items():
                if _is_like(value, params):
                    kept.setdefault(name, []).append(state)

        return [_whole(kept[name], name) for name in sorted(kept)]


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Asks for one kernel per step where the recipe leaves it open.

    The other implementations read and write a long vector ten times.
    """
    for group in optimizer.param_groups:
        # None means that the recipe has said neither yes nor no.
        if "fused" in group and group["fused"] is None and not group.get("foreach"):
            group["fused"] = True


def in_chunks(flat: Tensor) -> list[Tensor]:
    """Cuts a vector into views of 1 MiB, in order.

    A shorter one stays whole, and so does one on a device, where a call costs more than it saves.
    """
    length = CHUNK_BYTES // flat.element_size()
    if flat.numel() <= length or flat.is_cuda:
        return [flat]

    return list(flat.split(length))


def _is_like(value: Any, params: Tensor) -> bool:
    """Whether a piece of the optimiser's state holds a number for every parameter.

    Others, such as Adam's count of steps, are single numbers.
    """
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == params.shape


def _whole(states: list[dict[str, Any]], name: str) -> Tensor:
    """Returns one vector of the tensors of this name, which are views of it from now on."""
    # One tensor needs no joining; several may be views of one vector since an earlier call.
    pieces: list[Tensor] = [state[name] for state in states]
    if len(pieces) == 1:
        return pieces[0].view(-1)

    # Joined once: the next time they are views of one vector already.
    lengths = [piece.numel() for piece in pieces]
    base = pieces[0]._base

    if (
        base is None
        or base.numel() != sum(lengths)
        or any(piece._base is not base for piece in pieces)
    ):
        base = torch.cat([piece.flatten() for piece in pieces])
        for state, piece, part in zip(states, pieces, base.split(lengths), strict=True):
            state[name] = part.view(piece.shape)

    return base


class Load:
    """The updater of a server that only averages: the mean becomes what it holds.

    It stands where an `Updater` would, so that the server's loop need not tell them apart.
    """

    def __init__(self, params: Tensor) -> None:
        self._params = params

    def step(self, grad: Tensor, *, samples: int) -> None:
        """Takes the vector as it is."""
        self._params.copy_(grad)


def state_vectors(recipe: Recipe, shapes: Shapes) -> tuple[int, ...]:
    """Returns the elements of each vector that the recipe's optimiser keeps.

    Plain SGD keeps none, with momentum P, and Adam twice P. Muon keeps as many as the hidden
    matrices have, and twice as many as all others have.
    """
    # One step on a small vector shows it. Muon needs the real shapes, but no numbers in them.
    elements = 2 if recipe.elementwise else numel(shapes)
    probe, gradient = torch.zeros(2, elements, device=None if recipe.elementwise else "meta")
    updater = Updater(probe, recipe, shapes=shapes)
    updater.step(gradient, samples=0)

    return tuple(
        numel(shapes) if recipe.elementwise else vector.numel() for vector in updater.state()
    )


def clip_factor(norm: float, clip_norm: float) -> float:
    """Returns the factor that brings a gradient of this norm to at most `clip_norm`.

    It is torch's rule, with its eps of 1e-6, so that a clipped step has torch's bits.
    """
    return min(1.0, clip_norm / (norm + CLIP_EPS))


def clip_part(part: Part, clip_norm: float | None) -> None:
    """Scales this part of a replica's gradient so that the whole has at most `clip_norm`.

    A part knows the norm of the whole (`gradient_norm`); a replica on one rank is the whole.
    """
    # Asking for the norm of a divided replica sends messages, so only who clips asks.
    if clip_norm is not None:
        clip(part.grad, clip_norm, norm=part.gradient_norm())


def clip(grad: Tensor, clip_norm: float | None, *, norm: float | None = None) -> None:
    """Scales a gradient in place so that its norm is at most `clip_norm`; nothing without one.

    norm: that of the whole which `grad` is a part of; None where it is the whole.
    """
    if clip_norm is None:
        return

    # The factor stays on the device, so that no step waits for it.
    if norm is None and grad.is_cuda:
        on_device = clip_norm / (torch.linalg.vector_norm(grad) + CLIP_EPS)
        grad.mul_(on_device.clamp(max=1.0))
        return

    if norm is None:
        norm = float(torch.linalg.vector_norm(grad))

    factor = clip_factor(norm, clip_norm)

    if factor < 1.0:
        grad.mul_(factor)
