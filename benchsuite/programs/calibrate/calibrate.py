"""`benchsuite calibrate`: how long messages, additions and gradients take on this machine.

It measures with fresh processes, one value per launch, and fits the alpha-beta model. It then
compares the model with what it has not seen: left-out message sizes, left-out rates of shaped
links, and the step time of real cells, predicted under the virtual clock. No change is refused for
these figures. This process imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchsuite.analysis import fits
from benchsuite.analysis.costs import OPERATIONS, MessageModel
from benchsuite.errors import UsageError
from benchsuite.measure.load import CpuMeter, num_cores
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.programs.bars import Figure
from benchsuite.programs.bench import Bench
from benchsuite.programs.calibrate import cells
from benchsuite.programs.calibrate.cells import Models, Pair
from benchsuite.programs.calibrate.launches import MIB, RANKS, RANKS_OF, Effort, Launches, take
from benchsuite.results.record import OVERSUBSCRIBED, now_iso
from benchsuite.results.store import Store

SCHEMA = 1
MODELLED_OPERATIONS = ("ring", "tree", "direct", "parameter_server")
MODELLED_WORKERS = (2, 4, 8, 16, 32, 64)
MODELLED_BYTES = (100_000, 45_000_000)
MODELLED_MBIT = (1_000, 10_000)

Say = Callable[[str], None]


def run(
    workload: str = "cnn",
    preset: str = "digits",
    *,
    effort: Effort | None = None,
    results: str | Path = "results",
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measures, fits, predicts and stores; returns the stored document with its `path`.

    It takes less than two minutes on two cores. UsageError for a workload that is not there,
    StoreError where `results` cannot be written.
    """
    from benchsuite.running import setting, starters

    effort = effort or Effort()
    if effort.launches < 1:
        raise UsageError(f"--launches {effort.launches}: at least 1 is needed")
    cell = resolve(Cell(workload=workload, preset=preset, budget=Budget(steps=effort.steps)))
    store = Store(results)
    started_at = now_iso()
    here = setting.current(store)
    meter = CpuMeter()
    pairs: list[Pair] = []
    with Bench(RANKS) as bench:

        def beside(launches: Launches) -> None:
            if not pairs:
                steps = launches.affordable(effort.steps, effort.seconds)
                pairs.extend(cells.pairs(workload, preset, steps))
            cells.measure(pairs, lambda cell: starters.launch(bench.cluster, cell, here))

        launches = take(bench, cell, effort, say=say, beside=beside)
        # Read while the host lives: afterwards its ranks' share would seem to be somebody else's.
        load = meter.read()
    models = cells.models_of(launches)
    say("virtual twins")
    cells.predict(pairs, launches, models, lambda cells: starters.simulate(cells, here))
    environment = store.environment(here.machine, here.environment_id)
    say("fits")
    document = {
        "schema": SCHEMA,
        "kind": "calibration",
        "machine": here.machine,
        "environment_id": here.environment_id,
        **{name: environment.get(name) for name in ("commit", "dirty")},
        "started_at": started_at,
        "workload": cell.workload,
        "preset": cell.preset,
        "launches": launches.num_launches,
        "cores": num_cores(),
        "foreign_cpu_share": load.foreign_share,
        "contended": load.contended,
        **_found(launches, models),
        "predictions": [pair.to_json() for pair in pairs],
        "modelled": list(_modelled(models)),
        "raw": launches.to_json(),
    }
    return document | {"path": str(store.write_calibration(here.machine, document))}


def _found(launches: Launches, models: Models) -> dict[str, Any]:
    """The measured quantities and what was fitted to them."""
    return {
        "vector_bytes": launches.vector_bytes,
        "quantities": [figure.to_json() for figure in _quantities(launches, models)],
        "fits": {
            "one_way": _fit(models.one_way),
            "both_ways": _fit(models.both_ways),
            "compute": _compute(launches),
        },
        "shaped": _shaped(launches, models.one_way),
    }


# -- measured --------------------------------------------------------------------------------------


def _quantities(launches: Launches, models: Models) -> Iterator[Figure]:
    """The measured quantities, each with one value per launch."""
    yield from _messages(launches)
    yield from _work(launches)
    yield from _steps(launches, models)


def _figure(
    launches: Launches,
    kind: str,
    quantity: str,
    unit: str,
    points: Sequence[float],
    *,
    better: Literal["lower", "higher"] = "lower",
    note: str = "",
) -> Figure:
    """One line of the table: a value per launch, with the share of the CPU that others took."""
    return Figure(
        item=kind,
        quantity=quantity,
        unit=unit,
        points=points,
        foreign=launches.foreign_share(kind),
        better=better,
        note=note,
    )


def _messages(launches: Launches) -> Iterator[Figure]:
    """Messages one way and both ways at once, tickets, counters, and an incast."""
    figure = partial(_figure, launches)
    sizes = list(launches.records["messages"][0][0]["one_way"])

    for name, said in (("one_way", "one message"), ("both_ways", "a message each way at once")):
        times = launches.medians("messages", name, sizes[0])
        yield figure(
            "messages", f"{said}, {_bytes(sizes[0])}", "us", [1e6 * value for value in times]
        )

        for size in (size for size in sizes if int(size) in (MIB, int(sizes[-1]))):
            rates = [
                8 * int(size) / value / 1e9 for value in launches.medians("messages", name, size)
            ]
            yield figure("messages", f"{said}, {_bytes(size)}", "Gbit/s", rates, better="higher")

    for name, said in (
        ("ticket", "a ticket, until the server has it"),
        ("ticket_call", "a ticket, for its sender"),
        ("counter", "a counter's answer"),
    ):
        yield figure(
            "messages", said, "us", [1e6 * value for value in launches.medians("messages", name)]
        )

    note = OVERSUBSCRIBED if num_cores() < RANKS_OF["incast"] else ""
    yield figure(
        "incast", "incast, 3 ranks: a second message takes", "x", cells.incast(launches), note=note
    )


