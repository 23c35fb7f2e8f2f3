"""The check of `benchsuite selfcheck` that simulates: gradients per CPU second, messages, memory.

Every launch is a fresh process of `simulations.py`. This module imports no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

from benchsuite.cluster.rank_imports import python_path
from benchsuite.errors import UsageError
from benchsuite.measure.load import CpuMeter
from benchsuite.programs.bars import Figure

MODULE = "benchsuite.programs.selfcheck.simulations"
MLP_BARS = {"exponential": 4_000, "gamma": 12_000}  # gradients per CPU second
CNN_BARS = {"exponential": 1.2, "gamma": 2.0}  # gradients in batches over gradients one by one
CNN_SAMPLES = {"cnn": 1, "cnn_4": 4}  # samples per push
RING_BAR_MS = 100.0
MEMORY_BAR_GIB = 1.5


def virtual(launches: int, repetitions: int = 3) -> Iterator[Figure]:
    """Measures the simulations; the median over the `repetitions` within a launch is its value."""
    yield from _mlp(launches, repetitions)
    for name, samples in CNN_SAMPLES.items():
        yield from _cnn(name, samples, launches, repetitions)
    points, foreign = _launch("ring", launches, 3 * repetitions)

    for link in points[0]:
        yield Figure(
            item="virtual",
            quantity=f"ring all-reduce, 64 workers, 100k parameters, links {link}",
            unit="ms",
            bar=RING_BAR_MS,
            points=[point[link] for point in points],
            foreign=foreign,
        )

    points, foreign = _launch("memory", launches, 1)
    yield Figure(
        item="virtual",
        quantity="peak memory, 1,024 workers, 49,665 parameters",
        unit="GiB",
        bar=MEMORY_BAR_GIB,
        points=[point["exponential"] for point in points],
        foreign=foreign,
    )


def _mlp(launches: int, repetitions: int) -> Iterator[Figure]:
    points, foreign = _launch("mlp", launches, repetitions)
    for spread, bar in MLP_BARS.items():
        alone = sorted(point[f"{spread} alone"] for point in points)
        yield Figure(
            item="virtual",
            quantity=f"mlp, 64 workers, {spread} times",
            unit="gradients per CPU s",
            bar=bar,
            better="higher",
            points=[point[spread] for point in points],
            foreign=foreign,
            note=f"one by one {alone[0]:,.0f} to {alone[-1]:,.0f}",
        )


def _cnn(name: str, samples: int, launches: int, repetitions: int) -> Iterator[Figure]:
    points, foreign = _launch(name, launches, repetitions)
    for spread, bar in CNN_BARS.items():
        rates = sorted(point[spread] for point in points)
        per_push = "1 sample" if samples == 1 else f"{samples} samples"
        yield Figure(
            item="virtual",
            quantity=f"cnn, 64 workers, {per_push} per push, {spread} times",
            unit="x one by one",
            bar=bar,
            better="higher",
            points=[point[spread] / point[f"{spread} alone"] for point in points],
            foreign=foreign,
            note=f"{rates[0]:,.0f} to {rates[-1]:,.0f} gradients per CPU s",
        )


def _launch(
    name: str, launches: int, repetitions: int
) -> tuple[list[dict[str, float]], float | None]:
    """Returns (what each fresh process found, share of the cores that others used).

    UsageError where one fails.
    """
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", MODULE, name, str(repetitions)]
    meter = CpuMeter()
    points = []

    for _ in range(launches):
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )

        if ended.returncode != 0:
            said = ended.stderr.strip().splitlines() or ["nothing was said"]
            raise UsageError(f"selfcheck virtual: {name} ended with {ended.returncode}: {said[-1]}")

        points.append(json.loads(ended.stdout))

    return points, meter.read().foreign_share
