"""Derived forms of stored runs, never edited: `export csv` and its series.

The table has one row per run, a series one row per point. Seconds of a series are those of the
clock that its row names. A null is an empty field. Neither torch nor pandas is needed.
"""

from __future__ import annotations

import csv as csv_module
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from benchsuite.errors import UsageError
from benchsuite.results.columns import COLUMNS
from benchsuite.results.record import Run
from benchsuite.results.store import Store

# Name of a series -> its columns. The first four say which run a point is of.
SERIES: Mapping[str, tuple[str, ...]] = {
    "curves": (
        "run_id",
        "cell_id",
        "seed",
        "clock",
        "quantity",
        "samples",
        "seconds",
        "bytes",
        "value",
    ),
    "step_times": ("run_id", "cell_id", "seed", "clock", "worker", "step", "step_time_s"),
    "staleness": ("run_id", "cell_id", "seed", "clock", "staleness", "updates"),
    "ranks": (
        "run_id",
        "cell_id",
        "seed",
        "clock",
        "rank",
        "role",
        "steps",
        "data_s",
        "compute_s",
        "blocked_s",
        "update_s",
        "idle_s",
        "wall_s",
        "cpu_s",
        "peak_rss_bytes",
        "virtual_s",
        "base_rss_bytes",
        "peak_model_bytes",
    ),
}


def csv(store: Store, stream: TextIO) -> int:
    """Writes every stored run as one row with the columns of `columns.COLUMNS`.

    Returns the number of rows.
    """
    writer = csv_module.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    rows = store.rows()
    writer.writerows([_field(row[name]) for name in COLUMNS] for row in rows)

    return len(rows)


def series(store: Store, folder: Path) -> list[Path]:
    """Writes one csv file per entry of `SERIES`; returns their paths.

    UsageError where the folder cannot be written.
    """
    runs = store.runs()
    points = {
        "curves": _curves,
        "step_times": _step_times,
        "staleness": _staleness,
        "ranks": _ranks,
    }
    paths = []

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, columns in SERIES.items():
            path = folder / f"{name}.csv"

            with open(path, "w", encoding="utf-8", newline="") as stream:
                writer = csv_module.writer(stream, lineterminator="\n")
                writer.writerow(columns)

                for run in runs:
                    key = (run.run_id, run.cell_id, run.cell.seed, run.cell.clock)
                    for point in points[name](run):
                        writer.writerow([_field(value) for value in (*key, *point)])

            paths.append(path)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}; give another --series DIR"
        ) from error

    return paths


def _curves(run: Run) -> Iterator[tuple[Any, ...]]:
    """Points of a run's curves.

    Loss against samples at every step; the metric against samples, seconds and bytes at every
    evaluation.
    """
    loss = run.result.get("loss") or []

    loss_samples = run.result.get("loss_samples") or [None] * len(loss)
    for samples, value in zip(loss_samples, loss, strict=False):
        yield "loss", samples, None, None, value

    evaluations = run.result.get("evaluations") or {}
    name = (run.result.get("target") or {}).get("metric", "metric")
    points = zip_longest(
        evaluations.get("samples", ()),
        run.cost.get("evaluation_s") or (),
        run.cost.get("evaluation_bytes") or (),
        evaluations.get("metric", ()),
    )

    for point in points:
        yield name, *point


def _step_times(run: Run) -> Iterator[tuple[Any, ...]]:
    """The duration of every step of every worker."""
    for worker, steps in enumerate(run.raw.get("step_s") or ()):
        for step, seconds in enumerate(steps):
            yield worker, step, seconds


def _staleness(run: Run) -> Iterable[tuple[Any, ...]]:
    """The histogram of staleness, in rising order."""
    histogram = (run.result.get("staleness") or {}).get("histogram") or {}
    return sorted((int(staleness), updates) for staleness, updates in histogram.items())


def _ranks(run: Run) -> Iterator[tuple[Any, ...]]:
    """Where the time of every rank went, its memory and its role."""
    for rank in run.cost.get("ranks") or ():
        yield tuple(rank.get(name) for name in SERIES["ranks"][4:])  # behind the run's four


def _field(value: Any) -> Any:
    """A value as a csv field: true and false as JSON writes them, floats by their shortest exact
    form.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"

    return repr(value) if isinstance(value, float) else value
