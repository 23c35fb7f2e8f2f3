"""All numbers with n and ranges: one row per cell of the plan, also for cells without a run.

Best values, and those whose interval touches the best one's, are bold within one number of workers;
a flagged row takes no part where the wall clock decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchsuite.analysis.scaling import per_cell
from benchsuite.analysis.statistics import Summary, summarize
from benchsuite.report import text
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.printed import Column, Table, Value
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels

KIND = Kind(
    title="All numbers",
    clock="wall",
    keys={
        "columns": (
            "samples_per_s",
            "cpu_ms_per_sample",
            "final_metric",
            "samples_to_target",
            "seconds_to_target",
            "bytes_to_target",
            "bytes_per_sample",
            "bytes_per_step",
            "wire_ratio",
            "payload_minus_predicted",
            "staleness",
            "policy_lag",
            "notes",
        )
    },
    only_asked=("policy_lag",),
    place=140,
)


COLUMNS: Mapping[str, Column] = {
    column.key: column
    for column in (
        Column(
            "samples_per_s",
            "samples/s",
            "total samples over total wall time after warm-up, summed over workers",
            better="max",
            wall=True,
        ),
        Column(
            "cpu_ms_per_sample",
            "CPU ms per sample",
            "CPU time of all ranks, servers included, over samples",
            1e3,
            "min",
        ),
        Column("final_metric", "final metric", "the workload's metric at the last evaluation"),
        Column(
            "samples_to_target",
            "samples to target",
            "samples used when an evaluation first met the target",
            better="min",
        ),
        Column(
            "seconds_to_target",
            "seconds to target",
            "wall seconds since the start of the loop until then, warm-up "
            "included, evaluation excluded",
            better="min",
            wall=True,
        ),
        Column(
            "bytes_to_target",
            "bytes to target",
            "payload of all ranks until then",
            better="min",
            si=True,
        ),
        Column(
            "bytes_per_sample",
            "bytes per sample",
            "payload of all ranks over samples",
            better="min",
            si=True,
        ),
        Column(
            "bytes_per_step",
            "bytes per step",
            "payload of all ranks over steps; over updates where asynchronous",
            si=True,
        ),
        Column(
            "wire_ratio",
            "wire ratio",
            "bytes the kernel counted on the interface over payload + control bytes",
        ),
        Column(
            "payload_minus_predicted",
            "payload − predicted",
            "bytes counted over the whole run minus those predicted: 0, or a law is broken; empty "
            "where derived",
        ),
        Column(
            "staleness",
            "staleness",
            "mean over updates: version at the update minus version of the gradient",
        ),
        Column(
            "policy_lag",
            "policy lag",
            "mean over updates: version at the update minus version of the policy that acted",
        ),
        Column(
            "virtual_samples_per_s",
            "samples per virtual s",
            "samples over virtual seconds after the warm-up, summed over workers",
            better="max",
        ),
        Column(
            "waiting",
            "waiting, %",
            "share of the workers' virtual time in which they compute nothing",
            1e2,
            "min",
        ),
        Column(
            "virtual_seconds_to_target",
            "virtual s to target",
            "virtual seconds until an evaluation first met the target, warm-up included",
            better="min",
        ),
    )
}
# of virtual rows: column of the names -> heading, meaning
WORLDS = {
    "straggler": ("straggler", "who is slowed, how many times"),
    "spread": ("compute times", "how long gradients take"),
    "link": ("link", "rate and latency"),
}
_SOURCES = {
    "cpu_ms_per_sample": "cpu_s_per_sample",
    "seconds_to_target": "time_to_target_s",
    "staleness": "staleness_mean",
    "policy_lag": "policy_lag_mean",
    "bytes_per_sample": "payload_bytes_per_sample",
    "bytes_per_step": "payload_bytes_per_step",
}
_NONE = summarize([])


def tabulate(spec: FigureSpec, material: Material) -> Table:
    """One row per cell of the material's clock."""
    virtual = material.clock == "virtual"
    facts = _virtual_facts(material) if virtual else _facts(material)
    order = (
        ["spread", "link", "replicas", "straggler", "order"]
        if virtual
        else ["replicas", "straggler", "order"]
    )
    names = material.of(material.names, spec).sort_values(order, kind="stable")
    records = [
        (name, _possible(facts.get(name["cell_id"], {}), material.target(name["workload"])))
        for name in names.to_dict("records")
    ]
    shape = _shape(spec, names, virtual=virtual)
    bold = {column.key: _best(column, records) for column in shape.columns}
    rows = []
    groups = [_group(name) for name, _ in records]
    breaks = [index > 0 and groups[index] != groups[index - 1] for index in range(len(groups))]

    for name, fact in records:
        row = [*_named(name, shape), _count(name["cell_id"], material)]

        for column in shape.columns:
            summary = fact.get(column.key, _NONE)
            is_best = name["cell_id"] in bold[column.key]
            row.append(_value(column, summary, fact.get("n", 0), bold=is_best))

        if shape.with_notes:
            row.append(Value(_notes(name["cell_id"], fact, material)))
        rows.append(row)

    ids = list(names["cell_id"])
    shown = [
        fact[column.key] for _, fact in records for column in shape.columns if column.key in fact
    ]
    return Table(
        spec.name,
        _caption(material, ids, _same(names, shape, virtual=virtual), shown),
        _headings(names, shape, material),
        rows,
        breaks,
        _numbers(records, shape.columns),
        ids,
    )


