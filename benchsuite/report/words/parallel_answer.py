"""The answer of a plan with divided replicas: who keeps least, who sends least, at equal ranks.

Replicas of several ranks are no workers: such a plan is compared by ranks, never by the number of
its replicas. Of each form its best variant speaks (the schedule, micro-batches or topology of the
smallest number).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from benchsuite.analysis.parallel import is_divided, loss_gaps
from benchsuite.analysis.statistics import Summary
from benchsuite.report import text
from benchsuite.report.material import Material
from benchsuite.report.tables.parallel_table import compared, mib, tied
from benchsuite.report.words.sentences import (
    Ends,
    Sentence,
    few,
    listed,
    number_of_launches,
    versus,
)

MEMORY = "peak_model_bytes"
BYTES = "payload_bytes_per_step"
CLOSE = "too close to tell"
Row = Mapping[Any, Any]
Groups = Mapping[tuple[str, int], pd.DataFrame]


def applies(material: Material) -> bool:
    """Whether the plan has a divided replica under the wall clock."""
    return any(cell.clock == "wall" and is_divided(cell) for cell in material.cells)


def answer(material: Material) -> list[Sentence]:
    """The sentences, with what the bubble costs; none where nothing ran."""
    if not material.runs:
        return []
    table = compared(material)
    groups = _groups(table)
    said = [_short(groups)] if groups else []
    said += [
        _one(workload, table, groups)
        for workload in dict.fromkeys(workload for workload, _ in groups)
    ]
    return [
        *said,
        *_bubble(table),
        *_between(table),
        *_speed(table),
        *_cpu(table),
        *_same_training(table, material),
        *_payload(material),
    ]


def _groups(table: pd.DataFrame) -> dict[tuple[str, int], pd.DataFrame]:
    """(workload, ranks) -> the forms that ran and do what one process would do.

    Only groups with at least two forms.
    """
    ran = table[(table["n"] > 0) & table["every_step"] & (table["ranks"] > 1)]
    groups = {}

    for workload in dict.fromkeys(ran["workload"]):
        mine = ran[ran["workload"] == workload]
        for ranks in sorted(set(mine["ranks"])):
            part = mine[mine["ranks"] == ranks]
            if part["kind"].nunique() > 1:
                groups[str(workload), int(ranks)] = part

    return groups


def _short(groups: Groups) -> Sentence:
    """Which form keeps least and which sends least, workload by workload."""
    said = []

    for quantity, phrase in ((MEMORY, "Least memory per rank"), (BYTES, "Fewest bytes per step")):
        leaders: dict[str, list[tuple[str, int]]] = {}

        for key, part in groups.items():
            ties = [row for row, close in _ranked(part, quantity) if close]
            forms = sorted({str(row["form"]) for row in ties})
            if forms:
                leaders.setdefault(forms[0] if len(forms) == 1 else CLOSE, []).append(key)

        places = [
            f"{who} ({_where(keys, groups)})" if len(leaders) > 1 else who
            for who, keys in leaders.items()
        ]
        said += [f"{phrase}: {'; '.join(places)}."] if places else []

    return Sentence("Answer", f"At equal ranks, numbers below (≈: {CLOSE}). {' '.join(said)}")


def _where(keys: Sequence[tuple[str, int]], groups: Groups) -> str:
    """Where a comparison holds: `cnn/comm on 2 ranks`, with ranks where they differ."""
    said = []

    for workload in dict.fromkeys(workload for workload, _ in keys):
        mine = [ranks for name, ranks in keys if name == workload]
        every = [ranks for name, ranks in groups if name == workload]
        said.append(
            workload if mine == every else f"{workload} on {' and '.join(map(str, mine))} ranks"
        )

    return ", ".join(said)


def _ranked(part: pd.DataFrame, quantity: str) -> list[tuple[Row, bool]]:
    """The best row of every kind, best kind first.

    Each with whether it cannot be told from the first.
    """
    rows = {row["cell_id"]: row for row in part.to_dict("records") if row[quantity].n}
    if not rows:
        return []
    ties = set(tied({key: row[quantity] for key, row in rows.items()}, quantity))
    found: dict[str, tuple[Row, bool]] = {}
    for key, row in sorted(rows.items(), key=lambda pair: float(pair[1][quantity].center)):
        found.setdefault(row["kind"], (row, key in ties))
    return list(found.values())


def _one(workload: str, table: pd.DataFrame, groups: Groups) -> Sentence:
    """The sentence of a workload: one rank alone, then the forms on each number of ranks."""
    mine = table[table["workload"] == workload]
    said = [
        f"{text.si(row['num_parameters'].center, '').strip()} parameters; one rank alone takes "
        f"{_mib(row[MEMORY])} MiB"
        for row in mine[(mine["ranks"] == 1) & (mine["n"] > 0)].to_dict("records")
        if row[MEMORY].n
    ]

    for (name, ranks), part in groups.items():
        if name == workload:
            lost = list(mine.loc[(mine["ranks"] == ranks) & (mine["n"] == 0), "label"])
            missing = [f"without an ok run: {few(lost)}"] if lost else []
            memory = _list(part, MEMORY, _mib)
            sent = _list(part, BYTES, text.si_quantity)
            parts = [f"{ranks} ranks, MiB per rank: {memory}", f"bytes per step: {sent}", *missing]
            said.append("; ".join(parts))

    return Sentence(workload, f"{'. '.join(said)} ({number_of_launches(mine[mine['n'] > 0])}).")


def _list(part: pd.DataFrame, quantity: str, shown: Callable[[Summary], str]) -> str:
    """Kinds with their values, least first: `data 33.4 ≈ pipeline 33.8, fsdp 37.6`.

    ≈ stands before what cannot be told from the first.
    """
    ranked = _ranked(part, quantity)
    if not ranked:
        return "not known"
    said = ""

    for row, close in ranked:
        said += (" ≈ " if close else ", ") if said else ""
        said += f"{row['kind']} {shown(row[quantity])}"

    return said


def _mib(summary: Summary) -> str:
    """The centre in MiB, with its range where that is more than a rounding."""
    center, spread = mib(summary)
    return f"{center} [{spread}]" if spread else center


def _bubble(table: pd.DataFrame) -> list[Sentence]:
    """The share of slots in which a stage idles, by schedule, and what uneven cuts add."""
    rows = [
        row for row in table.to_dict("records") if row["bubble_slots"].n and row["replicas"] == 1
    ]
    if not rows:
        return []
    alike = sum(row["bubble_slots"].center == row["bubble_predicted"].center for row in rows)
    said = []

    for ranks in sorted({row["ranks"] for row in rows}):
        counted: dict[str, set[str]] = {}

        for row in rows:
            if row["ranks"] == ranks:
                counted.setdefault(row["label"], set()).add(
                    text.percent(row["bubble_slots"].center, digits=3)
                )

        told = [
            f"{name.removeprefix('pipeline ')} {' or '.join(sorted(each))}"
            for name, each in counted.items()
        ]
        said.append(f"{ranks} stages: {', '.join(told)}")

    formula = f"as the formula says in {alike} of {text.count_of(len(rows), 'cell')}"
    phrase = (
        f"Slots in which a stage idles, counted in the order of passes, {formula}. "
        f"{'. '.join(said)}."
    )
    return [Sentence("Bubble", f"{phrase} {_used(rows)}")]


def _used(rows: Sequence[Row]) -> str:
    """Bubble and uneven stages together, by the best schedule of each workload."""
    found: dict[str, dict[int, tuple[float, float]]] = {}

    for row in rows:
        share = (1 - row["bubble_slots"].center) * row["balance"].center
        mine = found.setdefault(str(row["workload"]), {})
        mine[row["ranks"]] = max(mine.get(row["ranks"], (0.0, 0.0)), (share, row["balance"].center))

    told = [
        f"{workload} "
        + ", ".join(
            f"{text.percent(s, digits=3)} on {ranks} ({b:.2f})"
            for ranks, (s, b) in sorted(mine.items())
        )
        for workload, mine in found.items()
    ]
    return (
        "So at most this share of the stages' time is work, with the balance of the cuts: "
        f"{'; '.join(told)}."
    )


def _between(table: pd.DataFrame) -> list[Sentence]:
    """Bytes between replicas of several ranks: agreeing less often beside every step."""
    products = table[(table["n"] > 0) & (table["replicas"] > 1) & (table["parts"] > 1)]
    said = []

    for workload, part in products.groupby("workload", sort=False):
        rows = [row for row in part.to_dict("records") if row["between_bytes_per_step"].n]
        amounts: dict[str, list[str]] = {}

        for row in (row for row in rows if not row["every_step"]):
            same = [
                each["between_bytes_per_step"]
                for each in rows
                if each["every_step"] and each["form"] == row["form"] and _way(each) == _way(row)
            ]
            if same:
                seldom = text.si_quantity(row["between_bytes_per_step"])
                amounts.setdefault(f"{seldom} for {text.si_quantity(same[0])}", []).append(
                    row["label"]
                )

        said += [f"{workload} {amount} ({listed(who)})" for amount, who in amounts.items()]

    phrase = "Per step, agreeing less often sends for agreeing in every step"
    return [Sentence("Between replicas", f"{phrase}: {'; '.join(said)}.")] if said else []


def _way(row: Row) -> str:
    """The topology in a strategy's name."""
    return str(row["strategy"]).rpartition("/")[2]


