"""Curves and targets, scaling with its flags, runs chosen for a plan: against numbers worked out by
hand."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest

from benchsuite.analysis import convergence, ranks, scaling
from benchsuite.analysis.cells import describe
from benchsuite.analysis.select import select
from benchsuite.plan.cell import Cell
from benchsuite.report.material import Material
from benchsuite.results.record import Run, Status
from tests import synthetic_runs as made


def _material(runs: list[Run] | None = None) -> Material:
    cells = made.quick_cells()
    chosen = select(cells, (0, 1, 2), made.quick_runs() if runs is None else runs)
    return Material(cells, (0, 1, 2), chosen, [made.ENVIRONMENT])


def _run(losses: list[float | None], **changes: object) -> Run:
    result = {
        "loss": losses,
        "loss_samples": [10, 20, 30, 40],
        "evaluations": {"samples": [20, 40], "metric": [50.0, None], "version": [2, 4]},
    }
    cost = {"evaluation_s": [1.5, 3.5], "evaluation_bytes": [100, 200]}
    return Run(
        cell=Cell(),
        code_id="c",
        status=Status.OK,
        result=result,
        cost=cost,
        cell_id="a",
        run_id="r",
        **changes,
    )


def test_a_curve_has_the_mean_loss_since_the_evaluation_before():
    curve = convergence.curves([_run([4.0, 2.0, 1.0, 0.5])])
    assert list(curve["loss"]) == [3.0, 0.75]
    assert (
        list(curve["samples"]) == [20, 40]
        and list(curve["seconds"]) == [1.5, 3.5]
        and list(curve["bytes"]) == [100, 200]
    )
    assert curve["metric"][0] == 50.0 and math.isnan(curve["metric"][1])


def test_a_loss_that_is_not_finite_makes_its_window_nan_and_nothing_else():
    curve = convergence.curves([_run([4.0, 2.0, None, 0.5])])
    assert curve["loss"][0] == 3.0 and math.isnan(curve["loss"][1])


def test_a_band_is_median_and_range_at_equal_evaluations():
    rows = pd.DataFrame({"point": [0, 0, 0], "seconds": [1.0, 2.0, 9.0], "loss": [5.0, 1.0, 3.0]})
    band = convergence.band(rows, x="seconds", y="loss").iloc[0]
    assert (band["x"], band["center"], band["low"], band["high"], band["n"]) == (
        2.0,
        3.0,
        1.0,
        5.0,
        3,
    )


def test_misses_of_the_target_stay_infinite_and_diverged_runs_are_misses():
    material = _material()
    rows = material.targets.set_index(["series", "replicas", "straggler"])
    slow = rows.loc[("asynchronous/parameter_server", 4, ""), "samples_to_target"]
    assert slow.n == 3 and slow.misses == 3 and math.isinf(slow.center)
    ring = rows.loc[("synchronous/ring", 2, ""), "samples_to_target"]
    stored = sorted(
        r.result["samples_to"]["target"]
        for r in material.runs
        if r.cell.topology == "ring" and r.cell.replicas == 2
    )
    assert ring.center == stored[1] and ring.misses == 0


def test_topologies_of_one_synchronous_form_differ_by_nothing_here():
    material = _material()
    names = material.names[(material.names["replicas"] == 2) & (material.names["straggler"] == "")]
    alike = names[names["strategy"].str.startswith("synchronous/")]["cell_id"]
    assert convergence.largest_gap(material.curves, list(alike)) == 0.0
    assert convergence.largest_gap(material.curves, list(names["cell_id"])) > 0.1
    assert math.isnan(convergence.largest_gap(material.curves, ["no such cell"]))


def test_efficiency_is_throughput_over_n_times_that_of_one_worker_and_never_of_a_flagged_point():
    table = _material().scaling.set_index(["series", "replicas", "straggler"])
    two, one = (table.loc[("synchronous/ring", n, ""), "samples_per_s"] for n in (2, 1))
    assert table.loc[("synchronous/ring", 2, ""), "efficiency"].center == pytest.approx(
        two.center / (2 * one.center)
    )
    assert table.loc[("synchronous/ring", 4, ""), "efficiency"].n == 0  # oversubscribed
    assert table.loc[("synchronous/native", 2, ""), "efficiency"].n == 0  # contended
    assert table.loc[("synchronous/native", 2, ""), "num_contended"] == 1


def test_a_line_joins_neighbours_without_a_flag_only():
    points = pd.DataFrame(
        {"replicas": [1, 2, 4, 8, 16], "oversubscribed": [0, 0, 1, 0, 0], "contended": [0] * 5}
    ).astype(bool)
    points["replicas"] = [1, 2, 4, 8, 16]
    assert [list(stretch["replicas"]) for stretch in scaling.runs_of_line(points)] == [
        [1, 2],
        [8, 16],
    ]


def test_parts_of_a_rank_add_up_to_its_wall_time():
    split = _material().split
    assert split[list(ranks.PARTS)].sum(axis=1).to_numpy() == pytest.approx(1.0, abs=0.02)


def test_the_worker_that_waits_for_a_straggler_is_blocked_longer_when_synchronous():
    material = _material()
    rows = material.split.merge(material.names, on="cell_id", suffixes=("", "_cell"))
    other = rows[
        (rows["straggler_cell"] != "") & (rows["role"] == "worker") & (rows["straggler"] == 1)
    ]
    blocked = other.set_index("strategy")["blocked"]
    assert (
        blocked["synchronous/parameter_server"]
        > 0.7
        > 0.2
        > blocked["asynchronous/parameter_server"]
    )


def test_staleness_shares_add_up_to_one_and_a_value_that_never_occurred_is_left_out():
    pooled = _material().staleness
    assert pooled.groupby("cell_id")["center"].sum().to_numpy() == pytest.approx(1.0)
    assert (pooled["high"] > 0).all()


def test_cells_are_told_apart_by_what_differs_and_by_nothing_else():
    cell = made.quick_cells()[3]
    other = dataclasses.replace(cell, options={**cell.options, "asynchronous": {"lock": "none"}})
    names = describe([cell, other, dataclasses.replace(cell, replicas=8)])
    assert list(names["variant"]) == ["lock=exclusive", "lock=none", "lock=exclusive"]
    assert set(describe(made.quick_cells())["variant"]) == {""}


def test_selection_names_every_absence_and_keeps_stale_and_foreign_runs_apart():
    cells = made.quick_cells()
    runs = made.quick_runs()
    stale = dataclasses.replace(
        runs[0], code_id="old", run_id="20250101T000000Z-old", started_at="2025-01-01T00:00:00Z"
    )
    foreign = dataclasses.replace(
        runs[0], machine="other", run_id="20250101T000000Z-for", started_at="2025-01-01T00:00:00Z"
    )
    again = dataclasses.replace(runs[0], run_id="20990101T000000Z-new")
    chosen = select(cells, (0, 1, 2), [*runs, stale, foreign, again])
    words = sorted(absence.status for absence in chosen.absent)
    assert words == ["failed", "not run", "timeout", "unsupported"]
    assert chosen.stale == (stale,) and chosen.elsewhere == (foreign,) and chosen.repeats == 1
    assert len(chosen.runs) == 47 and again in chosen.runs and runs[0] not in chosen.runs


def test_with_new_code_every_run_is_stale_and_every_cell_not_run():
    cells = made.quick_cells()
    chosen = select(cells, (0,), made.quick_runs((0,)), code_ids={cell.id: "new" for cell in cells})
    assert not chosen.runs and {absence.status for absence in chosen.absent} == {"not run"}
    assert len(chosen.stale) == len(made.quick_runs((0,)))


def test_an_ok_run_is_preferred_to_a_later_failure():
    cell = made.quick_cells()[0]
    good = made.make_run(cell, 0)
    bad = dataclasses.replace(
        good, status=Status.FAILED, reason="x", run_id="2099", started_at="2099-01-01T00:00:00Z"
    )
    assert select([cell], (0,), [good, bad]).runs == (good,)