@dataclass(frozen=True)
class _Shape:
    """Which columns a table has; what is equal in all of its rows has none."""

    columns: list[Column]
    worlds: list[str]  # keys of WORLDS
    with_workload: bool
    with_workers: bool
    with_notes: bool


def _shape(spec: FigureSpec, names: pd.DataFrame, *, virtual: bool) -> _Shape:
    return _Shape(
        columns=[COLUMNS[key] for key in spec.values["columns"] if key in COLUMNS],
        worlds=[key for key in WORLDS if virtual and names[key].nunique() > 1],
        with_workload=names["workload"].nunique() > 1,
        with_workers=names["replicas"].nunique() != 1,
        with_notes="notes" in spec.values["columns"],
    )


def _same(names: pd.DataFrame, shape: _Shape, *, virtual: bool) -> list[str]:
    """What is equal in all rows and said once, in the caption."""
    same = [
        f"{WORLDS[key][0]}: {names[key].iloc[0]}"
        for key in WORLDS
        if virtual and names[key].nunique() == 1 and names[key].iloc[0]
    ]
    if not shape.with_workers:
        same.append(labels.workers(int(names["replicas"].iloc[0])))
    return same


def _headings(names: pd.DataFrame, shape: _Shape, material: Material) -> list[tuple[str, str]]:
    """Heading and meaning of every column; the final metric has its own name where it has one."""
    headings = [("workload", "what is trained")] if shape.with_workload else []
    headings += [("strategy", "sync, topology"), *(WORLDS[key] for key in shape.worlds)]
    headings += [("workers", "ranks that compute gradients")] if shape.with_workers else []
    headings.append(("n", "seeds" if material.clock == "virtual" else "fresh launches"))
    metrics = {
        str(material.target(workload).get("metric", "final metric"))
        for workload in names["workload"]
    }
    final = metrics.pop() if len(metrics) == 1 else "final metric"

    for column in shape.columns:
        heading = final if column.key == "final_metric" else column.heading
        headings.append((heading, column.meaning))

    headings += [("notes", "flags, and what is missing")] if shape.with_notes else []
    return headings


def _named(name: Mapping[Any, Any], shape: _Shape) -> list[Value]:
    """The fields of a row that say which cell it is."""
    row = [Value(name["workload"])] if shape.with_workload else []
    label = labels.label(name["series"])
    if name["straggler"] and "straggler" not in shape.worlds:
        label += f" ({name['straggler']} slower)"
    if name["by_size"]:
        label += f" ({name['by_size']})"
    row += [Value(label), *(Value(name[key] or text.EMPTY) for key in shape.worlds)]
    if shape.with_workers:
        row.append(Value(str(name["replicas"]), sort=float(name["replicas"])))
    return row


