"""`export csv`: one row per run, the stated columns, nulls empty, integers as integers; series with
one row per point."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path

import pytest

from benchsuite.cli import main
from benchsuite.results import export
from benchsuite.results.columns import COLUMNS
from benchsuite.results.record import Status
from benchsuite.results.store import Store
from tests.synthetic_runs import quick_runs
from tests.test_store import STATED_COLUMNS
from tests.virtual_runs import cell, stored


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "results")
    for run in quick_runs(seeds=(0, 1)):
        store.write(dataclasses.replace(run, cell_id=run.cell.id))
    return store


def rows(store: Store) -> list[dict[str, str]]:
    stream = io.StringIO()
    export.csv(store, stream)
    return list(csv.DictReader(io.StringIO(stream.getvalue())))


def test_one_row_per_run_with_the_stated_columns(store: Store) -> None:
    table = rows(store)
    assert list(table[0]) == STATED_COLUMNS == list(COLUMNS)
    assert len(table) == len(store.runs()) > 0
    assert [row["run_id"] for row in table] == sorted(row["run_id"] for row in table)


def test_every_field_reads_back_in_its_type_and_a_null_is_empty(store: Store) -> None:
    readers = {
        "int": int,
        "float": float,
        "bool": {"true": True, "false": False}.__getitem__,
        "str": str,
    }
    for text, row in zip(rows(store), store.rows(), strict=True):
        for name, kind in COLUMNS.items():
            value = None if text[name] == "" else readers[kind](text[name])
            assert value == (None if row[name] in (None, "") else row[name]), (
                name,
                text[name],
                row[name],
            )


def test_bytes_per_step_are_the_totals_over_the_steps(store: Store) -> None:
    runs = {run.run_id: run for run in store.runs()}
    for row in store.rows():
        if row["status"] == Status.OK:
            steps = runs[row["run_id"]].result["steps"]
            assert row["payload_bytes_per_step"] * steps == pytest.approx(
                row["payload_bytes"], rel=1e-12
            )
            assert row["predicted_bytes_per_step"] * steps == pytest.approx(
                row["predicted_bytes"], rel=1e-12
            )


def test_the_frame_and_the_csv_agree(store: Store) -> None:
    frame = store.frame()
    for text, (_, values) in zip(rows(store), frame.iterrows(), strict=True):
        assert text["run_id"] == values.run_id and text["payload_bytes"] == (
            "" if values.isna().payload_bytes else str(values.payload_bytes)
        )


def test_series_have_one_row_per_point_and_name_their_run(store: Store, tmp_path: Path) -> None:
    paths = export.series(store, tmp_path / "series")
    assert [path.name for path in paths] == [
        "curves.csv",
        "step_times.csv",
        "staleness.csv",
        "ranks.csv",
    ]
    tables = {path.stem: list(csv.DictReader(path.open())) for path in paths}
    runs = store.runs()
    assert len(tables["ranks"]) == sum(len(run.cost.get("ranks", ())) for run in runs)
    losses = [row for row in tables["curves"] if row["quantity"] == "loss"]
    assert len(losses) == sum(len(run.result.get("loss", ())) for run in runs)
    updates = sum(int(row["updates"]) for row in tables["staleness"])
    histograms = [(run.result.get("staleness") or {}).get("histogram", {}) for run in runs]
    assert updates == sum(sum(histogram.values()) for histogram in histograms) > 0
    known = {run.run_id for run in runs}
    assert all(row["run_id"] in known for table in tables.values() for row in table)


def test_seconds_of_a_series_are_those_of_the_clock_beside_them(
    store: Store, tmp_path: Path
) -> None:
    run = stored(cell("asynchronous", 2), tmp_path)
    store.write(run)
    tables = {
        path.stem: list(csv.DictReader(path.open()))
        for path in export.series(store, tmp_path / "series")
    }
    for name, table in tables.items():
        mine = [row for row in table if row["clock"] == "virtual"]
        assert mine and {row["run_id"] for row in mine} == {run.run_id}, name
        assert {row["clock"] for row in table} == {"wall", "virtual"}, name
    virtual = [row for row in tables["ranks"] if row["clock"] == "virtual"]
    assert len(virtual) == 3 and all(
        row["wall_s"] == "" and float(row["virtual_s"]) > 0 for row in virtual
    )
    assert all(row["virtual_s"] == "" for row in tables["ranks"] if row["clock"] == "wall")


def test_the_verb_writes_a_file_and_standard_output_alike(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.csv"
    assert main.main(["export", "csv", "--results", str(store.root), "--out", str(out)]) == 0
    assert main.main(["export", "csv", "--results", str(store.root)]) == 0
    assert capsys.readouterr().out == out.read_text()


def test_a_folder_that_is_not_there_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["export", "csv", "--results", str(tmp_path / "no")]) == 2
    assert "no such results folder" in capsys.readouterr().err
