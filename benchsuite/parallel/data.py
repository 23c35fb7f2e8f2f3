"""Data parallelism: one rank holds the whole model and a share of every batch (the article's
section 3.1.1).

The chain of layers is used whole. Parameters and gradients are views into two flat vectors, so that
a strategy moves one vector and an optimiser steps one tensor. Inside a replica nothing is sent.
With micro-batches the gradient of a share is the mean of theirs, made one after the other: the
memory of activations of one, the gradient of all. With `precision = bf16` forward and loss run
under autocast (matrix products in bfloat16); parameters, gradient and optimiser state stay in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchsuite import parallel
from benchsuite.comm import Handle
from benchsuite.parallel.replica import Replica
from benchsuite.workload import (
    Batch,
    DeviceLoss,
    Part,
    Ready,
    Shapes,
    Workload,
    micro_batches,
    numel,
    seeded_layers,
    to_device,
    trained_parameters,
    views,
)


@dataclass
class Parallel(parallel.Parallel):
    """A replica is one rank, which holds the whole model."""

    num_micro_batches: int = 1
    """Pieces of a rank's share of a batch: gradients are accumulated over them, activations live
    for one."""

    later = ("num_micro_batches",)
    autocast = True
    at_least = {"num_micro_batches": 1}
    order = 0
    colour = 0
    marks = ("o", "o")

    def build(
        self,
        workload: Workload,
        replica: Replica | None,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        autocast: bool = False,
    ) -> DataPart:
        """The whole model on this rank; there are no other parts, so `replica` is not needed."""
        return DataPart(
            workload,
            seed=seed,
            dtype=dtype,
            device=device,
            autocast=autocast,
            num_micro_batches=self.num_micro_batches,
        )


class DataPart(Part):
    """A whole replica on one rank; its flat vectors `params` and `grad` are (P,)."""

    has_grad_buffer = True

    def __init__(
        self,
        workload: Workload,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        autocast: bool = False,
        num_micro_batches: int = 1,
    ) -> None:
        self.module: nn.Module = nn.Sequential(*seeded_layers(workload, seed)).to(dtype).to(device)
        self._workload = workload
        self._autocast = autocast
        self._num_micro = num_micro_batches
        self._device = device

        named = trained_parameters(self.module)
        self.shapes: Shapes = {name: p.shape for name, p in named.items()}
        self.params = torch.zeros(numel(self.shapes), dtype=dtype, device=device)
        self.grad = torch.zeros_like(self.params)
        self._parameters = list(named.values())

        # The module computes with views of the flat vector from now on.
        for p, view in zip(self._parameters, views(self.params, self.shapes).values(), strict=True):
            view.copy_(p.detach())
            p.data = view

        self._bind_grad()
        self._forward: nn.Module = self.module

        # For whoever wants slices of the gradient as they come: the range of each tensor in the
        # flat vector, the tensors that have no gradient yet, and whom to tell of one.
        self._ends: list[tuple[int, int]] = []
        self._missing: set[int] = set()
        self._announce: Callable[[int], None]

    def use_grad_buffer(self, buffer: Tensor) -> None:
        """Lets the gradient live in memory that a topology owns."""
        self.grad = buffer
        self._bind_grad()

    def _bind_grad(self) -> None:
        """Makes the views of the gradient, one per parameter, in the order of the vector."""
        self._grads = list(views(self.grad, self.shapes).values())

    def _precision(self) -> AbstractContextManager[Any]:
        """The context of the forward pass and the loss: autocast, or none.

        A backward pass is outside of it; it follows what the forward pass did.
        """
        return (
            torch.autocast(self.params.device.type, torch.bfloat16)
            if self._autocast
            else nullcontext()
        )

    def _loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, with the graph of its backward pass."""
        if not self._autocast:
            return self._workload.loss(forward(batch.x), batch)

        with self._precision():
            return self._workload.loss(forward(batch.x), batch)

    def infer(self, x: Tensor) -> Tensor:
        """Forward without gradient, on this rank's device; the result stands where `x` does."""
        training = self.module.training
        self.module.eval()  # no dropout, no batch statistics

        try:
            with torch.no_grad(), self._precision():
                output: Tensor = self.module(x.to(self._device))
                return output.to(x.device, self.params.dtype if self._autocast else output.dtype)
        finally:
            self.module.train(training)

    def gradient(
        self, batch: Batch, ready: Ready | None = None, until: Handle | None = None
    ) -> float | None:
        """Fills `grad` and returns the loss; micro-batches are added up where there are some."""
        if until is not None:
            raise ValueError(
                "a real backward pass is not abandoned: `until` is for the virtual clock"
            )

        batch = to_device(batch, self._device)
        if self._num_micro > 1:
            return self._accumulated(micro_batches(batch, self._num_micro), ready)

        loss = self._loss(self.module, batch)

        if ready is None:
            torch._foreach_copy_(self._grads, self._gradients(loss))
        else:
            self._backward_with_hooks(loss, ready)

        return self._value(loss.detach())

    def _value(self, loss: Tensor) -> float:
        """A loss as a number; on a device it stays there, so that the step does not wait for it."""
        return float(loss) if self._device.type == "cpu" else DeviceLoss(loss)

    def _accumulated(self, pieces: Sequence[Batch], ready: Ready | None) -> float:
        """Adds the mean gradient over the micro-batches up in the flat vector; returns the loss.

        Only the last micro-batch announces its slices: before it none is final.
        """
        self.grad.zero_()
        losses = []

        for number, piece in enumerate(pieces, start=1):
            loss = self._loss(self.module, piece)

            # Dividing the loss divides every gradient, without another pass over the vector.
            share = loss / len(pieces)

            if ready is None or number < len(pieces):
                torch._foreach_add_(self._grads, self._gradients(share))
            else:
                self._backward_with_hooks(share, ready)

            losses.append(loss.detach())

        return self._value(torch.stack(losses).mean())

    def _gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """The gradient of every parameter, 0 where the loss does not reach it.

        torch's own `materialize_grads` does the same and costs 1 % of a step on digits.
        """
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)

        if any(gradient is None for gradient in gradients):
            gradients = self._with_zeros(gradients)

        return gradients

    def _with_zeros(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The same gradients with zeros for every parameter that the loss does not reach."""
        pairs = zip(gradients, self._parameters, strict=True)
        return tuple(
            torch.zeros_like(parameter) if found is None else found for found, parameter in pairs
        )

    def _backward_with_hooks(self, loss: Tensor, ready: Ready) -> None:
        """Copies each gradient into the flat vector the moment autograd has it, and says so.

        Of several micro-batches it is added. A parameter that the loss does not reach has gradient
        0 and is announced at the end.
        """
        # Hooks cost a wrapper per tensor: they are registered once, by the first who asks.
        if not self._ends:
            stop = 0

            for shape in self.shapes.values():
                self._ends.append((stop, stop + shape.numel()))
                stop += shape.numel()

            self._register_hooks()

        self._missing = set(range(len(self._parameters)))
        self._announce = lambda position: ready(*self._ends[position])
        loss.backward()

        for position in sorted(self._missing, reverse=True):
            if self._num_micro == 1:
                self._grads[position].zero_()

            ready(*self._ends[position])

        # autograd keeps the hooks, and so this part, for ever: `ready` leads to the rank's sockets
        del self._announce

    def _register_hooks(self) -> None:
        """Has autograd call us for each parameter, as soon as it has added up its gradient."""

        def hook(position: int) -> Callable[[Tensor], None]:
            """The hook of one parameter, which knows its position in the flat vector."""

            def copy(parameter: Tensor) -> None:
                """Takes the gradient out of the parameter, and announces it."""
                assert parameter.grad is not None

                if self._num_micro == 1:
                    self._grads[position].copy_(parameter.grad)
                else:
                    self._grads[position].add_(parameter.grad)

                parameter.grad = None
                self._missing.discard(position)
                self._announce(position)

            return copy

        for position, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(hook(position))

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """Has `backward` go through the library's wrapper around the module."""
        self._forward = wrapper(self.module)

    def backward(self, batch: Batch) -> float:
        """`loss.backward()` through the wrapped module, which agrees on the gradient itself."""
        for parameter in self._parameters:
            parameter.grad = None

        pieces = micro_batches(to_device(batch, self._device), self._num_micro)
        losses = []

        for number, piece in enumerate(pieces, start=1):
            with nullcontext() if number == len(pieces) else self._not_yet():
                loss = self._loss(self._forward, piece)
                (loss if len(pieces) == 1 else loss / len(pieces)).backward()

            losses.append(loss.detach())

        return self._value(losses[0] if len(losses) == 1 else torch.stack(losses).mean())

    def _not_yet(self) -> AbstractContextManager[Any]:
        """The context of all micro-batches but the last.

        A wrapper that agrees on the gradient in each backward pass would send once per micro-batch:
        inside `no_sync` it only adds up, and it agrees in the last one.
        """
        context: AbstractContextManager[Any] = getattr(self._forward, "no_sync", nullcontext)()
        return context