def _work(launches: Launches) -> Iterator[Figure]:
    """Additions of a server, and gradients of a worker alone."""
    figure = partial(_figure, launches)

    for size in launches.records["additions"][0][0]["add"]:
        rates = [int(size) / value / 1e9 for value in launches.medians("additions", "add", size)]
        yield figure("additions", f"in-place add, {_bytes(size)}", "GB/s", rates, better="higher")

    for batch in launches.batches:
        times = launches.medians("gradients", "gradient", str(batch))
        yield figure(
            "gradients", f"gradient of {batch} samples", "ms", [1e3 * value for value in times]
        )


def _steps(launches: Launches, models: Models) -> Iterator[Figure]:
    """Two ranks that work at once, and what of a step no model explains."""
    figure = partial(_figure, launches)

    if launches.two_ranks:
        times = launches.medians("steps", "both_gradient")
        said = f"gradient of {launches.batches[0] // 2} samples, both ranks at once"
        yield figure("steps", said, "ms", [1e3 * value for value in times])
        times = cells.second_message(launches)
        yield figure(
            "steps",
            "two ranks, one more exchange in a step",
            "ms",
            [1e3 * value for value in times],
        )

    kinds = {
        "alone": "one rank",
        "exchanging": "two ranks, one exchange",
        "answered": "one rank, one answer",
    }

    for name, points in cells.rests(launches, models).items():
        said = f"rest of a step, {kinds[name]}"
        yield figure(
            "gradients" if name == "alone" else "steps",
            said,
            "ms",
            [1e3 * value for value in points],
        )


def _bytes(size: str | int) -> str:
    value = int(size)
    for unit, scale in (("MiB", MIB), ("KiB", 1024)):
        if value >= scale and value % scale == 0:
            return f"{value // scale} {unit}"
    return f"{value:,} bytes"


# -- fits ------------------------------------------------------------------------------------------


def _fit(model: MessageModel) -> dict[str, Any]:
    errors = {size: each.error for size, each in model.left_out.items()}
    worst = max(errors, key=lambda size: abs(errors[size]), default=None)
    return model.fit.to_json() | {
        "n": len(model.points),
        "left_out_size_errors": {f"{size:g}": error for size, error in errors.items()},
        "worst_left_out_size": worst,
        "worst_size_error": None if worst is None else abs(errors[worst]),
        "median_size_error": statistics.median(map(abs, errors.values())) if errors else None,
    }


def _compute(launches: Launches) -> dict[str, Any]:
    """Fits overhead_s + per_sample_s x samples to the time of one gradient, with errors.

    The errors are those on batch sizes that were left out of the fit.
    """
    times = {
        batch: launches.medians("gradients", "gradient", str(batch)) for batch in launches.batches
    }
    points = [(float(batch), value) for batch, column in times.items() for value in column]
    found: dict[str, Any] = {"n": len(points), "overhead_s": None, "per_sample_s": None}
    found |= {"left_out_batch_errors": {}, "worst_batch_error": None}

    if len(times) < 2:
        return found | {
            "reason": f"{len(times)} batch size divides the global batch: a line needs two"
        }

    straight = fits.line(points)
    found |= {"overhead_s": straight.alpha_s, "per_sample_s": straight.beta_s_per_byte}

    if len(times) > 2:
        errors = {
            batch: fits.line([point for point in points if point[0] != batch]).seconds(batch)
            / statistics.median(column)
            - 1
            for batch, column in times.items()
        }
        found["left_out_batch_errors"] = {str(batch): error for batch, error in errors.items()}
        found["worst_batch_error"] = max(map(abs, errors.values()))

    return found


def _shaped(launches: Launches, model: MessageModel) -> dict[str, Any]:
    """How much of each link's rate arrived.

    The provenance is `emulated`: the processes are real, the link is shaped, and no latency is
    added.
    """
    rows = []

    for mbit, points in launches.shaped_points().items():
        size = max(size for size, _ in points)
        delivered = [8 * size / seconds / 1e6 for at, seconds in points if at == size]
        rows.append(
            {
                "mbit": mbit,
                "bytes": size,
                "delivered_mbit": delivered,
                "left_out": model.rate_errors.get(mbit),
            }
        )

    errors = model.rate_errors.values()
    return {
        "provenance": "emulated",
        "reason": launches.shaped_reason,
        "rates": rows,
        "payload_share": model.payload_share if rows else None,
        "worst_rate_error": max(map(abs, errors), default=None),
        "foreign_cpu_share": launches.foreign_share("shaped"),
    }


def _modelled(models: Models) -> Iterator[dict[str, Any]]:
    """The time of one mean of a vector over links that this machine does not have."""
    for mbit in MODELLED_MBIT:
        for num_bytes in MODELLED_BYTES:
            for name in MODELLED_OPERATIONS:
                operation = OPERATIONS[name]
                model = models.both_ways if operation.both_ways else models.one_way

                for num_workers in MODELLED_WORKERS:
                    found = model.extrapolate(
                        operation, num_workers=num_workers, num_bytes=num_bytes, mbit=mbit
                    )
                    row = {
                        "operation": name,
                        "num_workers": num_workers,
                        "num_bytes": num_bytes,
                        "link_mbit": mbit,
                    }
                    yield row | found.to_json()
