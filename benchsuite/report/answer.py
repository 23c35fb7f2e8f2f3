"""The short answer on top of the page: sentences made from the data, each with its n and its range.

A sentence compares two strategies only where their ranges do not touch, and wall-clock values only where no point is
oversubscribed or contended. Where the data say nothing, there is no sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from benchsuite.analysis import convergence
from benchsuite.analysis.statistics import Summary, ratio
from benchsuite.report import words
from benchsuite.report.material import Material


@dataclass(frozen=True)
class Sentence:
    """One finding: what it is about, and the sentence."""

    topic: str
    text: str


def answer(material: Material) -> list[Sentence]:
    """What the runs say, in the order a reader asks; empty without runs."""
    if not material.runs:
        return []
    makers: list[Callable[[Material], list[Sentence]]] = [
        _speed, _arrival, _same_training, _bytes, _cpu, _straggler,
    ]  # fmt: skip
    return [sentence for make in makers for sentence in make(material)]


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["straggler"] == ""]


def _largest(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the largest number of workers at which at least two strategies stand."""
    counts = table.groupby("replicas")["series"].nunique()
    several = counts[counts > 1]
    return table[table["replicas"] == several.index.max()] if len(several) else table.iloc[:0]


def _names(material: Material) -> Callable[[str], str]:
    """Series -> how a sentence calls it: without its topology where its sync has no other one in this plan."""
    series = list(dict.fromkeys(material.names["series"]))

    def name(one: str) -> str:
        sync = one.partition("/")[0]
        alone = sum(other.partition("/")[0] == sync for other in series) == 1 and sync != "ddp"
        return sync.replace("_", " ") if alone else words.label(one).replace(", ", " ")

    return name


@dataclass(frozen=True)
class Ends:
    """How the best and the worst of a comparison are called, and the unit."""

    column: str
    better: str  # "max" or "min"
    best: str
    worst: str
    unit: str = ""
    scale: float = 1.0


