"""Forms of parallelism at equal ranks: what a rank keeps, what is sent, bubble and speed.

One row per cell of the plan, also of those without a run and of those that a rule refuses. Bold is
the best among the forms that do what one process would do, and what cannot be told from it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from benchsuite.analysis.parallel import CODE_BYTES, GROUP, QUANTITIES, apart, is_divided, parallel
from benchsuite.analysis.statistics import Summary, summarize
from benchsuite.plan import declared, plugins
from benchsuite.plan.cell import Cell
from benchsuite.report import text
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.printed import Column, Table, Value
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels

KIND = Kind(
    title="Forms of parallelism at equal ranks: all numbers",
    clock="wall",
    place=130,
    not_where_all={"model_parallel": 1},
)

MIB = 2**20
ALONE = "one rank"
SELDOM = "agreeing less often"
COLUMNS = (
    Column(
        "held_parameters",
        "parameters per rank",
        "elements of the fullest rank's vector, its share of the model",
    ),
    Column(
        "peak_model_bytes",
        "MiB per rank",
        "highest resident set of building and training minus what was resident "
        "before, the fullest rank",
        1 / MIB,
        "min",
    ),
    Column(
        "payload_bytes_per_step", "bytes per step", "payload of all ranks", better="min", si=True
    ),
    Column("inside_bytes_per_step", "inside", "of these from part to part of a replica", si=True),
    Column(
        "between_bytes_per_step",
        "between",
        "of these from replica to replica, servers included",
        si=True,
    ),
    Column("messages_per_step", "messages per step", "of all ranks"),
    Column(
        "bubble_predicted",
        "bubble predicted, %",
        "share of the slots in which a stage idles, by formula",
        1e2,
    ),
    Column(
        "bubble_slots",
        "bubble counted, %",
        "the same, counted in the order of passes that ran",
        1e2,
    ),
    Column("balance", "balance", "work of all stages over stages x the largest one"),
    Column(
        "samples_per_s",
        "samples/s",
        "samples over wall time after the warm-up; none where ranks share cores",
        better="max",
        wall=True,
    ),
    Column(
        "cpu_s_per_sample",
        "CPU ms per sample",
        "CPU time of all ranks, servers included, over samples",
        1e3,
        "min",
    ),
)
_PIPELINE = (
    "schedule",
    "num_micro_batches",
    "num_chunks",
)  # options that the name of a pipeline has


def compared(material: Material) -> pd.DataFrame:
    """`analysis.parallel.parallel` with the cells' labels and kinds.

    Empty where the plan has no divided replica under the wall clock.
    """
    cells = [cell for cell in material.cells if cell.clock == "wall"]
    if not any(map(is_divided, cells)):
        return pd.DataFrame(columns=[*GROUP, *QUANTITIES])
    table = parallel(material.frame, material.names, cells)
    by_id = {cell.id: cell for cell in cells}
    table["label"] = [
        label(by_id[i], v) for i, v in zip(table["cell_id"], table["variant"], strict=True)
    ]
    table["kind"] = [kind(by_id[cell_id]) for cell_id in table["cell_id"]]
    cores = {int(run.cost["cores"]) for run in material.runs if run.cost.get("cores")}
    table["cores"] = (
        cores.pop() if len(cores) == 1 else 0
    )  # of the machine; 0: they differ, or nobody said
    return table


def label(cell: Cell, variant: str = "") -> str:
    """What a cell is called among those of as many ranks: `2 × pipeline 1f1b m=4, ring`."""
    options = cell.options.get(plugins.stem(cell.parallel), {})
    rest = variant.split()
    said = plugins.stem(cell.parallel)
    says = declared.where_known("parallel", cell.parallel)

    if isinstance(says, declared.Parallel) and says.stages:
        schedule = str(options.get("schedule", ""))
        chunks = int(options.get("num_chunks", 0)) or says.several_chunks.get(schedule, 1)
        said += f" {labels.short(schedule)} m={options.get('num_micro_batches')}"
        said += f" V={chunks}" if chunks > 1 else ""
        rest = [each for each in rest if each.partition("=")[0] not in _PIPELINE]

    if cell.num_workers == 1:
        said = ALONE
    elif is_divided(cell) and cell.replicas > 1:
        said = f"{cell.replicas} × {said}"

    sync = plugins.stem(cell.sync)
    parts = [said, *([] if sync == Cell.sync else [labels.label(sync)])]
    if cell.replicas > 1 and not declared.label_with_topology(sync):
        parts.append(labels.short(plugins.stem(cell.topology)))
    parts += [] if cell.compression == "none" else [labels.short(plugins.stem(cell.compression))]
    return " ".join([", ".join(parts), *rest])


def kind(cell: Cell) -> str:
    """What a figure tells apart: the form, and whether there are several replicas of it."""
    form = plugins.stem(cell.parallel)
    says = declared.where_known("sync", cell.sync)
    if not (isinstance(says, declared.Strategy) and says.every_step):
        return SELDOM
    return f"{cell.replicas} × {form}" if is_divided(cell) and cell.replicas > 1 else form


def tabulate(spec: FigureSpec, material: Material) -> Table:
    """One row per cell, and one per cell that a rule refuses."""
    everything = compared(material)
    table = material.of(everything, spec) if len(everything) else everything
    refused = [
        each for each in material.refused if spec.wants(each.cell) and each.cell.clock == "wall"
    ]
    rows: list[tuple[tuple[str, int], int, list[Value]]] = []
    bold = {column.key: best(table, column) for column in COLUMNS}
    order = {workload: place for place, workload in enumerate(dict.fromkeys(table["workload"]))}

    for place, row in enumerate(table.to_dict("records")):
        values = [_value(column, row, bold[column.key]) for column in COLUMNS]
        values.append(Value(_notes(row, material)))
        rows.append(
            ((row["workload"], row["ranks"]), place, [Value(row["label"]), *_place(row), *values])
        )

    for each in refused:
        name = _workload(each.cell)
        order.setdefault(name, len(order))
        row = {"workload": name, "ranks": each.cell.num_workers, "n": 0}
        empty = [Value(text.EMPTY, sort=math.inf)] * len(COLUMNS)
        note = Value(f"unsupported: {each.problems[0].rule}")
        rows.append(
            (
                (name, row["ranks"]),
                len(table),
                [Value(label(each.cell)), *_place(row), *empty, note],
            )
        )

    rows.sort(key=lambda entry: (order[entry[0][0]], entry[0][1], entry[1]))
    groups = [group for group, _, _ in rows]
    breaks = [place > 0 and groups[place] != groups[place - 1] for place in range(len(groups))]
    headings = [
        ("parallelism", "form, options, sync and topology between replicas"),
        ("workload", "what is trained"),
        ("ranks", "ranks that compute gradients: replicas x parts"),
        ("n", "fresh launches"),
    ]
    headings += [(column.heading, column.meaning) for column in COLUMNS]
    headings.append(("notes", "flags, servers, and what is missing"))
    printed = [values for _, _, values in rows]
    same = []

    if len(order) == 1:  # said once
        headings.pop(1)
        printed = [[values[0], *values[2:]] for values in printed]
        same = list(order)

    ids = [str(cell_id) for cell_id in table["cell_id"]]
    caption = _caption(table, same, material, ids)
    return Table(spec.name, caption, headings, printed, breaks, _numbers(table), ids)


def best(table: pd.DataFrame, column: Column) -> set[str]:
    """The cell ids that are printed bold in a column.

    They are the best of every group and what cannot be told from it.
    """
    chosen: set[str] = set()
    if not column.better or table.empty:
        return chosen

    for _, group in table.groupby(list(GROUP), sort=False):
        members = {
            row["cell_id"]: row[column.key]
            for row in group.to_dict("records")
            if row[column.key].n
            and row["every_step"]
            and not (column.wall and (row["oversubscribed"] or row["contended"]))
        }
        ties = tied(members, column.key, least=column.better == "min")
        chosen |= set(ties) if len(ties) < len(members) else set()

    return chosen


def tied(members: Mapping[str, Summary], quantity: str, *, least: bool = True) -> list[str]:
    """The best one first, then all that cannot be told from it.

    Ranges that touch cannot be told apart, nor can memory that may be code.
    """
    ordered = sorted(
        members, key=lambda each: members[each].center if least else -members[each].center
    )
    margin = CODE_BYTES if quantity == "peak_model_bytes" else 0.0
    return [
        each for each in ordered if not apart(members[ordered[0]], members[each], margin=margin)
    ]


def mib(summary: Summary) -> tuple[str, str]:
    """Centre and range in whole MiB, since finer differences are not the form's.

    The range is empty where both its ends are printed alike.
    """
    width = 10.0 if summary.center >= 10 * MIB else 1.0
    center, low, high = (
        text.number(value / MIB, width=max(width, (summary.high - summary.low) / MIB))
        for value in (summary.center, summary.low, summary.high)
    )
    return center, f"{low}–{high}" if low != high else ""


def _place(row: Mapping[Any, Any]) -> list[Value]:
    """The fields workload, ranks and n of a row."""
    counts = [Value(str(row[key]), sort=float(row[key])) for key in ("ranks", "n")]
    return [Value(str(row["workload"])), *counts]


def _value(column: Column, row: Mapping[Any, Any], bold: set[str]) -> Value:
    summary: Summary = row[column.key]
    if summary.n == 0:
        return Value(text.EMPTY, sort=math.inf)

    if column.wall and row["oversubscribed"]:
        return Value(
            text.EMPTY, f"({row['world_size']} ranks, {row['cores'] or 'fewer'} cores)", math.inf
        )

    if column.key == "held_parameters":
        share = summary.center / row["num_parameters"].center
        part = f"({100 * share:.0f} %)" if share < 0.995 else ""
        return Value(text.si(summary.center, "").strip(), part, summary.center)

    factor, prefix = text.prefix(summary.center) if column.si else (1.0, "")
    phrase, spread = text.parts(summary, scale=column.scale / factor)
    if column.key == "peak_model_bytes":
        phrase, spread = mib(summary)
    phrase += f" {prefix}B" if column.si else ""
    if summary.n < row["n"]:
        spread = f"{spread}, n = {summary.n}".removeprefix(", ")
    return Value(phrase, spread, summary.center, row["cell_id"] in bold)


def _notes(row: Mapping[Any, Any], material: Material) -> str:
    runs = [run for run in material.runs if run.cell_id == row["cell_id"]]
    notes = ["PAYLOAD DIFFERS FROM PREDICTION"] if row["cell_id"] in _broken(material) else []
    servers = int(row["servers"])
    notes += [f"and {text.count_of(servers, 'server')}"] if servers else []
    if row["num_contended"]:
        notes.append(f"contended ({row['num_contended']} of {row['n']})")
    notes += sorted(
        {str(run.result["payload_reason"]) for run in runs if run.result.get("payload_reason")}
    )
    diverged = sum(run.result.get("diverged_step") is not None for run in runs)
    notes += [f"diverged ({diverged} of {row['n']})"] if diverged else []
    absent = Counter(
        each.status for each in material.selection.absent if each.cell.id == row["cell_id"]
    )
    notes += [f"{count} {status}" for status, count in sorted(absent.items())]
    return ", ".join(notes)


def _broken(material: Material) -> set[str]:
    return (
        set(material.traffic.loc[material.traffic["law"] == "broken", "cell_id"])
        if material.runs
        else set()
    )


def _workload(cell: Cell) -> str:
    return (
        f"{plugins.stem(cell.workload)}/{cell.preset}"
        if cell.preset
        else plugins.stem(cell.workload)
    )


def _caption(
    table: pd.DataFrame, same: Sequence[str], material: Material, ids: Sequence[str]
) -> str:
    shown = [row[column.key] for row in table.to_dict("records") for column in COLUMNS] or [
        summarize([])
    ]
    what = f" {same[0]}." if same else ""
    return (
        f"{text.spreads(shown).capitalize()}.{what} Memory and parameters: the fullest rank. MiB "
        f"are 1,048,576 bytes; differences below {CODE_BYTES // MIB} MiB may be code that one "
        "library class touches and another does not. Bold: best among forms on as many ranks that "
        "do what one process would do, and what cannot be told from it; a server is one rank more. "
        f"{material.provenance(ids)}"
    )


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The same rows as plain numbers, for CSV."""
    rows = []

    for record in table.to_dict("records"):
        keys = (
            "cell_id",
            "workload",
            "ranks",
            "label",
            "form",
            "replicas",
            "parts",
            "servers",
            "n",
            "oversubscribed",
        )
        row: dict[str, Any] = {key: record[key] for key in keys}

        for quantity in QUANTITIES:
            summary: Summary = record[quantity]
            row |= {f"{quantity}_{end}": getattr(summary, end) for end in ("center", "low", "high")}

        rows.append(row)

    return pd.DataFrame(rows)