def _speed(table: pd.DataFrame) -> list[Sentence]:
    """Throughput, where every rank has a core of its own."""
    clean = table[
        (table["n"] > 0) & ~(table["oversubscribed"] | table["contended"]) & table["every_step"]
    ]
    said = _versus(clean, Ends("samples_per_s", "max", "fastest", "slowest", " samples/s"))

    if not said:
        phrase = (
            "No two forms had a core for every rank, and that core to itself: wall-clock times "
            "are not compared."
        )
        return [Sentence("Throughput", phrase)]

    return [Sentence("Throughput", f"With a core for every rank: {'; '.join(said)}.")]


def _cpu(table: pd.DataFrame) -> list[Sentence]:
    """CPU time on the fewest ranks: where many share a core, most of it is waiting."""
    ran = table[(table["n"] > 0) & table["every_step"] & (table["ranks"] > 1)]
    ran = ran[ran["ranks"] == ran["ranks"].min()]
    said = _versus(ran, Ends("cpu_s_per_sample", "min", "cheapest", "dearest", " ms", 1e3))
    return [Sentence("CPU per sample", f"All ranks together: {'; '.join(said)}.")] if said else []


def _versus(table: pd.DataFrame, ends: Ends) -> list[str]:
    """Best and worst of every workload on every number of ranks from 2 on."""
    said = []

    for (workload, ranks), part in table.groupby(["workload", "ranks"], sort=False):
        known = part[part[ends.column].map(lambda s: s.n) > 0].assign(series=part["label"])
        if len(known) > 1 and int(str(ranks)) > 1:
            said.append(
                f"{workload} on {ranks} ranks: {versus(known, ends, str)} "
                f"({number_of_launches(known)})"
            )

    return said


