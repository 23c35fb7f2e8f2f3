"""The `[[figures]]` entries of a plan: which kinds there are, and what each of them may say.

    [[figures]]
    kind = "metric_against"              # one of KINDS
    title = "Does it train?"             # heading on the page; default: the kind's own
    name = "curves"                      # file name under figures/ or tables/; default: the kind
    x = ["samples", "seconds", "bytes"]  # metric_against: one figure each;
                                         # to_target, virtual_to_target: a column each
    y = ["loss", "metric"]               # metric_against: a row of panels each;
                                         # virtual_tuning: one of x
    goal = "target"                      # to_target, virtual_to_target, _pareto, _tuning:
                                         # easy | target | hard
    columns = ["samples_per_s"]          # tables; default: all.
                                         # virtual_scaling: spread | link, panels side by side
    rows = ["link"]                      # virtual_scaling only: panels below each other
    where = { straggler = false, replicas = [1, 2, 4], topology = "ring" }
                                         # the cells that are drawn; default: all.
                                         # straggler: true, false, or factors of the slowest
                                         # worker (1 = nobody slowed)

This file imports neither pandas nor matplotlib: plans are read with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell

_TO_TARGET = {"x": ("seconds", "samples", "bytes"), "goal": ("target", "easy", "hard")}
# kind -> (title, keys of its own with their values)
KINDS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = MappingProxyType(
    {
        "metric_against": (
            "Does it train, and what does it take?",
            {"x": ("samples", "seconds", "bytes"), "y": ("loss", "metric")},
        ),
        "throughput": ("How many samples per second, at how much CPU?", {}),
        "traffic": ("How many bytes?", {}),
        "staleness": ("How stale are the gradients?", {}),
        "rank_split": ("Where does each rank's time go?", {}),
        "to_target": ("What does the target take?", _TO_TARGET),
        "virtual_to_target": ("What does the target take in virtual time?", _TO_TARGET),
        "virtual_pareto": ("Which strategy is beaten by no other?", {"goal": _TO_TARGET["goal"]}),
        "virtual_tuning": (
            "What does a learning rate of its own change?",
            {"y": _TO_TARGET["x"], "goal": _TO_TARGET["goal"]},
        ),
        "virtual_scaling": (
            "And with more workers? In virtual time",
            {
                "y": (
                    "staleness",
                    "waiting",
                    "samples_per_s",
                    "seconds_to_target",
                    "samples_to_target",
                ),
                "columns": ("spread", "link", ""),
                "rows": ("link", "spread", ""),
            },
        ),
        "two_worlds": ("What this machine could measure, and what the virtual clock says", {}),
        "parallel_costs": ("What does a rank keep, and what is sent?", {}),
        "parallel_table": ("Forms of parallelism at equal ranks: all numbers", {}),
        "seeds": ("How many seeds arrive, and when?", {}),
        "table": (
            "All numbers",
            {
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
        ),
        "virtual_table": (
            "All numbers in virtual time",
            {
                "columns": (
                    "virtual_samples_per_s",
                    "waiting",
                    "staleness",
                    "final_metric",
                    "samples_to_target",
                    "virtual_seconds_to_target",
                    "bytes_to_target",
                    "bytes_per_sample",
                    "payload_minus_predicted",
                    "notes",
                )
            },
        ),
    }
)
WHERE = (
    "workload",
    "preset",
    "parallel",
    "model_parallel",
    "sync",
    "topology",
    "compression",
    "replicas",
    "servers",
    "straggler",
    "clock",
    "gradients",
    "link_mbit",
    "compute_time",
    "tuning",
    "lr_factor",
)
CLOCKS: Mapping[str, frozenset[str]] = {  # kind -> the clocks whose runs it draws
    kind: frozenset(["virtual" if kind.startswith("virtual") else "wall"]) for kind in KINDS
} | {"two_worlds": frozenset(["virtual", "wall"])}
_SHARED = ("kind", "title", "name", "where")
_WHERE_ASKED_FOR = ("policy_lag",)  # of agents only


@dataclass(frozen=True)
class FigureSpec:
    """One entry, checked and with its defaults."""

    kind: str
    name: str
    title: str
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # x, y, columns
    where: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def wants(self, cell: Cell) -> bool:
        """Whether the entry's filter lets this cell in."""
        for key, allowed in self.where.items():
            if key == "straggler":
                if not any(_slowed(cell, wanted) for wanted in allowed):
                    return False
                continue
            if key == "servers":
                value: Any = cell.num_servers
            elif key == "compute_time":
                value = (cell.compute_time or {}).get("kind", "")
            else:
                value = getattr(cell, key)
                value = (
                    "none"
                    if value is None
                    else plugins.stem(value)
                    if isinstance(value, str)
                    else value
                )
            if value not in allowed:
                return False
        return True


def _slowed(cell: Cell, wanted: Any) -> bool:
    if isinstance(wanted, bool):
        return bool(cell.straggler) == wanted
    return bool(max(cell.straggler.values(), default=1.0) == wanted)


def parse(entries: Iterable[Mapping[str, Any]], cells: Iterable[Cell] = ()) -> list[FigureSpec]:
    """Checked entries with unique names; none at all means one of each kind that has something to
    draw of `cells` (but `seeds`, which is for many).

    UsageError for an unknown kind, key or value (the nearest known one first).
    """
    known = list(cells)
    clocks = {cell.clock for cell in known} or {"wall"}
    left_out = {"seeds"} | (
        set() if any(cell.tuning == "per_strategy" for cell in known) else {"virtual_tuning"}
    )
    if not any(cell.model_parallel > 1 for cell in known):
        left_out |= {"parallel_costs", "parallel_table"}
    listed = list(entries) or [
        {"kind": kind} for kind in KINDS if CLOCKS[kind] <= clocks and kind not in left_out
    ]
    specs: list[FigureSpec] = []
    for entry in listed:
        spec = _parse_one(entry)
        taken = [
            other.name for other in specs if other.kind == spec.kind or other.name == spec.name
        ]
        if spec.name in taken:
            if "name" in entry:
                raise UsageError(f"two figures are named {spec.name!r}: give each its own name")
            spec = FigureSpec(
                spec.kind, f"{spec.name}_{len(taken) + 1}", spec.title, spec.values, spec.where
            )
        specs.append(spec)
    return specs


def _parse_one(entry: Mapping[str, Any]) -> FigureSpec:
    kind = str(entry.get("kind", ""))
    if kind not in KINDS:
        raise UsageError(plugins.unknown("figure kind", kind, KINDS))
    title, own = KINDS[kind]
    for key in entry:
        if key not in (*_SHARED, *own):
            raise UsageError(plugins.unknown("key", key, (*_SHARED, *own), of=f"figure {kind}"))
    values = {}
    for key, known in own.items():
        default = tuple(value for value in known if value not in _WHERE_ASKED_FOR)
        values[key] = tuple(str(value) for value in _listed(entry.get(key, default)))
        for value in values[key]:
            if value not in known:
                raise UsageError(plugins.unknown(key, value, known, of=f"figure {kind}"))
    where = {}
    for key, wanted in entry.get("where", {}).items():
        if key not in WHERE:
            raise UsageError(plugins.unknown("filter", key, WHERE, of=f"figure {kind}"))
        where[key] = tuple(_listed(wanted))
    name = str(entry.get("name", kind))
    if not name.replace("_", "").replace("-", "").isalnum():
        raise UsageError(
            f"figure name {name!r} becomes a file name: letters, digits, '-' and '_' only"
        )
    return FigureSpec(kind, name, str(entry.get("title", title)), values, where)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
