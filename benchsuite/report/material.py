"""What a page is made of: the selected runs, and the tidy tables made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from benchsuite.analysis import convergence, ranks, scaling, traffic, virtual
from benchsuite.analysis.cells import describe
from benchsuite.analysis.select import Selection
from benchsuite.plan.cell import Cell
from benchsuite.plan.plan import Refused
from benchsuite.report import kinds
from benchsuite.report.drawing.style import Look, looks
from benchsuite.report.spec import FigureSpec
from benchsuite.results.columns import COLUMNS, row
from benchsuite.results.record import Run

_TYPES = {"str": "string", "int": "Int64", "float": "Float64", "bool": "boolean"}


@dataclass(frozen=True)
class Material:
    """The runs of a plan under one clock; its tables are computed once, when first asked for."""

    cells: Sequence[Cell]  # of the plan, resolved
    seeds: Sequence[int]
    selection: Selection
    environments: Sequence[Mapping[str, Any]]  # of the selected runs, each once, oldest run first
    clock: str = "wall"
    refused: Sequence[Refused] = ()  # of the plan, by a rule

    @cached_property
    def in_virtual_time(self) -> Material:
        """The same plan's runs of the virtual clock."""
        if self.clock == "virtual":
            return self
        return dataclasses.replace(self, clock="virtual")

    @cached_property
    def runs(self) -> list[Run]:
        """The ok runs of this clock: virtual seconds never share a figure with wall seconds."""
        return [run for run in self.selection.runs if run.cell.clock == self.clock]

    @cached_property
    def names(self) -> pd.DataFrame:
        """What the plan's cells of this clock are called: `analysis.cells.describe`."""
        described = describe(self.cells)
        return described[described["clock"] == self.clock] if len(described) else described

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per ok run, the columns of `export csv`."""
        rows = [row(run) for run in self.runs]
        return pd.DataFrame(
            {
                name: pd.Series([values[name] for values in rows], dtype=_TYPES[kind])
                for name, kind in COLUMNS.items()
            }
        )

    @cached_property
    def curves(self) -> pd.DataFrame:
        """An evaluation per row: `analysis.convergence.curves`."""
        return convergence.curves(self.runs)

    @cached_property
    def scaling(self) -> pd.DataFrame:
        """Throughput and CPU time per cell: `analysis.scaling.scaling`."""
        return scaling.scaling(self.frame, self.names)

    @cached_property
    def targets(self) -> pd.DataFrame:
        """What the target took per cell: `analysis.convergence.to_target`."""
        return convergence.to_target(self.frame, self.names)

    @cached_property
    def virtual(self) -> pd.DataFrame:
        """What the virtual clock says per cell, also asked of the wall clock's material."""
        return virtual.virtual(self.in_virtual_time.frame, self.in_virtual_time.names)

    @cached_property
    def traffic(self) -> pd.DataFrame:
        """Bytes per cell: `analysis.traffic.traffic`."""
        return traffic.traffic(self.frame, self.names)

    @cached_property
    def split(self) -> pd.DataFrame:
        """Where each rank's time went: `analysis.ranks.median_split`."""
        return ranks.median_split(ranks.rank_split(self.runs))

    @cached_property
    def staleness(self) -> pd.DataFrame:
        """Shares of updates by staleness: `analysis.ranks.pooled_staleness`."""
        return ranks.pooled_staleness(ranks.staleness(self.runs))

    @cached_property
    def looks(self) -> dict[str, Look]:
        """How each series of the plan is drawn, the same under both clocks."""
        return looks(describe(self.cells)["series"])

    def wanted(self, spec: FigureSpec) -> list[str]:
        """Ids of the cells a figure may draw, in the plan's order."""
        return list(
            dict.fromkeys(
                cell.id for cell in self.cells if cell.clock == self.clock and spec.wants(cell)
            )
        )

    def has_cells(self, spec: FigureSpec) -> bool:
        """Whether the plan has cells, run or not, that the figure may draw."""
        clocks = kinds.find(spec.kind).kind.clocks
        return any(cell.clock in clocks and spec.wants(cell) for cell in self.cells)

    def seen_by(self, spec: FigureSpec) -> Material:
        """The material that the entry's kind is handed: of its clock, or of the wall clock."""
        return self.in_virtual_time if kinds.find(spec.kind).kind.clock == "virtual" else self

    def of(self, table: pd.DataFrame, spec: FigureSpec) -> pd.DataFrame:
        """Rows of `table` (with a cell_id) that the figure may draw."""
        return table[table["cell_id"].isin(self.wanted(spec))]

    def target(self, workload: str) -> Mapping[str, Any]:
        """The target as the newest run of that workload states it; {} without runs."""
        ids = set(self.names.loc[self.names["workload"] == workload, "cell_id"])
        stated = [
            run.result["target"]
            for run in self.runs
            if run.cell_id in ids and run.result.get("target")
        ]
        return stated[-1] if stated else {}

    @property
    def commits(self) -> list[str]:
        """Commits of the code that ran, short, `+changes` where the tree was dirty."""
        named = []
        for environment in self.environments:
            commit = str(environment.get("commit") or "unknown commit")
            short = commit[:10] if len(commit) >= 40 else commit
            named.append(short + (" + uncommitted changes" if environment.get("dirty") else ""))
        return list(dict.fromkeys(named)) or ["unknown commit"]

    def provenance(self, cell_ids: Sequence[str]) -> str:
        """`n = 3 launches per cell; machine ..; commit ..`: what every caption ends with."""
        counts = [
            sum(run.cell_id == cell_id for run in self.runs) for cell_id in dict.fromkeys(cell_ids)
        ]
        low = min(counts, default=0)
        high = max(counts, default=0)
        number = f"{low}" if low == high else f"{low} to {high}"
        preview = ", preview" if high < 5 else ""
        commit = f"commit {', '.join(self.commits)}."
        if self.clock == "virtual":  # the machine does not matter: these numbers repeat anywhere
            return f"n = {number} seeds per cell{preview}; virtual; {commit}"
        machine = self.selection.machine or "unknown"
        return f"n = {number} launches per cell{preview}; machine {machine}; {commit}"
