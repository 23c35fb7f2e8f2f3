"""`benchsuite verify`: every law on every strategy that it speaks about, then every broken twin.

A line is a law and a strategy (sync, topology, compression), with the worst figure over all its
cells. Under the wall clock the ranks are threads of this process, or processes where a strategy
calls the library by itself; otherwise they are ranks of virtual time. Laws that look at the same
run share it.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchsuite.cluster.local import Cluster
from benchsuite.errors import UsageError
from benchsuite.laws import Control, Figure, Law, MakeRanks, families
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.cases import Asked, Cells
from benchsuite.laws.harness.process_ranks import LawRun, asked_by, process_ranks, together
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.runs import remembered
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell
from benchsuite.virtual.gradients import Graphs

KINDS = ("parallel", "sync", "topology", "compression")
# A law that raises after so long has waited for a rank in vain. No other law waits for that
# strategy again.
HANGS_S = 20.0
BATCH = 24  # samples of a step of `harness/tiny.py`

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Named:
    """A law, the file that it stands in, and where it is shown."""

    family: str
    law: Law
    place: Cells

    def to_json(self) -> dict[str, Any]:
        return {"family": self.family, "law": self.law.name}


class NoProcesses(Exception):
    """Ranks that are processes cannot be started here."""


@dataclass
class Line:
    """One line of the answer: a law on a strategy."""

    named: Named
    strategy: str
    figure: Figure | None = None  # the worst one so far
    num_cells: int = 0
    error: str = ""

    @property
    def holds(self) -> bool:
        return not self.error and self.figure is not None and self.figure.holds

    def add(self, figure: Figure) -> None:
        """Counts one more cell, and keeps its figure if it is the worst."""
        self.num_cells += 1
        if self.figure is None or _badness(figure) > _badness(self.figure):
            self.figure = figure

    def to_json(self) -> dict[str, Any]:
        told = {**self.named.to_json(), "strategy": self.strategy, "cells": self.num_cells}
        figure = self.figure or Figure(math.nan, math.nan)
        numbers = {
            "value": _finite(figure.value),
            "bound": _finite(figure.bound),
            "detail": figure.detail,
        }
        return {**told, **numbers, "holds": self.holds, "error": self.error}


@dataclass
class Twins:
    """The broken twins of a law, and those of them that the law missed."""

    named: Named
    num: int = 0
    missed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        caught = self.num - len(self.missed)
        return {**self.named.to_json(), "twins": self.num, "caught": caught, "missed": self.missed}


def run(asked: Asked, *, say: Say = lambda _: None) -> dict[str, Any]:
    """Shows the laws that are asked for; returns the answer as plain data.

    The keys are `{"clock", "replicas", "laws": [..], "twins": [..], "unsupported": [..],
    "exit_code", "seconds"}`. The exit code is 0 where every line holds and every broken twin is
    caught, else 1. `say` is told what is being run.
    """
    for kind in KINDS:
        for name in asked.members(kind):
            plugins.find(kind, name)
    if wrong := [n for n in asked.workers if n < 1 or BATCH % n]:
        fit = ", ".join(str(n) for n in range(1, BATCH + 1) if BATCH % n == 0)
        raise UsageError(
            f"--replicas {wrong[0]}: a step of the laws has {BATCH} samples; give some of {fit}"
        )
    for path in filter(plugins.is_path, asked.sync):
        if "obeys" not in plugins.find("sync", path).constants:
            say(
                f'{path}: laws of all strategies only; obeys = "synchronous" in its class would '
                "claim the laws of that"
            )
    begin = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.ExitStack() as stack:
            verdict = _Verdict(asked, _Ranks(asked, stack), say)
            verdict.show_laws()
            verdict.show_twins()
    finally:
        torch.set_num_threads(threads)
    return verdict.to_json() | {"seconds": round(time.monotonic() - begin, 1)}


class _Ranks:
    """What runs the cells of this clock; it keeps runs that several laws look at."""

    def __init__(self, asked: Asked, stack: contextlib.ExitStack) -> None:
        self._asked = asked
        self._clock = asked.clock
        self._stack = stack
        self._graphs: dict[str, Graphs] = {}
        self._processes: MakeRanks | None = None
        self._no_processes = ""
        self.forget()

    def forget(self) -> None:
        """Forgets all kept runs, because only the laws of one strategy share them."""
        self._kept: dict[str, MakeRanks] = {}

    def of(self, cell: Cell) -> MakeRanks:
        """The ranks for this cell.

        NoProcesses where they must be processes and none can be started.
        """
        by_library = self._clock == "wall" and cases.in_processes(cell)
        kind = "processes" if by_library else self._clock
        if kind not in self._kept:
            self._kept[kind] = remembered(self._made(kind))
        return self._kept[kind]

    def _made(self, kind: str) -> MakeRanks:
        if kind == "processes":
            return self._by_cluster()
        return thread_ranks if kind == "wall" else partial(virtual_ranks, graphs=self._graphs)

    def _by_cluster(self) -> MakeRanks:
        """The ranks of one cluster, which is started once for all cells."""
        if self._processes is None and not self._no_processes:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="benchsuite-"))
            cluster = self._stack.enter_context(Cluster())
            try:
                cluster.start()
                runs: list[LawRun] = []
                for named in _laws(self._asked):
                    runs += asked_by(named.law, named.place.of(self._asked))
                self._processes = together(process_ranks(cluster, Path(folder)), runs)
            except RuntimeError as error:
                self._no_processes = str(error)
        if self._processes is None:
            raise NoProcesses(f"its ranks are processes of their own: {self._no_processes}")
        return self._processes


class _Verdict:
    """What is found, line by line."""

    def __init__(self, asked: Asked, ranks: _Ranks, say: Say) -> None:
        self._asked = asked
        self._ranks = ranks
        self._say = say
        self._laws = [
            named for named in _laws(asked) if any(map(self._can_be_shown, named.law.controls))
        ]
        self._lines: list[Line] = []
        self._twins: list[Twins] = []
        self._unsupported = [
            {
                "strategy": found.subject,
                "reason": found.problem.reason,
                "remedy": found.problem.remedy,
            }
            for found in cases.refused(asked)
        ]

    def show_laws(self) -> None:
        """Shows the laws strategy by strategy, because laws share its runs."""
        subjects = _subjects(self._laws, self._asked)
        if not subjects:
            reasons = [f"{told['strategy']}: {told['reason']}" for told in self._unsupported]
            raise UsageError(
                "; ".join(reasons)
                or f"{_described(self._asked)}: no such combination is a strategy"
            )
        for number, (subject, shown) in enumerate(subjects.items()):
            self._say(
                f"[{number + 1}/{len(subjects)}] {subject}: "
                f"{max(len(cells) for cells, _ in shown)} cells"
            )
            self._ranks.forget()
            hangs = ""
            try:
                for cells, laws in shown:
                    hangs = self._show(subject, cells, laws, hangs)
            except NoProcesses as error:
                self._unsupported.append(
                    {"strategy": subject, "reason": str(error), "remedy": "see benchsuite doctor"}
                )

    def _show(self, subject: str, cells: Sequence[Cell], laws: list[Named], hangs: str) -> str:
        """Shows laws on the cells of one strategy.

        `hangs` says why nobody waits for this strategy again, if so; it is returned for the next
        call.
        """
        for named in laws:
            line = Line(named, subject)
            begin = time.monotonic()
            try:
                for law, cell in cases.cases([named.law], cells):
                    if hangs:
                        line.error = f"not run: {hangs}"
                        break
                    line.add(law.check(self._ranks.of(cell), cell))
            except NoProcesses:
                raise
            except Exception as error:  # noqa: BLE001  a law that raises fails its own line, the others go on
                line.error = f"{type(error).__name__}: {error}"
                hangs = line.error if time.monotonic() - begin > HANGS_S else ""
            if line.num_cells or line.error:
                self._lines.append(line)
        return hangs

    def show_twins(self) -> None:
        """Shows the broken twins of those laws that were shown on something."""
        shown = {line.named for line in self._lines}
        laws = [named for named in self._laws if named in shown]
        self._say(f"broken twins of {len(laws)} laws")
        self._ranks.forget()
        for named in laws:
            twins = Twins(named)
            for control in filter(self._can_be_shown, named.law.controls):
                self._try(twins, control)
            self._twins.append(twins)

    def _try(self, twins: Twins, control: Control) -> None:
        """Shows one broken twin, and notes it where the law holds for it."""
        cell = self._twin_cell(control)
        try:
            figure = control.check(self._ranks.of(cell), cell)
        except NoProcesses:
            return
        except Exception as error:  # noqa: BLE001  not caught by the law, and the others go on
            twins.missed.append(f"{control.broken}: {type(error).__name__}: {error}")
        else:
            twins.missed += [f"{control.broken}: {figure}"] if figure.holds else []
        twins.num += 1

    def _can_be_shown(self, control: Control) -> bool:
        """Whether the ranks of this clock can show a twin.

        A law without a twin that can be shown is worth nothing under that clock.
        """
        by_library = cases.in_processes(self._twin_cell(control))
        return self._asked.clock == "wall" or not (control.real_ranks or by_library)

    def _twin_cell(self, control: Control) -> Cell:
        return cases.on(cases.tiny(clock=self._asked.clock), **control.on)

    def to_json(self) -> dict[str, Any]:
        lines = sorted(self._lines, key=lambda line: self._laws.index(line.named))
        fails = not all(line.holds for line in lines) or any(twins.missed for twins in self._twins)
        return {
            "clock": self._asked.clock,
            "replicas": list(self._asked.workers),
            "laws": [line.to_json() for line in lines],
            "twins": [twins.to_json() for twins in self._twins],
            "unsupported": self._unsupported,
            "exit_code": int(fails),
        }


def _laws(asked: Asked) -> list[Named]:
    """All laws of the package, then those that a user's files bring along."""
    found = [
        Named(family, law, cases.cells_of(family))
        for family, laws in families().items()
        for law in laws
    ]
    for kind in KINDS:
        for path in filter(plugins.is_path, getattr(asked, kind)):
            module = sys.modules[plugins.load(kind, path).__module__]
            place = getattr(module, "CELLS", cases.TRAINING)
            found += [Named(plugins.stem(path), law, place) for law in getattr(module, "LAWS", ())]
    return found


