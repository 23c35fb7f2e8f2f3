"""The simulations of `benchsuite selfcheck --only virtual`: a fresh process for each launch.

The process is given a name and a number of repetitions, and prints JSON. Rates are per CPU second
of the simulation, with graphs that were traced before; batched gradients and single ones take
turns.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.measure.memory import keep_freed_memory
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.topology.ring import Topology
from benchsuite.virtual.world import Kept, simulate

WORKERS = 64
SPREADS: dict[str, dict[str, Any]] = {
    "exponential": {"kind": "exponential"},
    "gamma": {"kind": "gamma", "cv": 0.1},
}
RING_PARAMETERS = 100_000
# Steps of every worker: so many that checks of agreement between groups are a small part.
STEPS = {"mlp": 120, "cnn": 100, "cnn_4": 40}
BIG_WORLD = 1024  # workers whose memory is measured
NEVER = 10**9  # samples between evaluations, more than any run has


def mlp(repetitions: int) -> dict[str, float]:
    """An MLP of 1,441 parameters, with 16 samples per push."""
    return _rates(_cell("mlp", {}, batch_mode="fixed_per_worker"), STEPS["mlp"], repetitions)


def cnn(repetitions: int) -> dict[str, float]:
    """A CNN of 25,370 parameters with 1 sample per push, which is a global batch of 64."""
    return _rates(_cell("cnn", {"global_batch": WORKERS}), STEPS["cnn"], repetitions)


def cnn_4(repetitions: int) -> dict[str, float]:
    """The same CNN with 4 samples per push."""
    return _rates(_cell("cnn", {"global_batch": 4 * WORKERS}), STEPS["cnn_4"], repetitions)


def ring(repetitions: int) -> dict[str, float]:
    """An all-reduce of 64 workers, message by message: milliseconds of real time.

    It is simulated on free links and on slow ones.
    """
    found = {}
    links: dict[str, dict[str, Any]] = {
        "free": {},
        "1 Gbit/s": {"link_mbit": 1000.0, "latency_us": 50.0},
    }

    for name, link in links.items():
        stamps: list[float] = []

        def body(comm: Any, stamps: list[float] = stamps) -> None:
            topology = Topology()
            topology.start(comm)
            vector = torch.full((RING_PARAMETERS,), float(comm.rank))

            for _ in range(1 + repetitions):
                comm.barrier()
                if comm.rank == 0:
                    stamps.append(time.perf_counter())
                topology.mean(vector)

            if comm.rank == 0:
                stamps.append(time.perf_counter())

        virtual_ranks(WORKERS, body, **link)
        found[name] = 1e3 * (stamps[-1] - stamps[1]) / repetitions  # the first allocates

    return found


def memory(repetitions: int) -> dict[str, float]:
    """The most memory of a process that trains 49,665 parameters on 1,024 workers, in GiB."""
    cell = _cell("mlp", {}, preset="wide", replicas=BIG_WORLD, batch_mode="fixed_per_worker")
    _simulate(cell, 1 + repetitions, Kept())
    return {"exponential": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _cell(workload: str, options: dict[str, Any], **fields: Any) -> Cell:
    chosen = {workload: {"evaluate_every": NEVER, **options}}
    fields = {
        "replicas": WORKERS,
        "compute_time": SPREADS["exponential"],
        "options": chosen,
        **fields,
    }
    return resolve(
        Cell(
            workload=workload,
            clock="virtual",
            sync="asynchronous",
            topology="parameter_server",
            **fields,
        )
    )


def _rates(cell: Cell, steps: int, repetitions: int) -> dict[str, float]:
    """Gradients per CPU second, by spread of compute times.

    They are computed together and, as `.. alone`, one by one.
    """
    found: dict[str, list[float]] = {}
    kept = Kept()

    for times in SPREADS.values():
        # A first run traces graphs for the sizes of groups that occur.
        _simulate(dataclasses.replace(cell, compute_time=times), steps, kept)

    for _ in range(repetitions):
        for name, times in SPREADS.items():
            spread = dataclasses.replace(cell, compute_time=times)
            for key, batching in ((name, True), (f"{name} alone", False)):
                facts = _simulate(spread, steps, kept, batching=batching)
                found.setdefault(key, []).append(facts["gradients"] / facts["cpu_s"])

    return {name: statistics.median(values) for name, values in found.items()}


def _simulate(cell: Cell, steps: int, kept: Kept, *, batching: bool = True) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="benchsuite-") as folder:
        sized = resolve(dataclasses.replace(cell, budget=Budget(steps=steps)))
        facts = simulate(sized, folder, kept=kept, batching=batching).facts

    if batching and facts["one_by_one"]:
        raise RuntimeError(
            f"gradients of {cell.label} are not computed together: {facts['one_by_one']}"
        )

    return dict(facts)


CHECKS: dict[str, Callable[[int], dict[str, float]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "cnn_4": cnn_4,
    "ring": ring,
    "memory": memory,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    print(json.dumps(CHECKS[sys.argv[1]](int(sys.argv[2]))))
