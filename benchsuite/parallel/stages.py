"""The side of a pipeline that torch's library runs: its schedules, and its stages, watched.

`pipeline.py` says what a pipeline is and what it sends.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from benchsuite.parallel import slots
from benchsuite.parallel.replica import Replica
from benchsuite.parallel.slots import BACKWARD, FORWARD, INPUT, WEIGHT, Action
from benchsuite.workload import Batch, Workload, micro_batches, to_device

SCHEDULES: Mapping[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
SINGLE = ("gpipe", "1f1b")  # take one stage, and not a list of them
KINDS = {
    "FORWARD": FORWARD,
    "FULL_BACKWARD": BACKWARD,
    "BACKWARD_INPUT": INPUT,
    "BACKWARD_WEIGHT": WEIGHT,
}
# Newer versions can be told not to keep and join the outputs of the last stage.
NO_OUTPUTS = (
    {"return_outputs": False}
    if "return_outputs" in inspect.signature(ScheduleGPipe.step).parameters
    else {}
)


class Chunk(nn.Module):
    """A run of layers between two cuts.

    What leaves it for another chunk is contiguous, because the library sends it; no view of what
    came in, because the library detaches it; and of the parameters' type, because the library has
    laid out memory for that.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        dtype: torch.dtype,
        device: torch.device,
        autocast: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.splits = False  # the backward pass runs in two halves
        self._dtype = dtype
        self._device = device
        self._autocast = autocast
        self._is_last = is_last

    def precision(self) -> AbstractContextManager[Any]:
        """Returns the context of the forward pass and the loss: autocast, or none."""
        if not self._autocast:
            return nullcontext()

        return torch.autocast(self._device.type, torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the layers; what comes out is fit to be sent, unless nobody is behind."""
        came = x
        if self.splits and x.requires_grad:
            x = _Contiguous.apply(x)  # type: ignore[no-untyped-call]  # torch

        with self.precision():
            for layer in self.layers:
                x = layer(x)

        if self._is_last:
            return x

        x = self.fit_to_send(x)
        return x.clone() if x is came or x._is_view() else x

    def fit_to_send(self, x: Tensor) -> Tensor:
        """Returns `x` contiguous, its numbers in the parameters' type."""
        return x.to(self._dtype if x.is_floating_point() else x.dtype).contiguous()


class _Contiguous(torch.autograd.Function):
    """Hands its input on, and makes the gradient that comes back contiguous.

    A backward pass in two halves sends the input's gradient as autograd leaves it, and the library
    sends contiguous tensors only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Returns a view of x: autograd wants a new tensor."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Returns the gradient, copied where it is not contiguous."""
        return gradients[0].contiguous()


class Log:
    """What the stages of a part did in the last step, and for how long in all."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.busy_ns = 0

    def add(self, kind: str, chunk: int, micro: int, begin_ns: int) -> None:
        """Notes a pass that began then and ends now."""
        self.busy_ns += time.perf_counter_ns() - begin_ns
        self.actions.append((kind, chunk, micro))


class Stage(PipelineStage):
    """The library's stage, with each pass noted and timed.

    Waiting is not in these times: the library waits for receives before a pass, for sends after it.
    """

    log: Log
    chunk: Chunk

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """The library's forward pass of one micro-batch, timed."""
        begin = time.perf_counter_ns()
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self.log.add(FORWARD, self.stage_index, fwd_chunk_id, begin)

        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """The library's backward pass of one micro-batch, or its first half, timed."""
        begin = time.perf_counter_ns()
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self.log.add(BACKWARD if full_backward else INPUT, self.stage_index, bwd_chunk_id, begin)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The library's second half of a backward pass, timed."""
        begin = time.perf_counter_ns()
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.log.add(WEIGHT, self.stage_index, bwd_chunk_id, begin)

    def _validate_fwd_input(self, *_: Any) -> None:
        """Leaves out a check of older versions of torch.

        They hold every micro-batch against the shapes told, and views of the data against strides.
        """

    def _validate_fwd_outputs(self, *_: Any) -> None:
        """Leaves out the same check of what leaves the stage.

        Under autocast the last stage's output has another type than the one told.
        """


class Run:
    """The library's schedule for batches of one shape, with the stages of this part."""

    def __init__(
        self,
        name: str,
        stages: list[Stage],
        crossing: Sequence[Tensor],
        *,
        workload: Workload,
        num_micro_batches: int,
    ) -> None:
        self._name = name
        self._stages = stages
        self._crossing = crossing
        self._workload = workload
        self._count = num_micro_batches
        self._micro: list[Batch] = []  # of this step, on the last stage
        self._log = Log()
        self._wall_ns = 0
        self._steps = 0

        for stage in stages:
            stage.log = self._log

        # The mean over micro-batches is taken in the loss, which costs one division; the library
        # would divide every parameter's gradient.
        self._schedule = SCHEDULES[name](
            stages[0] if name in SINGLE else stages,
            num_micro_batches,
            self._loss,
            scale_grads=False,
        )

        self._first = stages[0].is_first
        self._last = stages[-1].is_last

    def step(self, batch: Batch) -> list[Tensor]:
        """Takes all micro-batches forward and backward, and adds gradients to `.grad`.

        Returns the losses on the last stage, divided so that their sum is the mean; elsewhere none.
        """
        losses: list[Tensor] = []
        self._log.actions = []
        device = self._stages[0].device
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}

        if self._first:
            args = (to_device(Batch(batch.x, None, batch.num_samples), device).x,)

        # The library cuts the target as it cuts x, but a target may be anything. So it is given the
        # numbers of the micro-batches, and `_loss` looks up what they stand for.
        if self._last:
            y = to_device(Batch(None, batch.y, batch.num_samples), device).y
            self._micro = micro_batches(Batch(batch.x, y, batch.num_samples), self._count)
            kwargs = {"target": torch.arange(self._count), "losses": losses}

        begin = time.perf_counter_ns()
        self._schedule.step(*args, **kwargs, **NO_OUTPUTS)
        self._wall_ns += time.perf_counter_ns() - begin

        # The first step lays out the library's memory, and is not counted.
        if self._steps == 0:
            self._wall_ns = 0
            self._log.busy_ns = 0

        self._steps += 1
        return losses

    def _loss(self, output: Tensor, number: Tensor) -> Tensor:
        """The loss of micro-batch `number`, divided by how many there are; it counts as busy."""
        begin = time.perf_counter_ns()
        with self._stages[-1].chunk.precision():
            loss = self._workload.loss(output, self._micro[int(number)]) / self._count

        self._log.busy_ns += time.perf_counter_ns() - begin
        return loss

    def planned(self) -> list[list[Action]]:
        """Lists what each part does, by the library's plan."""
        stage = self._stages[0]

        if self._name in SINGLE:
            parts = range(stage.group_size)
            return [
                slots.order_of(
                    self._name, stages=len(parts), part=part, num_micro_batches=self._count
                )
                for part in parts
            ]

        orders = self._schedule.pipeline_order
        return [
            [
                (KINDS[a.computation_type.name], a.stage_index, a.microbatch_index)
                for a in orders[part]
                if a is not None
            ]
            for part in range(stage.group_size)
        ]

    @property
    def executed(self) -> list[Action]:
        """The passes that this part did in the last step, in their order."""
        return self._log.actions

    def facts(self) -> dict[str, Any]:
        """What the run file keeps: bytes at each cut, the bubble, and micro-batches in flight.

        The bubble is counted from the plan of all parts, and measured on this one. A count is worth
        nothing where this part did its passes in another order than planned.
        """
        stage = self._stages[0]
        planned = self.planned()
        bubble_counted: float | None = None
        bubble_measured: float | None = None
        busy_s: float | None = None

        if planned[stage.group_rank] == self.executed:
            bubble_counted = slots.counted(planned, num_stages=stage.num_stages)

        # Not on a device, which is still busy when a pass has returned.
        if self._steps > 1 and torch.device(stage.device).type == "cpu":
            bubble_measured = 1 - self._log.busy_ns / self._wall_ns
            busy_s = self._log.busy_ns / 1e9

        return {
            "activation_bytes": [tensor.nbytes for tensor in self._crossing[1:-1]],
            "bubble_counted": bubble_counted,
            "bubble_measured": bubble_measured,
            "busy_s": busy_s,
            "in_flight": slots.in_flight(self.executed),
            "order": [f"{kind}{chunk}.{micro}" for kind, chunk, micro in self.executed],
        }


def start(
    name: str,
    chunks: Mapping[int, Chunk],
    crossing: Sequence[Tensor],
    *,
    workload: Workload,
    replica: Replica,
    num_micro_batches: int,
) -> Run:
    """Makes the stages of this part and their schedule.

    Stages are told the shapes of what they receive and send, so that no shape is sent at run time.
    crossing: of one micro-batch, what enters the chain and what leaves each of its chunks.
    """
    stages = []

    for number, chunk in chunks.items():
        chunk.splits = name == "zero_bubble"
        stage = Stage(
            chunk,
            number,
            len(crossing) - 1,
            replica.device,
            input_args=(_described(crossing[number], first=number == 0),),
            output_args=(_described(crossing[number + 1]),),
            group=replica.group,
        )

        stage.chunk = chunk
        stages.append(stage)

    return Run(name, stages, crossing, workload=workload, num_micro_batches=num_micro_batches)


def _described(tensor: Tensor, *, first: bool = False) -> Tensor:
    """Describes a tensor on the meta device; what crosses a cut has a gradient that goes back."""
    bare = tensor.to("meta")
    return bare if first or not bare.is_floating_point() else bare.requires_grad_()
