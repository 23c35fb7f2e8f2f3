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


def _who(series: str) -> str:
    return words.label(series)


def _versus(rows: pd.DataFrame, column: str, *, better: str, unit: str, scale: float = 1.0) -> str:
    """`ring 23,310 [..] .., then ..`: best against worst of a group, or that they are not told apart."""
    pairs = [(str(s), v) for s, v in zip(rows["series"], rows[column], strict=True) if v.n]
    pairs.sort(key=lambda pair: pair[1].center, reverse=better == "max")
    (best_name, best), (worst_name, worst) = pairs[0], pairs[-1]
    apart = best.low > worst.high if better == "max" else best.high < worst.low
    low, high = words.quantity(best, scale=scale), words.quantity(worst, scale=scale)
    if not apart:
        return f"the ranges touch, from {low}{unit} ({_who(best_name)}) to {high}{unit} ({_who(worst_name)}): not told apart"
    ties = [name for name, v in pairs[1:-1] if (v.high >= best.low if better == "max" else v.low <= best.high)]
    close = f", with {_listed([_who(name) for name in ties])} in reach" if ties else ""
    return f"{_who(best_name)} {low}{unit}{close}; {_who(worst_name)} {high}{unit}"


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
        return [Sentence(
            "Throughput", "no two strategies ran with a core for every rank: wall-clock times rank nothing here."
        )]  # fmt: skip
    count = int(rows["replicas"].iloc[0])
    hidden = int((table["replicas"] > count).any())
    limit = " More workers are oversubscribed on this machine and rank nothing." if hidden else ""
    text = _versus(rows, "samples_per_s", better="max", unit=" samples/s")
    return [Sentence("Throughput", f"{words.workers(count)}, a core for every rank: {text} ({_n(rows)}).{limit}")]


def _arrival(material: Material) -> list[Sentence]:
    """Samples to target at the largest number of workers."""
    table = _plain(material.targets)
    rows = _largest(table[table["samples_to_target"].map(lambda s: s.n) > 0])
    if rows.empty:
        return []
    target = material.target(str(rows["workload"].iloc[0]))
    unit = f" {target['unit']}" if target.get("unit") else ""
    goal = f"{target['target']:g}{unit} {target['metric']}"
    missed = rows[rows["samples_to_target"].map(lambda s: math.isinf(s.center))]
    arrived = rows.drop(missed.index)
    said = []
    if len(arrived) > 1:
        said.append(f"{goal} took samples: {_versus(arrived, 'samples_to_target', better='min', unit='')}")
    elif len(arrived) == 1:
        only = arrived.iloc[0]
        said.append(f"{goal} took {_who(only['series'])} {words.quantity(only['samples_to_target'])} samples")
    for row in missed.to_dict("records"):
        summary: Summary = row["samples_to_target"]
        said.append(f"{_who(row['series'])} missed {goal}: {words.quantity(summary)} runs")
    return [Sentence("Convergence", f"{words.workers(int(rows['replicas'].iloc[0]))}: {'; '.join(said)} ({_n(rows)}).")]


def _same_training(material: Material) -> list[Sentence]:
    """Whether the synchronous forms trained alike, at two workers (where addition order cannot matter) or more."""
    names = _plain(material.names)
    names = names[names["strategy"].str.startswith("synchronous/") & (names["replicas"] > 1)]
    said = []
    for count, group in names.groupby("replicas"):
        gap = convergence.largest_gap(material.curves, list(group["cell_id"]))
        if math.isnan(gap):
            continue
        alike = "are equal in every digit" if gap == 0 else f"differ by at most {gap:.2g}"
        said.append(f"with {words.workers(int(str(count)))} they {alike}")
    if not said:
        return []
    return [Sentence("Same training", f"losses of the synchronous topologies, seed by seed: {'; '.join(said)}.")]


def _bytes(material: Material) -> list[Sentence]:
    """Payload per sample, exact, and the wire beside it."""
    table = _plain(material.traffic)
    rows = _largest(table[table["payload_bytes_per_sample"].map(lambda s: s.n) > 0])
    if rows.empty:
        return []
    ordered = sorted(zip(rows["payload_bytes_per_sample"], rows["series"], strict=True), key=lambda pair: pair[0].center)
    (least, least_name), (most, most_name) = ordered[0], ordered[-1]
    text = f"{words.workers(int(rows['replicas'].iloc[0]))}: {words.si(least.center)} per sample ({_who(least_name)})"
    if most.center > least.center:
        text += f" to {words.si(most.center)} ({_who(most_name)})"
    counted = table[table["payload_source"] == "counted"]
    broken = list(counted.loc[counted["law"] == "broken", "series"])
    law = f"payload differs from its prediction for {_listed(broken)}" if broken else "payload equals its prediction exactly"
    wires = [value for summary in material.traffic["wire_ratio"] for value in summary.points]
    wire = f"; the wire carried {min(wires):.2f} to {max(wires):.2f} of it" if wires else ""
    return [Sentence("Bytes", f"{text}; over {len(counted)} counted cells {law}{wire}.")]


def _cpu(material: Material) -> list[Sentence]:
    """CPU time per sample: may be said of oversubscribed cells too."""
    table = _plain(material.scaling)
    rows = _largest(table[table["cpu_s_per_sample"].map(lambda s: s.n) > 0])
    if rows.empty:
        return []
    text = _versus(rows, "cpu_s_per_sample", better="min", unit=" ms", scale=1e3)
    return [Sentence("CPU per sample", f"{words.workers(int(rows['replicas'].iloc[0]))}: {text} ({_n(rows)}).")]


def _straggler(material: Material) -> list[Sentence]:
    """Asynchronous against synchronous with one worker slowed, and the blocked share that explains it."""
    table = material.scaling[material.scaling["straggler"] != ""]
    sentences = []
    for (replicas, slowed, _), group in table.groupby(["replicas", "straggler", "workload"], sort=False):
        waits = group[group["strategy"].str.startswith("synchronous/")]
        goes_on = group[group["strategy"].str.startswith("asynchronous/")]
        if len(waits) != 1 or len(goes_on) != 1:
            continue
        slow, fast = waits.iloc[0], goes_on.iloc[0]
        gain = ratio(fast["samples_per_s"].points, slow["samples_per_s"].points)
        flagged = " Oversubscribed: the direction is explained by the waiting, the factor is this machine's." \
            if slow["oversubscribed"] or fast["oversubscribed"] else ""  # fmt: skip
        sentences.append(Sentence(
            "A slow worker",
            f"{words.workers(int(str(replicas)))}, {slowed} slower: {_who(fast['series'])} gave {words.quantity(gain)} times "
            f"the samples per second of {_who(slow['series'])} (n = {gain.n}). The workers that were not slowed were blocked "
            f"{_blocked(material, slow['cell_id'])} of the time when synchronous, "
            f"{_blocked(material, fast['cell_id'])} when asynchronous.{flagged}",
        ))  # fmt: skip
    return sentences


def _blocked(material: Material, cell_id: str) -> str:
    rows = material.split[(material.split["cell_id"] == cell_id) & (material.split["role"] == "worker")]
    rows = rows[rows["straggler"] == 1]
    if rows.empty:
        return words.EMPTY
    low, high = float(rows["blocked_low"].min()), float(rows["blocked_high"].max())
    return f"{float(rows['blocked'].median()):.0%} [{low:.0%}–{high:.0%}]"
