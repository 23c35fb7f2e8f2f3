"""Many seeds of one cell: which share of them arrives at the target, and when.

A share of k of n is printed with its lower 95 % bound (Clopper and Pearson, one-sided). Of the
samples to the target there are the median with its interval, the middle half of the seeds and their
range; a seed that missed counts as infinite in all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from benchsuite.analysis.statistics import lower_share, quartiles, summarize
from benchsuite.report import text
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.printed import Table, Value
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels
from benchsuite.report.words.sentences import Sentence, goal
from benchsuite.results.record import Run

KIND = Kind(title="How many seeds arrive, and when?", clock="wall")

LEVELS = ("easy", "target", "hard")


def tabulate(spec: FigureSpec, material: Material) -> Table:
    """One row per cell."""
    names = material.of(material.names, spec).sort_values(["replicas", "order"], kind="stable")
    several = names["series"].nunique() > 1
    workers = names["replicas"].nunique() > 1
    rows = []
    numbers = []

    for name in names.to_dict("records"):
        runs = [run for run in material.runs if run.cell_id == name["cell_id"]]
        row = [Value(str(name["workload"]))]
        row += [Value(labels.label(name["series"]))] if several else []
        row += [Value(str(name["replicas"]), sort=float(name["replicas"]))] if workers else []
        rows.append([*row, Value(str(len(runs)), sort=float(len(runs))), *_values(runs)])
        numbers.append(_numbers(name, runs))

    headings = [("workload", "what is trained")]
    headings += [("strategy", "sync, topology")] if several else []
    headings += [("workers", "ranks that compute gradients")] if workers else []
    headings.append(("n", "seeds, each a fresh launch"))
    headings += [
        (f"reached {level}", "seeds that met it, and the lower 95 % bound of their share")
        for level in LEVELS
    ]
    headings += [
        ("samples to target", "median over the seeds, and its interval"),
        ("middle half", "samples to target of the quarter and of the three quarters of the seeds"),
        ("range", "the fewest and the most samples to target"),
        ("final metric", "the workload's metric at the last evaluation"),
    ]
    ids = [str(cell_id) for cell_id in names["cell_id"]]
    return Table(
        spec.name,
        _caption(material, names, ids),
        headings,
        rows,
        [False] * len(rows),
        pd.DataFrame(numbers),
        ids,
    )


def answer(material: Material) -> list[Sentence]:
    """A sentence per workload, where the plan is of single processes and nothing is compared."""
    said: list[Sentence] = []
    if (material.names["replicas"] > 1).any():
        return said

    for name in material.names.to_dict("records"):
        runs = [run for run in material.runs if run.cell_id == name["cell_id"]]
        if not runs or not runs[0].result.get("target"):
            continue
        at = _arrivals(runs, "target")
        k = sum(map(math.isfinite, at))
        n = len(at)
        low, high = quartiles(at)
        middle = text.number(statistics.median(at))
        said.append(
            Sentence(
                f"{name['workload']}: {k} of {n} seeds",
                f"reached {goal(runs[0].result['target'])} ({text.at_least(k / n)}; at least "
                f"{text.at_least(lower_share(k, n))} at 95 % confidence), after {middle} samples "
                f"in the median, {_between(low, high, ' to ')} in the middle half of them, "
                f"{_between(min(at), max(at), ' to ')} in all.",
            )
        )

    return said


def _arrivals(runs: Sequence[Run], level: str) -> list[float]:
    """Samples to a level, seed by seed; a miss is infinite."""
    found = [(run.result.get("samples_to") or {}).get(level) for run in runs]
    return [math.inf if samples is None else float(samples) for samples in found]


def _values(runs: Sequence[Run]) -> list[Value]:
    if not runs or not runs[0].result.get("target"):
        return [Value(text.EMPTY, sort=math.inf)] * (len(LEVELS) + 4)
    values = []

    for level in LEVELS:
        k = sum(map(math.isfinite, _arrivals(runs, level)))
        n = len(runs)
        values.append(Value(f"{k} of {n}", f"≥ {text.at_least(lower_share(k, n))}", sort=k / n))

    at = _arrivals(runs, "target")
    center, spread = text.parts(summarize(at))
    low, high = quartiles(at)
    finals = [
        float(run.result["final_metric"])
        for run in runs
        if run.result.get("final_metric") is not None
    ]
    final, final_spread = text.parts(summarize(finals))
    return [
        *values,
        Value(center, spread, statistics.median(at)),
        Value(_between(low, high), sort=low),
        Value(_between(min(at), max(at)), sort=min(at)),
        Value(final, final_spread, statistics.median(finals) if finals else math.inf),
    ]


def _numbers(name: Mapping[Hashable, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """The same row as plain numbers, for CSV."""
    row = {key: name[key] for key in ("cell_id", "workload", "series", "replicas")} | {
        "n": len(runs)
    }

    for level in LEVELS:
        at = _arrivals(runs, level)
        k = sum(map(math.isfinite, at))
        low, high = quartiles(at)
        row |= {
            f"reached_{level}": k,
            f"share_{level}_low": lower_share(k, len(at)) if at else math.nan,
            f"samples_to_{level}_median": statistics.median(at) if at else math.nan,
            f"samples_to_{level}_q1": low,
            f"samples_to_{level}_q3": high,
            f"samples_to_{level}_min": min(at, default=math.nan),
            f"samples_to_{level}_max": max(at, default=math.nan),
        }

    return row


def _between(low: float, high: float, joined: str = "–") -> str:
    return f"{text.number(low)}{joined}{text.number(high)}"


def _caption(material: Material, names: pd.DataFrame, ids: list[str]) -> str:
    stated = []

    for workload in dict.fromkeys(names["workload"]):
        target = material.target(str(workload))
        if target:
            levels = ", ".join(f"{level} {target[level]:g}" for level in LEVELS)
            unit = f" {target['unit']}" if target.get("unit") else ""
            twice = ", twice in a row" if target.get("criterion") == "twice" else ""
            relation = "≥" if target["direction"] == "max" else "≤"
            every = f"looked at every {target['evaluate_every']:,} samples"
            stated.append(
                f"{workload}: {target['metric']} {relation} {levels}{unit}{twice}, {every}"
            )

    return (
        f"{'; '.join(stated)}. A seed that did not arrive is infinite, and stays in median, middle "
        "half and range. Shares: lower 95 % bounds, one-sided (Clopper and Pearson). "
        f"{material.provenance(ids)}"
    )
