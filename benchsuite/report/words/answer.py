"""The short answer on top of the page: sentences made from the data, each with its n and its range.

A sentence compares two strategies only where their ranges do not touch, and wall-clock values only
where no point is oversubscribed or contended. Where the data say nothing, there is no sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from benchsuite.analysis import convergence
from benchsuite.analysis.statistics import Summary, ratio
from benchsuite.report import text
from benchsuite.report.material import Material
from benchsuite.report.tables import seeds
from benchsuite.report.words import (
    labels,
    parallel_answer,
    straggler_answer,
    virtual_answer,
)
from benchsuite.report.words.sentences import (
    MANY,
    Ends,
    Sentence,
    goal,
    largest,
    listed,
    names,
    number_of_launches,
    versus,
)


def answer(material: Material) -> list[Sentence]:
    """What the runs say, in the order in which a reader asks; empty without runs.

    A law that is broken comes before all.
    """
    makers: list[Callable[[Material], list[Sentence]]] = [
        seeds.answer,
        _speed,
        _arrival,
        _same_training,
        _bytes,
        _cpu,
        _straggler,
    ]
    if parallel_answer.applies(material):
        makers = [parallel_answer.answer]
    measured = [sentence for make in makers for sentence in make(material)] if material.runs else []
    return [
        *_broken(material),
        *straggler_answer.answer(material),
        *measured,
        *virtual_answer.answer(material),
    ]


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["straggler"] == "") & (table["tuning"] == "same")]


def _broken(material: Material) -> list[Sentence]:
    """Payload that differs from its prediction: then no byte on the page may be believed."""
    said = []

    for world in (material, material.in_virtual_time):
        table = world.traffic if world.runs else world.names.assign(law="")
        called = {cell.id: cell.label for cell in material.cells}
        said += [called[cell_id] for cell_id in table.loc[table["law"] == "broken", "cell_id"]]

    if not said:
        return []
    return [
        Sentence("BROKEN LAW", f"Counted payload DIFFERS from its prediction: {'; '.join(said)}.")
    ]


def _speed(material: Material) -> list[Sentence]:
    """Throughput, where every rank has a core of its own."""
    table = _plain(material.scaling)
    if table["series"].nunique() < 2 and (table["replicas"] == 1).all():
        return []  # one process each: nothing is compared
    clean = table[
        ~(table["oversubscribed"] | table["contended"])
        & (table["samples_per_s"].map(lambda s: s.n) > 0)
    ]
    rows = largest(clean)

    if rows.empty:
        return [
            Sentence(
                "Throughput",
                "No two strategies had a core for every rank to themselves: wall-clock times are "
                "not compared.",
            )
        ]

    ends = Ends("samples_per_s", "max", "fastest", "slowest", " samples/s")
    count = int(rows["replicas"].iloc[0])
    crowded = table.loc[table["oversubscribed"] & (table["replicas"] > count), "replicas"]
    limit = (
        f" With {labels.workers(int(crowded.min()))} ranks share cores, and their times are not "
        "compared."
        if len(crowded)
        else ""
    )
    phrase = (
        f"With {labels.workers(count)} and a core for every rank: "
        f"{versus(rows, ends, names(material))}"
    )
    efficiency = _efficiency(rows, names(material))
    return [Sentence("Throughput", f"{phrase} ({number_of_launches(rows)}).{efficiency}{limit}")]


def _efficiency(rows: pd.DataFrame, name: Callable[[str], str]) -> str:
    """Throughput over N times that of 1 worker; only rows without a flag carry one."""
    known = [
        (name(str(s)), e) for s, e in zip(rows["series"], rows["efficiency"], strict=True) if e.n
    ]
    if not known or int(rows["replicas"].iloc[0]) < 2:
        return ""
    said = ", ".join(f"{who} {text.quantity(efficiency)}" for who, efficiency in known)
    return f" Efficiency against 1 worker: {said}."


def _arrival(material: Material) -> list[Sentence]:
    """Samples to target at the largest number of workers."""
    table = _plain(material.targets)
    rows = largest(table[table["samples_to_target"].map(lambda s: s.n) > 0])
    if rows.empty:
        return []
    name = names(material)
    aim = goal(material.target(str(rows["workload"].iloc[0])))
    missed = rows["samples_to_target"].map(lambda s: math.isinf(s.center))
    arrived = rows[~missed]
    ends = Ends("samples_to_target", "min", "needed least", "needed most", " samples")
    said = []

    if len(arrived) > 1:
        said.append(
            f"With {labels.workers(int(rows['replicas'].iloc[0]))}, to {aim}: "
            f"{versus(arrived, ends, name)}"
        )
    elif len(arrived) == 1:
        only = arrived.iloc[0]
        said.append(
            f"Only {name(only['series'])} reached {aim}, after "
            f"{text.quantity(only['samples_to_target'])} samples"
        )

    late = [
        (name(row["series"]), row["samples_to_target"]) for row in rows[missed].to_dict("records")
    ]

    if len(late) > MANY:
        said.append(
            f"missed {aim} in half of their runs or more: {listed([who for who, _ in late])}"
        )
    else:
        said += [f"{who} missed {aim}: {text.quantity(summary)}" for who, summary in late]

    return [Sentence("Convergence", f"{'; '.join(said)} ({number_of_launches(rows)}).")]


def _same_training(material: Material) -> list[Sentence]:
    """Whether the synchronous forms trained alike, seed by seed."""
    rows = _plain(material.names)
    whole = rows["strategy"].str.fullmatch("synchronous/[^/]+")  # compressed ones train otherwise
    rows = rows[whole & (rows["replicas"] > 1)]
    said = []

    for count, group in rows.groupby("replicas"):
        gap = convergence.largest_gap(material.curves, list(group["cell_id"]))
        if not math.isnan(gap):
            alike = "equal in every digit" if gap == 0 else f"at most {gap:.2g} apart"
            said.append(f"{alike} with {labels.workers(int(str(count)))}")

    if not said:
        return []
    return [
        Sentence(
            "Same training",
            f"Losses of the synchronous topologies, seed by seed: {'; '.join(said)}.",
        )
    ]


def _bytes(material: Material) -> list[Sentence]:
    """Payload per sample, which is exact, and the bytes on the wire beside it."""
    table = _plain(material.traffic)
    rows = largest(table[table["payload_bytes_per_sample"].map(lambda s: s.n) > 0])
    if rows.empty:
        return []
    name = names(material)
    amount = rows["payload_bytes_per_sample"].map(lambda s: s.center)
    least, most = (
        listed([name(s) for s in rows.loc[amount == end, "series"]])
        for end in (amount.min(), amount.max())
    )
    phrase = (
        f"With {labels.workers(int(rows['replicas'].iloc[0]))}, per sample: "
        f"{text.si(amount.min())} ({least})"
    )
    if amount.max() > amount.min():
        phrase += f", up to {text.si(amount.max())} ({most})"
    counted = material.traffic[material.traffic["law"] != ""]
    broken = [name(s) for s in dict.fromkeys(counted.loc[counted["law"] == "broken", "series"])]
    law = (
        f"payload DIFFERS from its prediction for {listed(broken)}"
        if broken
        else "payload equals its prediction exactly"
    )
    runs = (
        f"in {text.count_of(int(counted['num_counted'].sum()), 'counted run')} {law}"
        if len(counted)
        else ""
    )
    ratios = [value for summary in table["wire_ratio"] for value in summary.points]
    wire = (
        f"on the wire, headers included, {min(ratios):.2f} to {max(ratios):.2f} times the payload"
        if ratios
        else ""
    )
    return [Sentence("Bytes", "; ".join(part for part in (phrase, runs, wire) if part) + ".")]


def _cpu(material: Material) -> list[Sentence]:
    """CPU time per sample, which may be compared where ranks share cores too."""
    table = _plain(material.scaling)
    rows = largest(table[table["cpu_s_per_sample"].map(lambda s: s.n) > 0])
    if rows.empty:
        return []
    ends = Ends("cpu_s_per_sample", "min", "cheapest", "dearest", " ms", 1e3)
    phrase = (
        f"With {labels.workers(int(rows['replicas'].iloc[0]))}: "
        f"{versus(rows, ends, names(material))}"
    )
    return [Sentence("CPU per sample", f"{phrase} ({number_of_launches(rows)}).")]


def _straggler(material: Material) -> list[Sentence]:
    """Asynchronous against synchronous training with one worker slowed.

    The share of time in which the other workers are blocked explains the difference.
    """
    table = material.scaling[material.scaling["straggler"] != ""]
    name = names(material)
    sentences = []

    for (replicas, slowed, _), group in table.groupby(
        ["replicas", "straggler", "workload"], sort=False
    ):
        waits = group[group["strategy"].str.startswith("synchronous/")]
        goes_on = group[group["strategy"].str.startswith("asynchronous/")]
        if len(waits) != 1 or len(goes_on) != 1:
            continue
        slow = waits.iloc[0]
        fast = goes_on.iloc[0]
        launches = number_of_launches(pd.DataFrame([fast, slow]))
        if not (slow["samples_per_s"].n and fast["samples_per_s"].n):
            continue
        sentences.append(
            Sentence(
                "A slow worker",
                f"With {labels.workers(int(str(replicas)))}, {slowed} slower, the other workers "
                f"were blocked {_blocked(material, slow['cell_id'])} of the time when synchronous "
                f"(they wait for the slow one), {_blocked(material, fast['cell_id'])} when "
                f"asynchronous. On this machine {name(fast['series'])} gave "
                f"{text.quantity(fast['samples_per_s'])} samples/s, {name(slow['series'])} "
                f"{text.quantity(slow['samples_per_s'])} ({launches}){_gain(fast, slow)}.",
            )
        )

    return sentences


def _gain(fast: pd.Series, slow: pd.Series) -> str:
    """The factor between two throughputs, or why there is none.

    There is one only where no row is flagged and the ranges do not touch.
    """
    if fast["oversubscribed"] or slow["oversubscribed"]:
        return "; more ranks than cores: observed, not a ranking"
    if fast["contended"] or slow["contended"]:
        return "; contended by other processes: observed, not a ranking"
    rates: tuple[Summary, Summary] = fast["samples_per_s"], slow["samples_per_s"]
    if rates[0].low <= rates[1].high and rates[1].low <= rates[0].high:
        return "; no difference seen (the ranges touch)"
    return f": {text.quantity(ratio(rates[0].points, rates[1].points))} times as many"


def _blocked(material: Material, cell_id: str) -> str:
    """Blocked share of the workers that were not slowed, with its range."""
    rows = material.split[
        (material.split["cell_id"] == cell_id) & (material.split["role"] == "worker")
    ]
    rows = rows[rows["straggler"] == 1]
    if rows.empty:
        return text.EMPTY
    low = f"{float(rows['blocked_low'].min()):.0%}"
    high = f"{float(rows['blocked_high'].max()):.0%}"
    center = f"{float(rows['blocked'].median()):.0%}"
    return center if low == high else f"{center} [{low}–{high}]"
