"""Laws of traffic: a whole run sends what its strategy's file predicts.

The prediction is made from shapes and recorded events.
"""

from __future__ import annotations

from functools import partial

from benchsuite.comm import Traffic
from benchsuite.compression import Compression
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.runs import Change, Run, option, recipe_of, run
from benchsuite.laws.synchronous import is_exact, with_clip_norm
from benchsuite.laws.topology import compare, is_counted
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell
from benchsuite.sync import Events, Setting, Strategy
from benchsuite.topology import Topology
from benchsuite.worker import predict, setup
from benchsuite.worker.setup import Training
from benchsuite.worker.traffic_mode import Call, TrafficMode, derive


def counted_is_predicted(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """Bytes and messages per (source, destination) of a whole run are the predicted ones.

    The servers' agreement on norms is included. Bound: exact. The twins synchronise or push twice,
    or predict without clipping.
    """
    result = run(make_ranks, cell, change=change)
    return compare(result.traffic, predicted(result), result.cell)


def predicted(result: Run) -> Traffic:
    """What a strategy that never ran says of this run."""
    strategy, setting = described(result.cell)
    return predict.of_run(result.cell, strategy, result.workers[0].shapes, result.events, setting)


def described(cell: Cell) -> tuple[Strategy, Setting]:
    """The strategy, not started, and what its prediction may depend on."""
    topology: Topology = setup.make_topology(cell)
    options = {kind: setup.options_for(cell, kind) for kind in ("compression", "sync")}
    compression: Compression = setup.make("compression", cell.compression, options["compression"])
    strategy: Strategy = setup.make("sync", cell.sync, options["sync"])
    return strategy, setup.setting(cell, topology, compression, recipe_of(cell))


def undisturbed_is_expected(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """An undisturbed run sends the total bytes that were announced before it ran.

    Who is fast decides the edges, so only the total is compared. Bound: exact. The twin
    synchronises twice.
    """
    result = run(make_ranks, cell, change=change)
    strategy, setting = described(result.cell)
    recipe = recipe_of(result.cell)
    workload = setup.make_workload(result.cell)
    num_batches = recipe.budget // recipe.global_batch
    events: Events = setup.expected_events(strategy, workload, num_batches, setting)
    before = predict.of_run(result.cell, strategy, result.workers[0].shapes, events, setting)
    counted = result.traffic.payload_bytes
    told = before.payload_bytes
    return Figure(
        abs(counted - told), 0, f"{counted} bytes counted, {told} expected, {result.cell.label}"
    )


def called_is_predicted(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """Where the library's collectives carry a run, their calls and sizes are the predicted ones.

    Bound: exact. The twins synchronise twice, or not at all.
    """
    result = run(make_ranks, cell, change=change)
    return compare(result.traffic + result.called, predicted(result), result.cell)


def library_is_seen(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """In one more step the library's all-reduces carry the whole gradient once, and nothing else.

    A dispatch mode watches that step; the suite's own counters saw nothing. The value is what is
    missing or too much, in elements and bytes. Bound: exact. The twins synchronise nothing, or
    twice.
    """
    result = run(make_ranks, cell, change=change, after=_one_step_seen)
    strategy, setting = described(result.cell)
    shapes = result.workers[0].shapes
    workers = result.cell.num_workers
    once = {name: [1] * workers for name in result.events}
    told = strategy.predicted_traffic(shapes, once, setting)
    numel = sum(shape.numel() for shape in shapes.values())
    value = float(result.traffic.payload_bytes)
    seen = 0
    for worker in result.workers:
        calls: list[Call] = worker.after
        seen = sum(call.numel for call in calls if call.name == "allreduce")
        value += abs(seen - numel) + sum(call.name != "allreduce" for call in calls)
        value += abs(derive(calls, workers).payload_bytes - told.payload_bytes)
    return Figure(
        value,
        0,
        f"{seen} elements seen in all-reduces, {numel} in the gradient, {result.cell.label}",
    )


def _one_step_seen(training: Training) -> list[Call]:
    """The library's calls in one more step."""
    mode = TrafficMode()
    with mode:
        training.strategy.step(
            training.fetch((0, training.comm.rank, training.topology.num_workers))
        )
    return mode.calls


def _times_decide(cell: Cell) -> bool:
    """Whether the total depends on times.

    Times decide how many gradients are given up, or how often a worker meets the centre where
    batches are handed out.
    """
    period = option(cell, "elastic_averaging", "period") if cell.num_servers else None
    return option(cell, "k_sync", "late") == "cancel" or (period or 1) > 1


_MEAN_TWICE = twins.with_mean(twins.twice)
_NO_MEAN = twins.with_mean(twins.silent)
_TWICE = partial(counted_is_predicted, change=_MEAN_TWICE)
_SERVER = {"topology": "parameter_server", "servers": 2, "replicas": 2}
_NATIVE = {"topology": "native", "replicas": 2}

LAWS = (
    Law(
        "counted traffic of a run is the predicted",
        counted_is_predicted,
        is_counted,
        (
            Control("the ring synchronises twice", _TWICE, {"topology": "ring", "replicas": 3}),
            Control(
                "pushes twice",
                partial(counted_is_predicted, change=twins.with_server(twins.Repeating)),
                {**_SERVER, "sync": "synchronous"},
            ),
            Control(
                "the prediction knows nothing of clipping",
                partial(counted_is_predicted, change=partial(with_clip_norm, clip_norm=0.5)),
                {**_SERVER, "sync": "synchronous"},
            ),
        ),
    ),
    Law(
        "traffic of a run by the library's collectives is the predicted",
        called_is_predicted,
        lambda cell: (
            not is_counted(cell)
            and not plugins.find("sync", cell.sync).constants.get("calls_library")
        ),
        (
            Control(
                "synchronises twice", partial(called_is_predicted, change=_MEAN_TWICE), _NATIVE
            ),
            Control(
                "nothing is synchronised", partial(called_is_predicted, change=_NO_MEAN), _NATIVE
            ),
        ),
    ),
    Law(
        "counted traffic of a run is what was expected before it",
        undisturbed_is_expected,
        lambda cell: (
            is_counted(cell) and recipe_of(cell).clip_norm is None and not _times_decide(cell)
        ),
        (
            Control(
                "the ring synchronises twice",
                partial(undisturbed_is_expected, change=twins.with_mean(twins.twice)),
                {"topology": "ring", "replicas": 3},
            ),
        ),
    ),
    Law(
        "the library's collectives are seen with their sizes",
        library_is_seen,
        lambda cell: (
            is_exact(cell)
            and not is_counted(cell)
            and cell.replicas > 1
            and cell.hosts == 1
            # Buckets travel in another thread, which the dispatch mode does not see.
            and not option(cell, "synchronous", "bucket_mib")
        ),
        (
            Control(
                "nothing is synchronised",
                partial(library_is_seen, change=twins.with_mean(twins.silent)),
                {"topology": "native", "replicas": 2},
                real_ranks=True,
            ),
            Control(
                "synchronises twice",
                partial(library_is_seen, change=twins.with_mean(twins.twice)),
                {"topology": "native", "replicas": 2},
                real_ranks=True,
            ),
        ),
        own_run=True,
        asks={"after": _one_step_seen},
    ),
)
