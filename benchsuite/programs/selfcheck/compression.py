"""The check of `benchsuite selfcheck` on compressions: work, bytes, and links that pay for them.

Each of two workers sends M bytes per mean by a dense ring. A compression sends C bytes and works c
seconds besides (encode, decode, add). On a link of r bit/s it is faster where c + 8 C / r < 8 M /
r, which is below the break-even rate 8 (M - C) / c. This holds for what is sent while others wait;
nothing is hidden behind a backward pass. This module imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchsuite.measure.load import CpuMeter
from benchsuite.plan.cell import Cell, resolve
from benchsuite.programs.bars import Figure
from benchsuite.programs.bench import Bench

ENTRY = "benchsuite.programs.selfcheck.codecs:codecs"
WIRES = "benchsuite.programs.selfcheck.codecs:wires"
REPETITIONS: Mapping[str, int] = {"digits": 200, "comm": 6}  # preset of `cnn` -> repetitions


def compression(
    bench: Bench, launches: int, repetitions: Mapping[str, int] = REPETITIONS
) -> Iterator[Figure]:
    """Measures encode, wire, decode and break-even rate of every compression.

    The gradients have 101 kB and 44.7 MB.
    """
    for preset, times in repetitions.items():
        cell = resolve(Cell(workload="cnn", preset=preset))
        meter = CpuMeter()
        records = [
            bench.launch(cell.with_seed(seed), ENTRY, {"repetitions": times}).ranks[0]
            for seed in range(launches)
        ]
        sizes = {name: record["wire_bytes"] for name, record in records[0].items()}
        sizes["none"] = next(iter(records[0].values()))["dense_bytes"]
        pair = resolve(Cell(workload="cnn", preset=preset, replicas=2))
        order = {"repetitions": times, "sizes": sizes}
        moved = [bench.launch(pair.with_seed(seed), WIRES, order).ranks for seed in range(launches)]
        foreign = meter.read().foreign_share

        for name in sizes:
            if name in records[0]:
                yield from _figures(name, [record[name] for record in records], foreign)
            yield _wire(name, sizes, [[rank[name] for rank in ranks] for ranks in moved], foreign)


def _figures(
    name: str, records: list[Mapping[str, Any]], foreign: float | None
) -> Iterator[Figure]:
    """One value per launch, which is the median over its repetitions."""
    dense = records[0]["dense_bytes"]
    wire = records[0]["wire_bytes"]
    where = f"{name}, {dense / 1e6:.3g} MB"
    work = {
        side: [statistics.median(record[side]) / 1e6 for record in records]
        for side in ("encode", "decode")
    }

    for side, points in work.items():
        yield Figure(
            item="compression",
            quantity=f"{where}: {side} (2 workers)",
            unit="ms",
            points=points,
            foreign=foreign,
        )

    yield Figure(
        item="compression",
        quantity=f"{where}: faster than a dense ring below",
        unit="Mbit/s",
        better="higher",
        points=[
            break_even_mbit(dense, wire, sum(both)) for both in zip(*work.values(), strict=True)
        ],
        foreign=foreign,
        note=f"{wire:,.0f} of {dense:,.0f} bytes per worker: {100 * wire / dense:.3g} %, nominally "
        f"{100 * records[0]['nominal_ratio']:.3g} %",
    )


def _wire(
    name: str, sizes: Mapping[str, float], launches: list[list[list[int]]], foreign: float | None
) -> Figure:
    """Per launch the median over repetitions of the slower rank's time."""
    points = [statistics.median(map(max, zip(*ranks, strict=True))) / 1e6 for ranks in launches]
    return Figure(
        item="compression",
        quantity=f"{name}, {sizes['none'] / 1e6:.3g} MB: wire (loopback, both ways at once)",
        unit="ms",
        points=points,
        foreign=foreign,
        note=f"{sizes[name]:,.0f} bytes each way",
    )


def break_even_mbit(dense_bytes: float, wire_bytes: float, work_ms: float) -> float:
    """The rate of a link in Mbit/s below which the work is worth the bytes.

    It is 0 where no bytes are saved.
    """
    return max(0.0, 8 * (dense_bytes - wire_bytes) / 1e6 / (work_ms / 1e3))


CHECKS: Mapping[str, Callable[[Bench, int], Iterator[Figure]]] = {"compression": compression}
