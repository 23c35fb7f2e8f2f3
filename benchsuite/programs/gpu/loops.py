"""The suite's loop in turn with a hand-written one, on the same model and data of a device.

Their ratio is what the suite costs. Both sides are timed alike: an event at the end of every step,
read when a round is over, with the first steps dropped. The hand-written loop is what one writes
without the suite: autocast, `zero_grad`, `backward`, the recipe's optimiser on the model's own
parameters, and no look at the loss.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchsuite.comm.process import ProcessComm
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.measure.device_time import DeviceTimer, cuda_event
from benchsuite.plan.cell import Cell
from benchsuite.update import fuse
from benchsuite.worker import devices, setup
from benchsuite.worker.build import build
from benchsuite.worker.clock import StepClock, TimedPart
from benchsuite.worker.device_figures import HostEvent
from benchsuite.worker.loop import Loop
from benchsuite.worker.rank_record import Measured
from benchsuite.worker.snapshots import Snapshots
from benchsuite.workload import seeded_layers, to_device


@dataclass
class Rates:
    """Samples per second of each round, on both sides."""

    ours: list[float] = field(default_factory=list)
    hand: list[float] = field(default_factory=list)

    def median(self, side: str) -> float:
        """The median over the rounds of one side."""
        return statistics.median(self.ours if side == "ours" else self.hand)

    @property
    def ratio(self) -> float:
        """The suite's rate over the hand-written loop's: the median of the rounds' ratios."""
        return statistics.median(
            ours / hand for ours, hand in zip(self.ours, self.hand, strict=True)
        )


def rounded(rates: Rates) -> dict[str, Any]:
    """The rates as the result file has them."""
    return {"ours": rates.ours, "hand": rates.hand, "ratio": rates.ratio, "unit": "samples/s"}


def compared(cell: Cell, *, rounds: int, warm_up: int) -> Rates:
    """Runs rounds of the cell's budget on each side; the two take turns to begin.

    The first round of all warms the device up and is not kept.
    """
    rates = Rates()

    for number in range(rounds + 1):
        order = ("ours", "hand") if number % 2 else ("hand", "ours")
        for side in order:
            rate = (_ours if side == "ours" else _hand)(cell, warm_up)
            gc.collect()  # the other side finds an empty device
            if number:
                getattr(rates, side).append(rate)

    return rates


def _ours(cell: Cell, warm_up: int) -> float:
    """The rate of one rank's life in the suite, without its process: build, loop, rows."""

    def body(comm: ProcessComm) -> float:
        timer = _timer(cell)
        made: list[TimedPart] = []

        def timed(part: Any, rank: int) -> TimedPart:
            made.append(TimedPart(part, timer=timer))
            return made[0]

        training = build(cell, comm, wrap=timed)
        recipe = training.recipe

        with tempfile.TemporaryDirectory() as folder:
            measured = Measured(
                StepClock(recipe.budget // recipe.global_batch), Snapshots(0, folder, "0")
            )
            Loop(training, made[0], comm, lambda phase, step: None, timer).run(
                measured, owner=False
            )

        columns = measured.clock.to_json()
        assert None not in columns["loss"], "the run diverged"
        return _rate(columns["end_ns"], recipe.global_batch, warm_up)

    [rate] = thread_ranks(1, body, timeout_s=300.0)
    return rate


def _hand(cell: Cell, warm_up: int) -> float:
    """The rate of the loop that one would write, in a thread because the suite's runs in one."""

    def body(comm: ProcessComm) -> float:
        device = devices.current(cell)
        workload = setup.start_workload(cell)
        setup.place(workload, device)
        recipe = setup.make_recipe(cell, workload)
        dtype = setup.DTYPES[cell.precision]
        model = nn.Sequential(*seeded_layers(workload, cell.seed)).to(dtype).to(device)
        optimizer = recipe.make_optimizer(model.parameters())
        if device.type == "cuda":
            fuse(optimizer)
        autocast: Callable[[], Any] = contextlib.nullcontext
        if cell.precision == "bf16":
            autocast = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
        timer = _timer(cell)
        timer.start()

        for step in range(recipe.budget // recipe.global_batch):
            batch = to_device(workload.batch(step, shard=0, num_shards=1), device)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr(step * recipe.global_batch / recipe.budget)
            optimizer.zero_grad()
            with autocast():
                loss: Tensor = workload.loss(model(batch.x), batch)
            loss.backward()
            optimizer.step()
            timer.end_step()

        ends = [step.end_ns for step in timer.settle()]
        return _rate(ends, recipe.global_batch, warm_up)

    [rate] = thread_ranks(1, body, timeout_s=300.0)
    return rate


def _timer(cell: Cell) -> DeviceTimer:
    return (
        DeviceTimer(cuda_event) if cell.device == "cuda" else DeviceTimer(HostEvent, lambda: None)
    )


def _rate(ends_ns: list[int], batch: int, warm_up: int) -> float:
    """Samples per second of the steps after the warm-up."""
    return (len(ends_ns) - warm_up) * batch / ((ends_ns[-1] - ends_ns[warm_up - 1]) * 1e-9)
