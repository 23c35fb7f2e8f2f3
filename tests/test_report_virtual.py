"""The page's virtual part: its own seconds, misses above their panel, theory beside the runs, one
world per group of rows."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchsuite.analysis import cells as naming
from benchsuite.analysis.select import select
from benchsuite.errors import UsageError
from benchsuite.plan.cell import Cell
from benchsuite.plan.plan import Plan
from benchsuite.report import kinds, page, spec
from benchsuite.report.material import Material
from benchsuite.report.tables import virtual_table
from benchsuite.report.words.answer import answer
from benchsuite.results.record import Run
from tests import synthetic_runs as made
from tests.virtual_runs import EXPONENTIAL, FIXED, cell, stored

SEEDS = (0, 1)
TIME = {
    "kind": "virtual_scaling",
    "y": ["seconds_to_target"],
    "columns": ["spread"],
    "rows": ["link"],
}
DIAGNOSES = {
    "kind": "virtual_scaling",
    "name": "diagnoses",
    "y": ["staleness", "waiting"],
    "columns": [""],
    "rows": [""],
}


def the_cells() -> list[Cell]:
    return [
        cell(sync, replicas, times, link_mbit=mbit)
        for sync in ("synchronous", "k_sync", "asynchronous")
        for replicas in (2, 4, 8)
        for times in (EXPONENTIAL, FIXED)
        for mbit in (None, 0.1)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("simulated")
    return [stored(of.with_seed(seed), folder) for of in the_cells() for seed in SEEDS]


def material(runs: list[Run], cells: list[Cell] | None = None) -> Material:
    cells = the_cells() if cells is None else cells
    return Material(cells, SEEDS, select(cells, SEEDS, runs), [made.ENVIRONMENT])


def plan(cells: list[Cell], *figures: dict[str, Any]) -> Plan:
    return Plan(
        name="virtual",
        path=None,
        question="Who waits?",
        seeds=SEEDS,
        cells=tuple(cells),
        refused=(),
        num_excluded=0,
        figures=figures,
        text="",
    )


def drawn(entry: dict[str, Any], of: Material) -> list[Any]:
    (parsed,) = spec.parse([entry])
    drawings: list[Any] = kinds.load(parsed.kind)(parsed, of.seen_by(parsed))
    return drawings


def test_a_panel_per_world_and_a_line_per_strategy(runs: list[Run]) -> None:
    (drawing,) = drawn(TIME, material(runs))
    axes = [ax for ax in drawing.figure.axes if ax.get_lines()]
    assert [ax.get_title(loc="left") for ax in axes] == [
        "free\nexponential",
        "free\nfixed",
        "0.1 Mbit/s\nexponential",
        "0.1 Mbit/s\nfixed",
    ]
    assert {tuple(ax.get_ylim()) for ax in axes} == {tuple(axes[0].get_ylim())}, (
        "panels are compared: one scale"
    )
    assert len(drawing.legend) == 3 and len(set(drawing.cell_ids)) == 36


def test_a_median_beyond_the_budget_is_a_mark_above_its_panel(runs: list[Run]) -> None:
    table = material(runs).virtual
    late = table[table["virtual_seconds_to_target"].map(lambda s: math.isinf(s.center))]
    assert 8 in set(late["replicas"]) and set(late["strategy"]) == {"asynchronous/parameter_server"}
    (drawing,) = drawn(TIME, material(runs))
    marks = [
        line for ax in drawing.figure.axes for line in ax.get_lines() if line.get_gid() == "missed"
    ]
    assert len(marks) == len(late)
    assert all(line.get_ydata()[0] > 1 for line in marks), "axes fraction: above the panel"
    assert (
        "did not arrive within the budget" in drawing.caption
        and "Target: loss ≤ 1e-06" in drawing.caption
    )


def test_no_mark_and_no_strip_where_all_arrive(runs: list[Run]) -> None:
    cells = [each for each in the_cells() if each.replicas < 4]
    (drawing,) = drawn(TIME, material([run for run in runs if run.cell.replicas < 4], cells))
    assert not [
        line for ax in drawing.figure.axes for line in ax.get_lines() if line.get_gid() == "missed"
    ]
    assert "> budget" not in {text.get_text() for ax in drawing.figure.axes for text in ax.texts}


def test_theory_is_dotted_where_it_is_known(runs: list[Run]) -> None:
    def theory(cells: list[Cell]) -> dict[str, list[float]]:
        chosen = [run for run in runs if run.cell_id in {each.id for each in cells}]
        (drawing,) = drawn(DIAGNOSES, material(chosen, cells))
        return {
            ax.get_title(loc="left"): [float(y) for y in line.get_ydata()]
            for ax in drawing.figure.axes
            for line in ax.get_lines()
            if line.get_gid() == "theory"
        }

    harmonic = [1 + 1 / 2, 25 / 12, 761 / 280]
    by_spread = {
        kind: [
            each for each in the_cells() if each.compute_time == times and each.link_mbit is None
        ]
        for kind, times in (("exponential", EXPONENTIAL), ("fixed", FIXED))
    }
    found = theory(by_spread["exponential"])
    assert found["staleness (versions)"] == [1.0, 3.0, 7.0]
    assert found["share of time waiting"] == pytest.approx([1 - 1 / h for h in harmonic])
    assert set(theory(by_spread["fixed"])) == {"staleness (versions)"}, (
        "1 - 1/H_N is the exponential's"
    )


def test_the_table_groups_rows_by_world_and_counts_who_arrived(runs: list[Run]) -> None:
    (entry,) = spec.parse([{"kind": "virtual_table"}])
    table = virtual_table.tabulate(entry, material(runs).in_virtual_time)
    assert [heading for heading, _ in table.headings][:5] == [
        "strategy",
        "compute times",
        "link",
        "workers",
        "n",
    ]
    assert len(table.rows) == 36
    texts = [[value.text for value in row] for row in table.rows]
    assert sum(table.breaks) == len({tuple(row[1:4]) for row in texts}) - 1, (
        "a break per world and N"
    )
    missed = [row for row in table.rows if any("> budget" in value.text for value in row)]
    late = sum(
        math.isinf(time.center) for time in material(runs).virtual["virtual_seconds_to_target"]
    )
    assert len(missed) == late > 0
    assert all("of 2)" in " ".join(value.spread for value in row) for row in missed), missed
    k = next(row for row in texts if row[0].startswith("k sync"))
    assert "backup_workers" in k[0], k


def test_what_is_equal_in_all_rows_is_said_once(runs: list[Run]) -> None:
    (entry,) = spec.parse([{"kind": "virtual_table", "where": {"link_mbit": "none"}}])
    table = virtual_table.tabulate(entry, material(runs).in_virtual_time)
    assert [heading for heading, _ in table.headings][:4] == [
        "strategy",
        "compute times",
        "workers",
        "n",
    ]
    assert "Link: free." in table.caption, table.caption


def test_a_page_of_the_virtual_clock_alone_says_what_it_is_and_what_it_is_not(
    runs: list[Run], tmp_path: Path
) -> None:
    cells = the_cells()
    text = page.render(
        plan(cells, TIME, DIAGNOSES, {"kind": "virtual_table"}),
        runs,
        tmp_path,
        environments={made.ENVIRONMENT_ID: made.ENVIRONMENT},
    ).read_text(encoding="utf-8")
    plain = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    assert "In virtual time (real gradients, simulated clock and network)" in plain
    assert "Virtual seconds are not wall seconds." in plain and "They are a preview." in plain
    assert "n = 2 seeds per cell, preview; virtual; commit" in plain
    assert "Some runs shared the machine" not in plain, "the machine does not matter here"
    topics = [sentence.topic for sentence in answer(material(runs))]
    assert topics == ["Waiting", "Time to target", "Bytes, virtual"], topics


def test_sentences_name_the_worlds_that_they_compare(runs: list[Run]) -> None:
    waiting, arrival, _ = (sentence.text for sentence in answer(material(runs)))
    assert waiting.startswith(
        "With 8 workers on free links, share of time waiting by compute times: "
    )
    found = {
        (row["spread"], row["strategy"]): row["waiting"].center
        for row in material(runs).virtual.to_dict("records")
        if row["replicas"] == 8 and row["link"] == "free"
    }
    for (_, strategy), share in found.items():
        assert f"{share:.0%}" in waiting, (strategy, share, waiting)
    assert (
        "of 4 worlds (compute times x links)" in arrival and "missed within the budget" in arrival
    )


def test_both_worlds_stand_apart_and_crowded_cells_stay_out(runs: list[Run]) -> None:
    both = [*made.quick_cells(), *the_cells()]
    (drawing,) = drawn({"kind": "two_worlds"}, material([*made.quick_runs(SEEDS), *runs], both))
    left, right = [ax for ax in drawing.figure.axes if ax.get_lines()]
    assert left.get_title(loc="left").startswith("measured here") and right.get_title(
        loc="left"
    ).startswith("virtual")
    measured = {float(x) for line in left.get_lines() for x in line.get_xdata()}
    assert max(measured) < 3, (
        f"cells with more ranks than cores are not drawn, found N = {max(measured):g}"
    )
    seen = {2 ** round(math.log2(float(x))) for line in right.get_lines() for x in line.get_xdata()}
    assert seen == {2, 4, 8}, seen
    assert "The two kinds of seconds are not compared" in drawing.caption


def test_a_plan_without_entries_gets_those_of_its_clocks() -> None:
    wall = made.quick_cells()
    simulated = the_cells()
    asked = {
        "seeds",
        "parallel_costs",
        "parallel_table",
    }  # by name, or where a plan has model-parallel replicas
    drawn = [
        {entry.kind for entry in spec.parse([], cells)}
        for cells in (wall, simulated, [*wall, *simulated])
    ]
    assert (
        drawn[0]
        == {each for each in kinds.names() if kinds.find(each).kind.clock == "wall"} - asked
        and "table" in drawn[0]
    )
    assert drawn[1] == {"virtual_scaling", "virtual_table", "virtual_to_target", "virtual_pareto"}
    assert drawn[2] == set(kinds.names()) - {"virtual_tuning"} - asked, "no cell of these is tuned"


def test_an_entry_without_cells_says_so(runs: list[Run], tmp_path: Path) -> None:
    text = page.render(plan(the_cells(), {"kind": "table"}, TIME), runs, tmp_path).read_text(
        encoding="utf-8"
    )
    assert text.count("No cell of this plan belongs here.") == 1


def test_an_unknown_value_of_an_entry_is_named() -> None:
    with pytest.raises(UsageError, match="spred"):
        spec.parse([{**TIME, "columns": ["spred"]}])


def test_names_of_worlds_are_words() -> None:
    described = naming.describe(
        [
            cell(
                "synchronous",
                2,
                {"kind": "gamma", "mean_s": 1.0, "cv": 0.1},
                link_mbit=2500.0,
                link_latency_us=50.0,
            ),
            cell(
                "synchronous",
                2,
                {"kind": "markov", "mean_s": 1.0, "slow_factor": 8.0, "enter": 0.01, "leave": 0.1},
                link_latency_us=0.0,
            ),
            cell("synchronous", 2, {"kind": "shifted_exponential", "mean_s": 1.0, "shift": 0.5}),
        ]
    )
    assert list(described["link"]) == ["2.5 Gbit/s, 50 us", "free", "free"]
    assert list(described["spread"]) == [
        "gamma, cv 0.1",
        "spells 8x slow (9%)",
        "shifted exponential, shift 0.5",
    ]


def test_an_option_that_goes_with_the_number_of_workers_is_no_variant() -> None:
    described = naming.describe(the_cells())
    k = described[described["strategy"] == "k_sync/parameter_server"]
    assert set(k["series"]) == {"k_sync/parameter_server"}
    assert dict(zip(k["replicas"], k["by_size"], strict=True)) == {
        2: "backup_workers=0",
        4: "backup_workers=1",
        8: "backup_workers=2",
    }


def test_a_cell_without_gradients_has_no_time_to_target(runs: list[Run], tmp_path: Path) -> None:
    timed = cell("asynchronous", 4, gradients="none")
    both = [timed, *the_cells()]
    table = material(
        [*runs, *(stored(timed.with_seed(seed), tmp_path) for seed in SEEDS)], both
    ).virtual
    row = table[table["cell_id"] == timed.id].iloc[0]
    assert (
        row["virtual_seconds_to_target"].n == 0
        and row["staleness"].n == 2
        and row["waiting"].n == 2
    )
    alone = dataclasses.replace(timed, seed=0)
    (drawing,) = drawn(DIAGNOSES, material([stored(alone, tmp_path)], [timed]))
    assert "Times only: no gradient was computed." in drawing.caption
