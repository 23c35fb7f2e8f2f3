"""Names for cells: which series of a figure a cell belongs to.

Cells are told apart only by what differs in their plan.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from benchsuite.plan import compute_time, declared, plugins
from benchsuite.plan.cell import AXES, Cell, identity

# Not part of a strategy's name: the x axis, what is trained, the world it ran in, and what has a
# column of its own.
_APART = frozenset(
    {
        "workload",
        "preset",
        "replicas",
        "straggler",
        "parallel",
        "sync",
        "topology",
        "compression",
        "clock",
        "compute_time",
        "receive_cost",
        "link_mbit",
        "link_latency_us",
        "gradients",
        "tuning",
    }
)


def describe(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row per cell, in the plan's order.

    Columns: cell_id, order, workload (`cnn/digits`), strategy (`synchronous/ring`), variant
    (options in which cells of one strategy differ, else empty; `tuned` where the plan has tuned
    cells and others), series (strategy and variant), tuning, replicas, servers, world_size,
    straggler (`worker 0: 4x`, else empty), clock, budget_samples; of the virtual clock also link
    (`1 Gbit/s, 50 us`), spread (`gamma, cv 0.1`) and gradients (`computed`, `none`). An option that
    differs from one number of workers to the next only (K of N) is no variant: it stands in
    by_size.
    """
    variants = _variants(cells, within_size=True)
    by_size = _variants(cells, within_size=False)
    both = len({cell.tuning for cell in cells}) > 1
    rows = []

    for order, cell in enumerate(cells):
        for axis in AXES:  # the labels of a user's files are found by what a cell says
            declared.seen(axis, getattr(cell, axis))
        workload = plugins.stem(cell.workload)
        strategy = strategy_of(cell)
        options = variants.get(cell.id, "")
        variant = f"{options} tuned".strip() if both and cell.tuning == "per_strategy" else options
        rows.append(
            {
                "cell_id": cell.id,
                "order": order,
                "workload": f"{workload}/{cell.preset}" if cell.preset else workload,
                "strategy": strategy,
                "variant": variant,
                "series": f"{strategy} {variant}".strip(),
                "tuning": cell.tuning,
                "replicas": cell.replicas,
                "servers": cell.num_servers,
                "world_size": cell.world_size,
                "straggler": straggler_text(cell.straggler),
                "clock": cell.clock,
                "budget_samples": cell.budget.samples,
                "link": link_text(cell),
                "spread": spread_text(cell.compute_time),
                "gradients": cell.gradients,
                "by_size": "" if options else by_size.get(cell.id, ""),
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
    """Who is slowed, `worker 0: 4x`; empty where nobody is."""
    return ", ".join(
        f"worker {worker}: {factor:g}x" for worker, factor in sorted(straggler.items())
    )


def link_text(cell: Cell) -> str:
    """The links, `100 Mbit/s, 50 us`; `free` where messages take no time.

    Empty under the wall clock.
    """
    if cell.clock != "virtual":
        return ""
    rate = cell.link_mbit
    parts = (
        [] if rate is None else [f"{rate / 1000:g} Gbit/s" if rate >= 1000 else f"{rate:g} Mbit/s"]
    )
    parts += [f"{cell.link_latency_us:g} us"] if cell.link_latency_us else []
    return ", ".join(parts) or "free"


def spread_text(table: Mapping[str, Any] | None) -> str:
    """The distribution of compute times: `gamma, cv 0.1`, `spells 8x slow (9%)` for markov.

    Empty under the wall clock, where ranks take the time that they take.
    """
    if table is None:
        return ""

    if table["kind"] == "markov":
        slow = table["enter"] / (table["enter"] + table["leave"])
        return f"spells {table['slow_factor']:g}x slow ({slow:.0%})"

    own = [key for key in compute_time.KINDS.get(str(table["kind"]), {}) if key in table]
    said = [f"{key.replace('_', ' ')} {table[key]:g}" for key in own]
    return ", ".join([str(table["kind"]).replace("_", " "), *said])


def _variants(cells: Sequence[Cell], *, within_size: bool) -> dict[str, str]:
    """Cell id -> the fields in which cells of one strategy, workload and clock differ.

    Written as `key=value`. `within_size`: compared among cells with the same number of workers;
    else among all.
    """
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)

    for cell in cells:
        groups[cell.workload, cell.preset, cell.clock, cell.gradients, strategy_of(cell)].append(
            cell
        )

    names = {}

    for group in groups.values():
        flat = {
            cell.id: _flat({**identity(cell), "lr_factor": cell.to_json()["lr_factor"]})
            for cell in group
        }
        sizes: dict[int, list[str]] = defaultdict(list)
        for cell in group:
            sizes[cell.replicas if within_size else 0].append(cell.id)
        keys = sorted({key for fields in flat.values() for key in fields})
        if not within_size:  # that more workers use more samples says nothing
            keys = [key for key in keys if not key.startswith("budget.")]
        differing = [
            key
            for key in keys
            if any(len({flat[cell_id].get(key) for cell_id in size}) > 1 for size in sizes.values())
        ]

        for cell_id, fields in flat.items():
            names[cell_id] = " ".join(
                f"{key.rpartition('.')[2]}={fields.get(key, '-')}" for key in differing
            )

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
