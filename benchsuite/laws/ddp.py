"""Laws of the library's own hooks, which stand beside the suite's compressions and local steps.

Their ranks are processes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchsuite.comm import Traffic
from benchsuite.compression.none import Compression as AsItIs
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness.reference import one_process
from benchsuite.laws.harness.runs import Change, both, option, rebuilt, relative, run, worst
from benchsuite.laws.harness.twins import without_wrapper
from benchsuite.laws.synchronous import FLOAT64
from benchsuite.laws.traffic import predicted
from benchsuite.plan import plugins
from benchsuite.plan.cell import Budget, Cell
from benchsuite.sync.ddp import DENSE_STEPS
from benchsuite.worker.setup import Training
from benchsuite.worker.traffic_mode import Call, TrafficMode, derive, derived_run

ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
# How much roundings may grow over ten steps of plain SGD: the gradient at parameters that are a
# little off is a little off too.
GROWTH = 4.0


def calls_are_predicted(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """The library's calls of a whole run cost what the strategy's file predicts.

    Every step is watched. One cycle of each kind is watched again after the run, because in a
    measured run it stands for all. What DDP broadcasts once is left out: the order of its buckets,
    some 80 bytes after the first step. Bound: exact. In the twins the hook or
    DistributedDataParallel is missing.
    """
    result = run(make_ranks, cell, change=both(change, _watched), after=_seen)
    told = predicted(result).payload_bytes
    gap = 0
    text = ""
    for worker in result.workers:
        calls, by_cycles = worker.after
        whole = derive(calls, result.cell.num_workers).payload_bytes
        gap += abs(whole - told) + abs(by_cycles.payload_bytes - told)
        text = (
            f"{whole} bytes of the library's calls, {by_cycles.payload_bytes} by cycles, {told} "
            "predicted"
        )
    return Figure(gap, 0, f"{text}, {result.cell.label}")


def _watched(training: Training) -> Training:
    """The change that notes every call of the library in this rank's steps."""
    strategy: Any = training.strategy
    step = strategy.step
    calls: list[Call] = []

    def watched(batch: Any) -> Any:
        with TrafficMode() as mode:
            loss = step(batch)
        calls.extend(call for call in mode.calls if call.name != "broadcast")
        return loss

    strategy.step = watched
    strategy.plain_step = step
    strategy.calls = calls
    return training


def _seen(training: Training) -> tuple[list[Call], Traffic]:
    """The calls of the run, and the traffic derived from one cycle of each kind after it."""
    strategy: Any = training.strategy
    calls = list(strategy.calls)
    size = training.topology.num_workers
    batch = training.workload.batch(0, shard=training.comm.rank, num_shards=size)
    num_steps = training.recipe.budget // training.recipe.global_batch
    cycles = strategy.cycles(num_steps)
    return calls, derived_run(lambda: strategy.plain_step(batch), cycles, size)


def half_follows_one_process(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """With gradients in half precision parameters follow one process, up to N + 1 roundings.

    The roundings of ten steps may grow fourfold. In the twins the hook does not divide, or
    DistributedDataParallel is missing.
    """
    result = run(make_ranks, cell, change=change)
    reference = one_process(result.cell)
    allowed = GROWTH * (cell.replicas + 1) * ROUNDING[plugins.stem(cell.compression)]
    value, where = worst(
        [
            (
                relative(mine - theirs, theirs - reference[0]),
                f"worker {worker.rank} after step {step}",
            )
            for worker in result.workers
            for step, (mine, theirs) in enumerate(zip(worker.params, reference, strict=True))
            if step
        ]
    )
    return Figure(value, allowed, f"||difference|| / ||way||, {where}, {cell.label}")


def powersgd_begins_later(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """The library's PowerSGD is dense for two steps and lossy from then on.

    The dense steps are those of one process, with a relative error of 1e-10 as the bound. In the
    twin the hook is missing.
    """
    result = run(make_ranks, cell, change=change)
    reference = one_process(result.cell)
    gaps = [
        max(relative(worker.params[step] - theirs, theirs) for worker in result.workers)
        for step, theirs in enumerate(reference)
    ]
    dense = max(gaps[: DENSE_STEPS + 1])
    lossy = gaps[DENSE_STEPS + 1]
    text = (
        f"off by {dense:.2g} after {DENSE_STEPS} steps, by {lossy:.2g} after the next, {cell.label}"
    )
    return Figure(dense if lossy > 1e3 * FLOAT64 else 1.0, FLOAT64, text)


def without_hook(training: Training) -> Training:
    """The change that lets DDP send gradients as they are."""
    return rebuilt(training, compression=AsItIs())


def _undivided(training: Training) -> Training:
    """The change with a hook that forgets to divide."""
    strategy: Any = training.strategy
    backward = strategy._part.backward

    def undivided(batch: Any) -> Any:
        loss = backward(batch)
        for parameter in strategy._params:
            parameter.grad.mul_(training.topology.num_workers)
        return loss

    strategy._part.backward = undivided
    return training


def _by_library(cell: Cell) -> bool:
    """Whether the strategy calls the library by itself, on several replicas."""
    return (
        bool(plugins.find("sync", cell.sync).constants.get("calls_library")) and cell.replicas > 1
    )


def _on(compression: str = "none", **options: Any) -> dict[str, Any]:
    """Fields of a cell of DDP with this compression."""
    on = {"sync": "ddp", "topology": "native", "replicas": 2, "budget": Budget(timeout_s=60.0)}
    return {**on, "compression": compression, "options": options}


LAWS = (
    Law(
        "the library's calls of a whole run cost what is predicted",
        calls_are_predicted,
        _by_library,
        (
            Control(
                "the hook is missing",
                partial(calls_are_predicted, change=without_hook),
                _on("fp16"),
            ),
            Control(
                "DistributedDataParallel is missing",
                partial(calls_are_predicted, change=without_wrapper),
                _on(),
            ),
        ),
        own_run=True,
        asks={"change": _watched, "after": _seen},
    ),
    Law(
        "half precision of the library's follows one process",
        half_follows_one_process,
        lambda cell: _by_library(cell) and plugins.stem(cell.compression) in ROUNDING,
        (
            Control(
                "the hook does not divide",
                partial(half_follows_one_process, change=_undivided),
                _on("bf16"),
            ),
            Control(
                "DistributedDataParallel is missing",
                partial(half_follows_one_process, change=without_wrapper),
                _on("fp16"),
            ),
        ),
    ),
    Law(
        "the library's PowerSGD is dense for two steps and lossy after",
        powersgd_begins_later,
        lambda cell: _by_library(cell) and option(cell, "powersgd", "rank") == 1,
        (
            Control(
                "the hook is missing",
                partial(powersgd_begins_later, change=without_hook),
                _on("powersgd", powersgd={"rank": 1}),
            ),
        ),
    ),
)
