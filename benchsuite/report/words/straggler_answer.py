"""The answer of a plan that slows a worker in virtual time: who arrives first, who misses.

One short answer over all stragglers, then a sentence per straggler, what the straggler costs, and
what tuning changes. Strategies are told apart only where their ranges do not touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pandas as pd

from benchsuite.analysis.arrival import TUNED, arrivals
from benchsuite.analysis.statistics import Summary, ratio
from benchsuite.report import text
from benchsuite.report.drawing.strategy_rows import WORLD, both, by_straggler, factors
from benchsuite.report.figures.virtual_pareto import front_names
from benchsuite.report.material import Material
from benchsuite.report.words import labels
from benchsuite.report.words.sentences import (
    MANY,
    Sentence,
    few,
    goal,
    listed,
    names,
    number_of_launches,
)

Name = Callable[[str], str]


def answer(material: Material) -> list[Sentence]:
    """The sentences; none where no worker of a virtual cell is slowed."""
    virtual = material.in_virtual_time
    sentences = []

    for table in slowed_worlds(virtual):
        same = table[table["tuning"] != TUNED]
        parts = by_straggler(same)
        sentences += [
            _short(parts, virtual),
            *(_one(slowed, part, virtual) for slowed, part in parts),
        ]
        sentences += [*_cost(parts, virtual), *_tuning(table, virtual)]

    return sentences


def slowed_worlds(virtual: Material) -> Iterator[pd.DataFrame]:
    """The rows of each world in which at least two strategies ran with a slowed worker."""
    table = arrivals(virtual.runs, virtual.names)
    for _, group in table.groupby(list(WORLD), sort=False):
        if group.loc[group["straggler"] != "", "series"].nunique() > 1:
            yield group


def _short(parts: list[tuple[str, pd.DataFrame]], material: Material) -> Sentence:
    """Who leads and who missed, over all stragglers."""
    name = names(material, short=True)
    ever = [
        set(part.loc[part["seconds"].map(lambda s: s.misses > 0), "series"]) for _, part in parts
    ]
    lost = list(
        dict.fromkeys(
            name(one) for one in parts[0][1]["series"] if any(one in each for each in ever)
        )
    )
    missed = f" Missed in some runs or all: {listed(lost)}." if lost else " Nobody missed."
    aim = goal(material.target(str(parts[0][1]["workload"].iloc[0])))
    count = labels.workers(int(parts[0][1]["replicas"].iloc[0]))
    return Sentence(
        "Answer", f"{count}, to {aim}, spread and ties below. {_leaders(parts, material)}{missed}"
    )


def _leaders(parts: list[tuple[str, pd.DataFrame]], material: Material) -> str:
    """Who is best on each quantity, straggler by straggler; who always is, is said once."""
    name = names(material, short=True)
    said = []

    for column, phrase in (("seconds", "First in virtual time"), ("bytes", "Fewest bytes")):
        leaders: dict[str, list[str]] = {}

        for slowed, part in parts:
            best = _ordered(_on_links(part), column)
            if best:
                leaders.setdefault(name(best[0][0]), []).append(labels.slowed(slowed))

        told = [
            who if len(when) == len(parts) else f"{who} ({', '.join(when)})"
            for who, when in leaders.items()
        ]
        if told:
            said.append(f"{phrase}: {'; '.join(told)}.")

    return " ".join(said)


def _one(slowed: str, part: pd.DataFrame, material: Material) -> Sentence:
    name = names(material, short=True)
    linked = _on_links(part)
    said = [
        f"{phrase} {_best(_ordered(linked, column), name, column)}"
        for column, phrase in (("seconds", "first"), ("bytes", "fewest bytes"))
        if _ordered(linked, column)
    ]
    front = front_names(part, material)
    if front:
        said.append(f"beaten by nobody on both: {front}")
    said += [
        f"{name(str(row['series']))}, which sends nothing: {text.quantity(row['seconds'])} "
        "virtual s"
        for row in part.to_dict("records")
        if row["bytes"].center == 0
    ]
    late = [
        (name(str(row["series"])), row["seconds"])
        for row in part.to_dict("records")
        if row["seconds"].misses
    ]
    half = [f"{who} {text.quantity(time)}" for who, time in late if math.isinf(time.center)]
    some = [
        f"{who} in {time.misses} of {time.n}" for who, time in late if math.isfinite(time.center)
    ]
    said += [f"missed: {', '.join(half)}"] if half else []
    said += [f"missed in some runs: {', '.join(some)}"] if some else []
    phrase = _capital("; ".join(said) if said else "no strategy arrived")
    return Sentence(
        _capital(labels.slowed(slowed)), f"{phrase} ({number_of_launches(part)}, virtual)."
    )


def _capital(phrase: str) -> str:
    return phrase[:1].upper() + phrase[1:]


def _on_links(part: pd.DataFrame) -> pd.DataFrame:
    """Without those whose workers share the memory of one host: they use no link."""
    return part[part["bytes"].map(lambda s: s.center != 0)]


def _ordered(part: pd.DataFrame, column: str) -> list[tuple[str, Summary]]:
    """The series that arrived with their summaries, fewest first."""
    pairs = [
        (str(s), v)
        for s, v in zip(part["series"], part[column], strict=True)
        if math.isfinite(v.center)
    ]
    return sorted(pairs, key=lambda pair: pair[1].center)


def _best(ordered: list[tuple[str, Summary]], name: Name, column: str) -> str:
    """The best with its number: `NAME, 0.087 [0.069-0.12] virtual s (in its range: 3 others)`."""
    who, best = ordered[0]
    amount = text.si_quantity(best) if column == "bytes" else f"{text.quantity(best)} virtual s"
    close = [name(one) for one, other in ordered[1:] if other.low <= best.high]
    return f"{name(who)}, {amount}" + (f" (in its range: {few(close)})" if close else "")


def _cost(parts: list[tuple[str, pd.DataFrame]], material: Material) -> list[Sentence]:
    """What the slowest straggler costs: time to target over that without one, seed by seed.

    Only of strategies that always arrived.
    """
    (nobody, free), (slowed, worst) = parts[0], parts[-1]
    if nobody or not slowed:
        return []
    name = names(material, short=True)
    before = dict(_ordered(free, "seconds"))
    shares = [
        (name(one), ratio(after.points, before[one].points, paired=True))
        for one, after in _ordered(worst, "seconds")
        if one in before
        and not after.misses
        and not before[one].misses
        and after.n == before[one].n
    ]
    if len(shares) < 2:
        return []
    shares.sort(key=lambda pair: pair[1].center)
    (least, low), (most, high) = shares[0], shares[-1]
    return [
        Sentence(
            "What it costs",
            f"Virtual time to target, {labels.slowed(slowed)} over no straggler, seed by seed: "
            f"grows least for {least}, {text.quantity(low)} times (n = {low.n}); most for {most}, "
            f"{text.quantity(high)} times (n = {high.n}).",
        )
    ]


def _tuning(table: pd.DataFrame, material: Material) -> list[Sentence]:
    """Whom a learning rate of its own helped: ranges apart, or a median that missed and arrived."""
    pairs = both(table)
    if pairs.empty:
        return []
    said = []

    for slowed, part in by_straggler(pairs):
        helped, harmed, alike = _changes(part, names(material, short=True))
        phrase = [f"helps {_most(helped)}"] if helped else []
        phrase += [f"harms {_most(harmed)}"] if harmed else []
        phrase += [f"no difference seen for {few(alike)}"] if alike else []
        said.append(f"{_capital(labels.slowed(slowed))}: {'; '.join(phrase)}.")

    own = table[table["tuning"] == TUNED]
    tuned = by_straggler(own.assign(series=own["base"]))
    return [
        Sentence(
            "Tuning",
            f"With a learning rate of its own for every strategy: {_leaders(tuned, material)} "
            "Virtual s to target, the "
            f"recipe's rate to the tuned one ({number_of_launches(pairs)}): {' '.join(said)}",
        )
    ]


def _changes(part: pd.DataFrame, name: Name) -> tuple[list[str], list[str], list[str]]:
    """Who was helped (most first) and who was harmed, each with factor and both times.

    Third come the names of those for whom no difference was seen.
    """
    helped = []
    harmed = []
    alike = []

    for one, rows in part.groupby("base", sort=False):
        before: Summary = rows.loc[rows["tuning"] != TUNED, "seconds"].iloc[0]
        tuned = rows[rows["tuning"] == TUNED].to_dict("records")[0]
        after: Summary = tuned["seconds"]
        change = (
            f"{name(str(one))} {factors(tuned)}, {text.quantity(before)} to {text.quantity(after)}"
        )
        gain = math.inf if math.isinf(before.center) else before.center / after.center

        if after.high < before.low or (math.isinf(before.center) and math.isfinite(after.center)):
            helped.append((gain, change))
        elif after.low > before.high or (math.isinf(after.center) and math.isfinite(before.center)):
            harmed.append((-gain, change))
        else:
            alike.append(name(str(one)))

    first, last = (sorted(each, key=lambda pair: -pair[0]) for each in (helped, harmed))
    return [phrase for _, phrase in first], [phrase for _, phrase in last], alike


def _most(changes: list[str]) -> str:
    rest = len(changes) - MANY
    return "; ".join(changes[:MANY]) + (f"; and {rest} more" if rest > 0 else "")
