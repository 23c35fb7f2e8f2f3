"""Names for cells: which series of a figure a cell belongs to, told apart only by what differs in this plan."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from benchsuite import plugins
from benchsuite.cell import Cell, identity

# Not part of a strategy's name: the x axis, what is trained, and what `straggler` says in its own column.
_APART = frozenset({"workload", "preset", "replicas", "straggler", "parallel", "sync", "topology", "compression"})


def describe(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row per cell, in the plan's order.

    Columns: cell_id, order, workload (`cnn/digits`), strategy (`synchronous/ring`), variant (options in which cells of
    one strategy differ, else empty), series (strategy and variant), replicas, servers, world_size, straggler
    (`worker 0: 4x`, else empty), clock, budget_samples.
    """
    variants = _variants(cells)
    rows = []
    for order, cell in enumerate(cells):
        workload = plugins.stem(cell.workload)
        strategy = strategy_of(cell)
        variant = variants.get(cell.id, "")
        rows.append(
            {
                "cell_id": cell.id,
                "order": order,
                "workload": f"{workload}/{cell.preset}" if cell.preset else workload,
                "strategy": strategy,
                "variant": variant,
                "series": f"{strategy} {variant}".strip(),
                "replicas": cell.replicas,
                "servers": cell.num_servers,
                "world_size": cell.world_size,
                "straggler": straggler_text(cell.straggler),
                "clock": cell.clock,
                "budget_samples": cell.budget.samples,
            }
        )
    return pd.DataFrame(rows).drop_duplicates("cell_id", ignore_index=True)


def strategy_of(cell: Cell) -> str:
    """`sync/topology`, with parallel form and compression where they are not the plain ones."""
    parts = [plugins.stem(cell.sync), plugins.stem(cell.topology)]
    if cell.parallel != "data":
        parts.insert(0, f"{plugins.stem(cell.parallel)}({cell.model_parallel})")
    if cell.compression != "none":
        parts.append(plugins.stem(cell.compression))
    return "/".join(parts)


def straggler_text(straggler: Mapping[str, float]) -> str:
    """`worker 0: 4x`; empty where nobody is slowed."""
    return ", ".join(f"worker {worker}: {factor:g}x" for worker, factor in sorted(straggler.items()))


def _variants(cells: Sequence[Cell]) -> dict[str, str]:
    """Cell id -> the fields in which cells of the same strategy, size and workload differ, as `key=value`."""
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.workload, cell.preset, strategy_of(cell)].append(cell)
    names = {}
    for group in groups.values():
        flat = {cell.id: _flat(identity(cell)) for cell in group}
        keys = sorted({key for fields in flat.values() for key in fields})
        differing = [key for key in keys if len({fields.get(key) for fields in flat.values()}) > 1]
        for cell_id, fields in flat.items():
            names[cell_id] = " ".join(f"{key.rpartition('.')[2]}={fields.get(key, '-')}" for key in differing)
    return names


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    fields: dict[str, str] = {}
    for key, value in document.items():
        if not prefix and key in _APART:
            continue
        if isinstance(value, Mapping):
            fields |= _flat(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return fields