def _same_training(table: pd.DataFrame, material: Material) -> list[Sentence]:
    """Losses of all forms that do what one process would do, seed by seed."""
    said = []

    for workload, part in table[table["every_step"] & (table["n"] > 0)].groupby(
        "workload", sort=False
    ):
        first, later = loss_gaps(
            [run for run in material.runs if run.cell_id in set(part["cell_id"])]
        )
        if len(part) > 1 and not math.isnan(first):
            said.append(f"{workload} {first:.1g}, later {later:.1g}")

    if not said:
        return []
    why = (
        " Later sums in another order may switch a ReLU or a maximum in single precision; in "
        "double precision all are"
    )
    phrase = (
        "Losses of all forms, seed by seed, are at most so far apart in the first step: "
        f"{'; '.join(said)}."
    )
    return [
        Sentence("Same training", phrase + (f"{why} equal by law." if _single(material) else ""))
    ]


def _single(material: Material) -> bool:
    return any(run.cell.precision != "fp64" for run in material.runs)


def _payload(material: Material) -> list[Sentence]:
    """Where our own sends were counted, and where the library's calls were."""
    traffic = material.traffic
    counted = int(traffic.loc[traffic["law"] == "holds", "num_counted"].sum())
    if (traffic["law"] == "broken").any() or not counted:
        return []
    derived = int(traffic.loc[traffic["payload_source"] == "derived", "n"].sum())
    rest = (
        f"; in {derived} it is what the library called in a step of its own, times the steps"
        if derived
        else ""
    )
    phrase = (
        f"In {text.count_of(counted, 'counted run')} payload equals its prediction exactly{rest}."
    )
    return [Sentence("Bytes", phrase)]
