"""What the virtual clock's runs say, in sentences for the top of the page.

Virtual seconds are compared with virtual ones only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pandas as pd

from benchsuite.analysis.statistics import Summary
from benchsuite.report import text
from benchsuite.report.material import Material
from benchsuite.report.words import labels
from benchsuite.report.words.sentences import (
    Ends,
    Sentence,
    goal,
    listed,
    names,
    number_of_launches,
    versus,
)
from benchsuite.report.words.straggler_answer import slowed_worlds

Name = Callable[[str], str]


def answer(material: Material) -> list[Sentence]:
    """The sentences; none where the plan has no run of the virtual clock."""
    if not material.in_virtual_time.runs:
        return []
    name = names(material.in_virtual_time)
    return [*_waiting(material, name), *_arrival(material, name), *_payload(material)]


def _waiting(material: Material, name: Name) -> list[Sentence]:
    """Share of waiting and staleness at the largest number of workers.

    Of the compute times that spread most among those that were run.
    """
    table = material.virtual
    table = table[(table["link"] == "free") & (table["straggler"] == "")]
    if table.empty:
        return []
    table = table[table["replicas"] == table["replicas"].max()]
    said = []

    for spread, rows in table.groupby("spread", sort=False):
        shares = [
            (name(s), w.center) for s, w in zip(rows["series"], rows["waiting"], strict=True) if w.n
        ]
        if len(shares) > 1:
            shares.sort(key=lambda pair: pair[1])
            said.append(f"{spread}: " + ", ".join(f"{who} {share:.0%}" for who, share in shares))

    stale = [
        (name(s), w.center)
        for s, w in zip(table["series"], table["staleness"], strict=True)
        if w.n and w.center
    ]
    oldest = max(stale, key=lambda pair: pair[1], default=None)
    if not said:
        return []
    age = (
        f" The price of not waiting is staleness: {oldest[0]}, up to {oldest[1]:,.0f} versions."
        if oldest
        else ""
    )
    count = labels.workers(int(table["replicas"].iloc[0]))
    phrase = (
        f"With {count} on free links, share of time waiting by compute times: {'; '.join(said)}"
    )
    return [Sentence("Waiting", f"{phrase} ({number_of_launches(table)}, virtual).{age}")]


def _arrival(material: Material, name: Name) -> list[Sentence]:
    """Who reaches the target first in virtual seconds.

    How often over all worlds, and in which world by the widest margin.
    """
    table = material.virtual
    table = table[
        (table["virtual_seconds_to_target"].map(lambda s: s.n) > 0) & (table["straggler"] == "")
    ]
    told = [world["workload"].iloc[0] for world in slowed_worlds(material.in_virtual_time)]
    table = table[(table["tuning"] == "same") & ~table["workload"].isin(told)]
    sentences = []

    for workload, part in table.groupby("workload", sort=False):
        several = part.groupby("replicas")["series"].nunique()
        several = several[several > 1]
        if several.empty:
            continue
        rows = part[part["replicas"] == several.index.max()]
        aim = goal(material.in_virtual_time.target(str(workload)))
        worlds = [group for _, group in rows.groupby(["spread", "link"], sort=False)]
        phrase = (
            f"{workload}, {labels.workers(int(rows['replicas'].iloc[0]))}, to {aim} in virtual "
            "seconds: "
        )
        arrived = rows[rows["virtual_seconds_to_target"].map(lambda s: math.isfinite(s.center))]

        if len(worlds) == 1 and len(arrived) > 1:
            ends = Ends("virtual_seconds_to_target", "min", "first", "last", " virtual s")
            phrase += f"{versus(arrived, ends, name)}{_missed(rows, name)}"
        else:
            phrase += f"{_firsts(worlds, name)}{_margin(worlds, name)}{_missed(rows, name)}"

        sentences.append(Sentence("Time to target", f"{phrase} ({number_of_launches(rows)})."))

    return sentences


def _payload(material: Material) -> list[Sentence]:
    """Bytes counted under the virtual clock against their prediction.

    A broken law is said on top of the page.
    """
    table = material.in_virtual_time.traffic
    counted = table[table["law"] == "holds"]
    if counted.empty or (table["law"] == "broken").any():
        return []
    runs = text.count_of(int(counted["num_counted"].sum()), "counted run")
    return [
        Sentence(
            "Bytes, virtual",
            f"In {runs} of the virtual clock payload equals its prediction exactly.",
        )
    ]


def _firsts(worlds: list[pd.DataFrame], name: Name) -> str:
    """Who is first how often: `asynchronous first in 7 of 9 worlds (compute times x links)`.

    A tie counts for nobody.
    """
    firsts: Counter[str] = Counter()

    for world in worlds:
        pairs = sorted(_times(world, name), key=lambda pair: pair[1].center)
        if (
            len(pairs) > 1
            and math.isfinite(pairs[0][1].high)
            and pairs[0][1].high < pairs[1][1].low
        ):
            firsts[pairs[0][0]] += 1
        else:
            firsts["nobody clearly"] += 1

    many = f"of {text.count_of(len(worlds), 'world')} (compute times x links)"
    said = [f"{who} first in {count}" for who, count in firsts.most_common()]
    return f"{listed(said)} {many}"


def _margin(worlds: list[pd.DataFrame], name: Name) -> str:
    """The world in which the first and the last are furthest apart, with both numbers."""
    best: tuple[float, str] = (1.0, "")

    for world in worlds:
        pairs = [pair for pair in _times(world, name) if math.isfinite(pair[1].center)]
        if len(pairs) < 2:
            continue
        pairs.sort(key=lambda pair: pair[1].center)
        (first, low), (last, high) = pairs[0], pairs[-1]

        if low.high < high.low and high.center / low.center > best[0]:
            where = f"{world['spread'].iloc[0]} times, links {world['link'].iloc[0]}"
            numbers = f"{first} {text.quantity(low)}, {last} {text.quantity(high)}"
            best = (high.center / low.center, f"; furthest apart with {where}: {numbers}")

    return best[1]


def _missed(rows: pd.DataFrame, name: Name) -> str:
    pairs = zip(rows["series"], rows["virtual_seconds_to_target"], strict=True)
    missed = Counter(name(series) for series, time in pairs if math.isinf(time.center))
    said = [f"{who} in {text.count_of(count, 'world')}" for who, count in missed.items()]
    return f"; missed within the budget: {listed(said)}" if said else ""


def _times(world: pd.DataFrame, name: Name) -> list[tuple[str, Summary]]:
    return [
        (name(s), t)
        for s, t in zip(world["series"], world["virtual_seconds_to_target"], strict=True)
        if t.n
    ]