def _possible(fact: dict[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with no accuracy above 100 %: an interval of logs may pass it."""
    metric: Summary = fact.get("final_metric", _NONE)
    if target.get("unit") != "%" or not metric.high > 100:
        return fact
    return fact | {"final_metric": dataclasses.replace(metric, high=100.0)}


def _caption(
    material: Material, ids: list[str], same: Sequence[str], shown: Iterable[Summary]
) -> str:
    """The caption below the table.

    `same`: what is equal in all rows, said once. `shown`: the summaries that are printed.
    """
    targets = {
        workload: material.target(workload)
        for workload in dict.fromkeys(material.names["workload"])
    }
    stated = "; ".join(
        f"target of {workload}: {t['metric']} {'≥' if t['direction'] == 'max' else '≤'} "
        f"{t['target']:g}"
        + (f" {t['unit']}" if t.get("unit") else "")
        + f", looked at every {t['evaluate_every']:,} samples"
        for workload, t in targets.items()
        if t
    )
    facts = " ".join(f"{each[:1].upper()}{each[1:]}." for each in (*same, stated))
    return (
        f"{text.spreads(shown).capitalize()}. {facts} A miss is infinite and stays in the median: "
        "> budget (k of n) means that k of n runs did not arrive. Bold: best for that number of "
        "workers, and what its range touches; oversubscribed or contended rows take no part where "
        f"the wall clock decides. {material.provenance(ids)}"
    )


def _facts(material: Material) -> dict[str, dict[str, Any]]:
    """Cell id -> column key -> `Summary`, and the flags of the cell."""
    tables = (material.scaling, material.targets, material.traffic)
    table = per_cell(material.frame, ["staleness_mean", "policy_lag_mean"]).set_index("cell_id")

    for other in tables:
        fresh = other.set_index("cell_id")
        table = table.join(fresh[[column for column in fresh if column not in table]])

    return {
        str(cell_id): {
            key: row[_SOURCES.get(key, key)] for key in COLUMNS if _SOURCES.get(key, key) in table
        }
        | {
            "oversubscribed": row["oversubscribed"],
            "num_contended": row["num_contended"],
            "n": row["n"],
        }
        | {"law": row["law"]}
        for cell_id, row in table.iterrows()
    }


def _virtual_facts(material: Material) -> dict[str, dict[str, Any]]:
    """The same for the virtual clock, whose runs never share a core."""
    table = material.virtual.set_index("cell_id")
    table = table.join(
        material.in_virtual_time.traffic.set_index("cell_id")[["payload_minus_predicted", "law"]]
    )
    return {
        str(cell_id): {key: row[key] for key in COLUMNS if key in table}
        | {"oversubscribed": False, "num_contended": 0, "n": row["n"], "law": row["law"]}
        for cell_id, row in table.iterrows()
    }


def _group(name: Mapping[Any, Any]) -> tuple[Any, ...]:
    """What rows have in common among which one can be best."""
    return tuple(name[key] for key in ("workload", "spread", "link", "replicas", "straggler"))


def _value(column: Column, summary: Summary, n: int, *, bold: bool) -> Value:
    """One field; where fewer than the row's n runs have a value, it says how many."""
    if summary.n == 0:
        return Value(text.EMPTY, sort=math.inf)
    factor, prefix = (
        text.prefix(summary.center) if column.si and math.isfinite(summary.center) else (1.0, "")
    )
    phrase, spread = text.parts(summary, scale=column.scale / factor)
    if column.si and math.isfinite(summary.center):
        phrase = f"{phrase} {prefix}B"

    if math.isinf(summary.center):
        phrase, _, spread = phrase.partition(" (")
        spread = f"({spread}"
    elif summary.n < n:
        spread = f"{spread}, n = {summary.n}".removeprefix(", ")

    return Value(phrase, spread, summary.center, bold)


def _best(column: Column, records: list[tuple[Any, dict[str, Any]]]) -> set[str]:
    """Cell ids that are printed bold: the best of each group and the ties within its interval."""
    groups: dict[tuple[Any, ...], list[tuple[str, Summary]]] = {}

    for name, fact in records:
        summary = fact.get(column.key, _NONE)
        flagged = column.wall and fact and (fact["oversubscribed"] or fact["num_contended"])

        if column.better and summary.n and not flagged and math.isfinite(summary.center):
            key = _group(name)
            groups.setdefault(key, []).append((name["cell_id"], summary))

    chosen: set[str] = set()

    for members in groups.values():
        pick: Callable[..., Any] = max if column.better == "max" else min
        best: Summary = pick(
            (summary for _, summary in members), key=lambda summary: summary.center
        )
        if best.center == 0:
            continue  # one worker without a server sends nothing: no merit
        ties = {cell_id for cell_id, s in members if s.low <= best.high and s.high >= best.low}
        if len(ties) < len(members):
            chosen |= ties

    return chosen


def _count(cell_id: str, material: Material) -> Value:
    n = sum(run.cell_id == cell_id for run in material.runs)
    return Value(str(n), sort=float(n))


def _notes(cell_id: str, fact: Mapping[str, Any], material: Material) -> str:
    notes = ["PAYLOAD DIFFERS FROM PREDICTION"] if fact.get("law") == "broken" else []
    notes += [
        f"{cell.hosts} hosts" for cell in material.cells if cell.id == cell_id and cell.hosts > 1
    ]
    if fact.get("oversubscribed"):
        notes.append("oversubscribed")
    if fact.get("num_contended"):
        notes.append(f"contended ({fact['num_contended']} of {fact['n']})")
    diverged = sum(
        run.cell_id == cell_id and run.result.get("diverged_step") is not None
        for run in material.runs
    )
    if diverged:
        notes.append(f"diverged ({diverged} of {fact['n']})")
    notes += _tuned(cell_id, material)
    absent = Counter(
        absence.status for absence in material.selection.absent if absence.cell.id == cell_id
    )
    notes += [f"{count} {status}" for status, count in sorted(absent.items())]
    return ", ".join(notes)


def _tuned(cell_id: str, material: Material) -> list[str]:
    """The chosen learning rate, `lr x0.5 of 3 tried`.

    It says so where the factor is the largest or smallest that was tried: one beyond might have
    been better still.
    """
    chosen = [
        run.result["tuning"]
        for run in material.runs
        if run.cell_id == cell_id and run.result.get("tuning")
    ]
    said = []

    for tuning in chosen:
        tried = [trial["lr_factor"] for trial in tuning["trials"]]
        edge = ": the edge of the grid" if tuning["lr_factor"] in (min(tried), max(tried)) else ""
        said.append(f"lr x{tuning['lr_factor']:g} of {len(tried)} tried{edge}")

    return list(dict.fromkeys(said))


def _numbers(records: list[tuple[Any, dict[str, Any]]], columns: list[Column]) -> pd.DataFrame:
    """The same rows as plain numbers, for CSV: centre, low, high, kind of spread, misses."""
    rows = []

    for name, fact in records:
        keys = ("cell_id", "workload", "series", "straggler", "spread", "link", "replicas")
        row: dict[str, Any] = {str(key): name[key] for key in keys} | {"n": fact.get("n", 0)}

        for column in columns:
            summary: Summary = fact.get(column.key, _NONE)
            row |= {
                f"{column.key}_{end}": getattr(summary, end) * column.scale
                for end in ("center", "low", "high")
            }
            row |= {f"{column.key}_spread": summary.kind, f"{column.key}_misses": summary.misses}

        rows.append(row)

    return pd.DataFrame(rows)