def _subjects(laws: list[Named], asked: Asked) -> dict[str, list[tuple[list[Cell], list[Named]]]]:
    """Strategy -> its cells in each place where laws are shown, with the laws of that place."""
    places: dict[Cells, list[Named]] = {}
    for named in laws:
        places.setdefault(named.place, []).append(named)
    subjects: dict[str, list[tuple[list[Cell], list[Named]]]] = {}
    for place, own in places.items():
        found: dict[str, list[Cell]] = {}
        for cell in place.of(asked):
            found.setdefault(place.subject(cell), []).append(cell)
        for subject, cells in found.items():
            subjects.setdefault(subject, []).append((cells, own))
    return subjects


def _described(asked: Asked) -> str:
    """What was asked for, in one line."""
    given = [f"{kind} {' '.join(getattr(asked, kind))}" for kind in KINDS if getattr(asked, kind)]
    return ", ".join(
        [*given, f"replicas {','.join(map(str, asked.workers))}", f"clock {asked.clock}"]
    )


def _badness(figure: Figure) -> tuple[bool, bool, float]:
    """The order of figures, the worst last: a broken bound, then NaN, then the value."""
    return (
        not figure.holds,
        math.isnan(figure.value),
        0.0 if math.isnan(figure.value) else figure.value,
    )


def _finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