def _versus(rows: pd.DataFrame, ends: Ends, name: Callable[[str], str]) -> str:
    """`ring fastest: 23,310 [..] samples/s; .. slowest: ..`, or that the ranges of all of them touch."""
    pairs = [(name(str(s)), v) for s, v in zip(rows["series"], rows[ends.column], strict=True) if v.n]
    pairs.sort(key=lambda pair: pair[1].center, reverse=ends.better == "max")
    (best_name, best), (worst_name, worst) = pairs[0], pairs[-1]
    apart = best.low > worst.high if ends.better == "max" else best.high < worst.low
    high, low = (words.quantity(v, scale=ends.scale) + ends.unit for v in (best, worst))
    if not apart:
        return f"no difference seen between {best_name}, {high}, and {worst_name}, {low} (the ranges touch)"
    ties = [n for n, v in pairs[1:-1] if (v.high >= best.low if ends.better == "max" else v.low <= best.high)]
    close = f" (in its range: {_listed(ties)})" if ties else ""
    return f"{best_name} {ends.best}, {high}{close}; {worst_name} {ends.worst}, {low}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _n(rows: pd.DataFrame) -> str:
    low, high = int(rows["n"].min()), int(rows["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _speed(material: Material) -> list[Sentence]:
    """Throughput, where every rank has a core of its own."""
    table = _plain(material.scaling)
    clean = table[~(table["oversubscribed"] | table["contended"]) & (table["samples_per_s"].map(lambda s: s.n) > 0)]
    rows = _largest(clean)
    if rows.empty:
        return [
            Sentence("Throughput", "No two strategies had a core for every rank: wall-clock times rank nothing here.")
        ]
    ends = Ends("samples_per_s", "max", "fastest", "slowest", " samples/s")
    count = int(rows["replicas"].iloc[0])
    crowded = table.loc[table["oversubscribed"] & (table["replicas"] > count), "replicas"]
    limit = f" With {words.workers(int(crowded.min()))} the cores are shared and rank nothing." if len(crowded) else ""
    text = f"With {words.workers(count)} and a core for every rank: {_versus(rows, ends, _names(material))}"
    return [Sentence("Throughput", f"{text} ({_n(rows)}).{_efficiency(rows, _names(material))}{limit}")]


def _efficiency(rows: pd.DataFrame, name: Callable[[str], str]) -> str:
    """Throughput over N times that of 1 worker; only rows without a flag carry one."""
    known = [(name(str(s)), e) for s, e in zip(rows["series"], rows["efficiency"], strict=True) if e.n]
    if not known or int(rows["replicas"].iloc[0]) < 2:
        return ""
    listed = ", ".join(f"{who} {words.quantity(efficiency)}" for who, efficiency in known)
    return f" Efficiency against 1 worker: {listed}."


def _arrival(material: Material) -> list[Sentence]:
    """Samples to target at the largest number of workers."""
    table = _plain(material.targets)
    rows = _largest(table[table["samples_to_target"].map(lambda s: s.n) > 0])
    if rows.empty:
        return []
    name = _names(material)
    target = material.target(str(rows["workload"].iloc[0]))
    unit = f" {target['unit']}" if target.get("unit") else ""
    goal = f"{target['target']:g}{unit} {target['metric']}"
    missed = rows["samples_to_target"].map(lambda s: math.isinf(s.center))
    arrived = rows[~missed]
    ends = Ends("samples_to_target", "min", "needed least", "needed most", " samples")
    said = []
    if len(arrived) > 1:
        said.append(f"With {words.workers(int(rows['replicas'].iloc[0]))}, to {goal}: {_versus(arrived, ends, name)}")
    elif len(arrived) == 1:
        only = arrived.iloc[0]
        said.append(
            f"Only {name(only['series'])} reached {goal}, after {words.quantity(only['samples_to_target'])} samples"
        )
    for row in rows[missed].to_dict("records"):
        summary: Summary = row["samples_to_target"]
        said.append(f"{name(row['series'])} missed {goal}: {words.quantity(summary)}")
    return [Sentence("Convergence", f"{'; '.join(said)} ({_n(rows)}).")]


def _same_training(material: Material) -> list[Sentence]:
    """Whether the synchronous forms trained alike, seed by seed."""
    names = _plain(material.names)
    names = names[names["strategy"].str.startswith("synchronous/") & (names["replicas"] > 1)]
    said = []
    for count, group in names.groupby("replicas"):
        gap = convergence.largest_gap(material.curves, list(group["cell_id"]))
        if not math.isnan(gap):
            alike = "equal in every digit" if gap == 0 else f"at most {gap:.2g} apart"
            said.append(f"{alike} with {words.workers(int(str(count)))}")
    if not said:
        return []
    return [Sentence("Same training", f"Losses of the synchronous topologies, seed by seed: {'; '.join(said)}.")]


def _bytes(material: Material) -> list[Sentence]:
    """Payload per sample, exact, and the wire beside it."""
    table = _plain(material.traffic)
    rows = _largest(table[table["payload_bytes_per_sample"].map(lambda s: s.n) > 0])
    if rows.empty:
        return []
    name = _names(material)
    amount = rows["payload_bytes_per_sample"].map(lambda s: s.center)
    least, most = (
        _listed([name(s) for s in rows.loc[amount == end, "series"]]) for end in (amount.min(), amount.max())
    )
    text = f"With {words.workers(int(rows['replicas'].iloc[0]))}, per sample: {words.si(amount.min())} ({least})"
    if amount.max() > amount.min():
        text += f", up to {words.si(amount.max())} ({most})"
    counted = table[table["law"] != ""]
    broken = [name(s) for s in dict.fromkeys(counted.loc[counted["law"] == "broken", "series"])]
    law = (
        f"payload DIFFERS from its prediction for {_listed(broken)}"
        if broken
        else "payload equals its prediction exactly"
    )
    runs = f"in {words.count_of(int(counted['num_counted'].sum()), 'counted run')} {law}" if len(counted) else ""
    ratios = [value for summary in table["wire_ratio"] for value in summary.points]
    wire = f"on the wire, headers included, {min(ratios):.2f} to {max(ratios):.2f} times the payload" if ratios else ""
    return [Sentence("Bytes", "; ".join(part for part in (text, runs, wire) if part) + ".")]


def _cpu(material: Material) -> list[Sentence]:
    """CPU time per sample: may be said of oversubscribed cells too."""
    table = _plain(material.scaling)
    rows = _largest(table[table["cpu_s_per_sample"].map(lambda s: s.n) > 0])
    if rows.empty:
        return []
    ends = Ends("cpu_s_per_sample", "min", "cheapest", "dearest", " ms", 1e3)
    text = f"With {words.workers(int(rows['replicas'].iloc[0]))}: {_versus(rows, ends, _names(material))}"
    return [Sentence("CPU per sample", f"{text} ({_n(rows)}).")]


def _straggler(material: Material) -> list[Sentence]:
    """Asynchronous against synchronous with one worker slowed, and the blocked share that explains it."""
    table = material.scaling[material.scaling["straggler"] != ""]
    name = _names(material)
    sentences = []
    for (replicas, slowed, _), group in table.groupby(["replicas", "straggler", "workload"], sort=False):
        waits = group[group["strategy"].str.startswith("synchronous/")]
        goes_on = group[group["strategy"].str.startswith("asynchronous/")]
        if len(waits) != 1 or len(goes_on) != 1:
            continue
        slow, fast = waits.iloc[0], goes_on.iloc[0]
        if not (slow["samples_per_s"].n and fast["samples_per_s"].n):
            continue
        sentences.append(Sentence(
            "A slow worker",
            f"With {words.workers(int(str(replicas)))}, {slowed} slower, the other workers were blocked "
            f"{_blocked(material, slow['cell_id'])} of the time when synchronous (they wait for the slow one), "
            f"{_blocked(material, fast['cell_id'])} when asynchronous. On this machine {name(fast['series'])} gave "
            f"{words.quantity(fast['samples_per_s'])} samples/s, {name(slow['series'])} "
            f"{words.quantity(slow['samples_per_s'])} ({_n(pd.DataFrame([fast, slow]))}){_gain(fast, slow)}.",
        ))  # fmt: skip
    return sentences


def _gain(fast: pd.Series, slow: pd.Series) -> str:
    """The factor between two throughputs: only where no row is flagged and the ranges do not touch."""
    if fast["oversubscribed"] or slow["oversubscribed"]:
        return "; more ranks than cores: observed, not a ranking"
    if fast["contended"] or slow["contended"]:
        return "; contended by other processes: observed, not a ranking"
    rates: tuple[Summary, Summary] = fast["samples_per_s"], slow["samples_per_s"]
    if rates[0].low <= rates[1].high and rates[1].low <= rates[0].high:
        return "; no difference seen (the ranges touch)"
    return f": {words.quantity(ratio(rates[0].points, rates[1].points))} times as many"


def _blocked(material: Material, cell_id: str) -> str:
    """Blocked share of the workers that were not slowed, with its range."""
    rows = material.split[(material.split["cell_id"] == cell_id) & (material.split["role"] == "worker")]
    rows = rows[rows["straggler"] == 1]
    if rows.empty:
        return words.EMPTY
    low, high = f"{float(rows['blocked_low'].min()):.0%}", f"{float(rows['blocked_high'].max()):.0%}"
    center = f"{float(rows['blocked'].median()):.0%}"
    return center if low == high else f"{center} [{low}–{high}]"
