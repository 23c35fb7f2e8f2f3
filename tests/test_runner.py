"""The run loop: refused once, failed and on, interrupted and resumed, blocks of one seed in random
order."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from pathlib import Path

import pytest

from benchsuite.plan.cell import Cell
from benchsuite.report.text import duration
from benchsuite.results.record import Run, Status
from benchsuite.results.store import Store, StoreError
from benchsuite.running.progress import Lines
from benchsuite.running.runner import Tally, interleaved, run_cells
from benchsuite.running.setting import Setting

SETTING = Setting(machine="m", environment_id="e", code_id=lambda cell: "code", rules_id="rules")
CELLS = [Cell(replicas=n, seed=seed) for seed in (0, 1) for n in (1, 2, 4)]


def finished(cell: Cell, status: Status = Status.OK) -> Run:
    return Run(
        cell=cell, code_id="code", status=status, machine="m", reason="why", cost={"wall_s": 2.0}
    )


def fails_at_two_workers(cell: Cell) -> Run:
    return finished(cell, Status.FAILED if cell.replicas == 2 else Status.OK)


def test_what_is_stored_is_not_run_again_unless_fresh(tmp_path: Path) -> None:
    store = Store(tmp_path)
    launched = Counter[str]()

    def launch(cell: Cell) -> Run:
        launched[cell.label] += 1
        return finished(cell)

    first, second = (run_cells(CELLS, store, setting=SETTING, launch=launch) for _ in range(2))
    assert (first.counts[Status.OK], first.stored, first.exit_code) == (6, 0, 0)
    assert (second.counts[Status.OK], second.stored, second.exit_code) == (0, 6, 0)
    assert (
        run_cells(CELLS, store, setting=SETTING, launch=launch, fresh=True).counts[Status.OK] == 6
    )
    assert launched.total() == 12


def test_a_failed_cell_is_recorded_the_rest_runs_and_it_is_tried_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tally = run_cells(CELLS, store, setting=SETTING, launch=fails_at_two_workers)
    assert (tally.counts[Status.OK], tally.num_failed, tally.exit_code) == (4, 2, 4)
    assert len(tally.failures) == 2 and "why" in tally.failures[0]
    again = run_cells(CELLS, store, setting=SETTING, launch=finished)
    assert (again.counts[Status.OK], again.stored) == (2, 4)


def test_a_refused_cell_becomes_one_unsupported_row_and_is_never_launched(tmp_path: Path) -> None:
    store = Store(tmp_path)
    refused = [(Cell(topology="ring", sync="asynchronous"), "a ring is a collective: use ..")]
    for _ in range(2):
        run_cells(
            [],
            store,
            setting=SETTING,
            launch=lambda cell: pytest.fail("launched"),
            refused=refused,
            fresh=True,
        )
    (run,) = store.runs()
    assert (run.status, run.reason) == (Status.UNSUPPORTED, refused[0][1])


def test_an_interrupt_keeps_finished_runs_and_the_next_command_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def launch(cell: Cell) -> Run:
        if len(store.runs()) == 2:
            raise KeyboardInterrupt
        return finished(cell)

    tally = run_cells(CELLS, store, setting=SETTING, launch=launch)
    assert (tally.interrupted, tally.exit_code, tally.counts[Status.OK]) == (True, 130, 2)
    assert run_cells(CELLS, store, setting=SETTING, launch=finished).counts[Status.OK] == 4
    assert len(store.runs()) == 6


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_launched(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        run_cells(
            CELLS,
            Store(tmp_path / "file"),
            setting=SETTING,
            launch=lambda cell: pytest.fail("launched"),
        )


def test_blocks_of_one_seed_in_an_order_that_its_seed_fixes() -> None:
    cells = [Cell(replicas=n, seed=seed) for seed in (5, 1) for n in range(1, 9)]
    orders = [[(c.seed, c.replicas) for c in interleaved(cells, order)] for order in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert [seed for seed, _ in orders[0]] == [5] * 8 + [1] * 8
    assert sorted(orders[0]) == sorted((c.seed, c.replicas) for c in cells)
    assert [n for seed, n in orders[0] if seed == 5] != [n for seed, n in orders[0] if seed == 1]


def test_the_order_is_recorded_with_every_run(tmp_path: Path) -> None:
    run_cells(CELLS, Store(tmp_path), setting=SETTING, launch=finished)
    orders = [run.extra["order"] for run in Store(tmp_path).runs()]
    assert len({order["seed"] for order in orders}) == 1
    assert sorted(order["position"] for order in orders) == list(range(6))


def test_progress_is_plain_lines_with_the_remaining_time_where_the_stream_is_no_terminal(
    tmp_path: Path,
) -> None:
    stream = io.StringIO()
    run_cells(
        CELLS[:3],
        Store(tmp_path),
        setting=SETTING,
        launch=fails_at_two_workers,
        progress=Lines(stream),
    )
    lines = stream.getvalue().splitlines()
    assert lines[0] == "3 to run, 0 stored, 0 refused"
    assert "seed 0: " in lines[1] and lines[1].startswith("[1/3] ") and lines[1].endswith(" left")
    assert any(line.endswith("failed, why") or "failed, why, " in line for line in lines)
    assert "\x1b" not in stream.getvalue()


def test_exit_codes() -> None:
    tally = Tally()
    assert tally.exit_code == 0
    tally.counts[Status.TIMEOUT] = 1
    assert tally.exit_code == 4
    assert dataclasses.replace(tally, interrupted=True).exit_code == 130


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (None, 0.4, 59, 200, 7500)] == [
        "unknown",
        "0 s",
        "59 s",
        "3 min 20 s",
        "2 h 5 min",
    ]


def test_a_refused_cell_is_said_on_stderr_once_whatever_the_number_of_seeds(tmp_path: Path) -> None:
    cell = Cell(topology="ring", sync="asynchronous")
    stream = io.StringIO()
    refused = [(cell.with_seed(seed), "a ring is a collective: use ..") for seed in (0, 1)]
    run_cells(
        [],
        Store(tmp_path),
        setting=SETTING,
        launch=lambda _: pytest.fail("launched"),
        refused=refused,
        progress=Lines(stream),
    )
    assert (
        stream.getvalue().count(
            "unsupported: cnn asynchronous ring N=1: a ring is a collective: use .."
        )
        == 1
    )


def test_a_refusal_of_other_rules_does_not_stand_for_a_run(tmp_path: Path) -> None:
    """A cell that this version refuses is run by the version that no longer does."""
    store = Store(tmp_path)
    cell = Cell(replicas=2)
    run_cells(
        [],
        store,
        setting=SETTING,
        launch=lambda _: pytest.fail("launched"),
        refused=[(cell, "not built")],
    )
    tally = run_cells([cell], store, setting=SETTING, launch=finished)
    assert tally.counts[Status.OK] == 1
