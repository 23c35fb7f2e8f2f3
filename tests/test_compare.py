"""`compare`: passes against itself; fails when a payload or a loss differs, and names cell, metric
and both numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from benchsuite.analysis.regression import Comparison, compare
from benchsuite.plan.cell import Cell
from benchsuite.report.comparison import table
from benchsuite.results.record import Run, Status
from benchsuite.results.store import Store
from benchsuite.rules import plans
from benchsuite.running import api
from tests.test_store import SCHEMA

SYNCHRONOUS = Cell(preset="smoke", topology="ring", replicas=2, precision="fp64")
ASYNCHRONOUS = Cell(preset="smoke", sync="asynchronous", topology="parameter_server", replicas=2)


def a_run(cell: Cell = SYNCHRONOUS, **result: Any) -> Run:
    values = {
        "num_parameters": 10,
        "samples": 64,
        "steps": 3,
        "updates": 3,
        "loss": [2.5, 1.25, 1.0],
        "final_loss": 1.0,
        "predicted_bytes": 480,
        "payload_bytes": 480,
        "shm_bytes": 0,
        "messages": 12,
        "samples_to": {"target": None},
        "events": {"pushes": [2, 1]} if cell is ASYNCHRONOUS else {},
        "staleness": {"mean": 1.0, "max": 2} if cell is ASYNCHRONOUS else None,
    }
    run = Run(
        cell=cell,
        code_id="c",
        status=Status.OK,
        machine="m",
        run_id="r",
        started_at="1",
        result=values | result,
    )
    return dataclasses.replace(run, cell_id=cell.id)


def compared(base: list[Run], head: list[Run], *, same: bool = True, **options: Any) -> Comparison:
    return compare(base, head, same_build=lambda a, b: same, **options)


def failing(comparison: Comparison) -> list[tuple[str, Any, Any, str]]:
    return [
        (f.metric, f.base, f.head, f.verdict)
        for f in comparison.findings
        if f.verdict in ("differs", "missing")
    ]


def test_runs_of_older_code_are_compared() -> None:
    """`code_id` says which runs are missing; a comparison is there to hold two versions of the code together."""
    older = dataclasses.replace(a_run(), code_id="older")
    assert compared([older], [a_run()]).exit_code == 0
    assert failing(compared([older], [a_run(payload_bytes=481)])) != []


def test_a_set_passes_against_itself() -> None:
    runs = [a_run(), a_run(ASYNCHRONOUS)]
    for same in (True, False):
        comparison = compared(runs, runs, same=same)
        assert comparison.exit_code == 0 and failing(comparison) == []
        assert {f.cell_id for f in comparison.findings} == {SYNCHRONOUS.id, ASYNCHRONOUS.id}


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    "metric", ["payload_bytes", "predicted_bytes", "messages", "samples", "updates"]
)
def test_a_count_that_differs_by_one_fails_on_every_machine(metric: str, same: bool) -> None:
    base = a_run()
    head = a_run(**{metric: base.result[metric] + 1})
    comparison = compared([base], [head], same=same)
    assert comparison.exit_code == 1
    assert failing(comparison) == [
        (metric, base.result[metric], base.result[metric] + 1, "differs")
    ]


def test_a_loss_is_compared_exactly_on_the_same_build_and_names_its_step() -> None:
    head = a_run(loss=[2.5, 1.2500000000000002, 1.0])
    assert failing(compared([a_run()], [head])) == [
        ("loss at step 1", 1.25, 1.2500000000000002, "differs")
    ]
    assert compared([a_run()], [head], same=False).exit_code == 0


def test_elsewhere_a_loss_has_the_stated_tolerance_of_its_precision() -> None:
    for precision, inside, outside in (("fp64", 1e-9, 1e-7), ("fp32", 5e-4, 2e-3)):
        cell = dataclasses.replace(SYNCHRONOUS, precision=precision)
        close, far = (a_run(cell, final_loss=1.0 + change) for change in (inside, outside))
        assert compared([a_run(cell)], [close], same=False).exit_code == 0
        assert failing(compared([a_run(cell)], [far], same=False)) == [
            ("final_loss", 1.0, 1.0 + outside, "differs")
        ]
        assert compared([a_run(cell)], [far], loss_tolerance=1e-2).exit_code == 0


def test_a_loss_that_is_not_finite_is_not_close_to_a_number() -> None:
    comparison = compared([a_run()], [a_run(loss=[2.5, None, 1.0])], same=False)
    assert failing(comparison) == [("loss at step 1", 1.25, None, "differs")]


def test_of_an_asynchronous_cell_only_timing_free_counts_are_compared() -> None:
    base = a_run(ASYNCHRONOUS)
    other = a_run(
        ASYNCHRONOUS,
        loss=[9.0],
        final_loss=9.0,
        events={"pushes": [1, 2]},
        samples_to={"target": 64},
    )
    assert compared([base], [other]).exit_code == 0
    assert failing(compared([base], [a_run(ASYNCHRONOUS, events={"pushes": [2, 2]})])) == [
        ("pushes", 3, 4, "differs")
    ]
    assert failing(compared([base], [a_run(ASYNCHRONOUS, payload_bytes=481)])) == [
        ("payload_bytes", 480, 481, "differs")
    ]


def test_virtual_seconds_staleness_and_losses_of_a_virtual_asynchronous_cell_are_compared() -> None:
    cell = dataclasses.replace(ASYNCHRONOUS, clock="virtual", precision="fp64")

    def run(virtual_s: float = 0.25, stale: float = 1.0, **result: Any) -> Run:
        made = a_run(cell, staleness={"mean": stale}, events={"pushes": [2, 1]}, **result)
        return dataclasses.replace(made, cost={"virtual_s": virtual_s})

    assert compared([run()], [run()], same=False).exit_code == 0
    for same in (True, False):
        assert failing(compared([run()], [run(0.250000001)], same=same)) == [
            ("virtual_s", 0.25, 0.250000001, "differs")
        ]
        assert failing(compared([run()], [run(stale=1.5)], same=same)) == [
            ("staleness", 1.0, 1.5, "differs")
        ]
        assert failing(compared([run()], [run(updates=4)], same=same)) == [
            ("updates", 3, 4, "differs")
        ]
        assert failing(compared([run()], [run(final_loss=1.1)], same=same)) == [
            ("final_loss", 1.0, 1.1, "differs")
        ]


def test_a_missing_cell_fails_and_a_new_one_does_not() -> None:
    assert failing(compared([a_run()], [])) == [("run", "r", None, "missing")]
    new = compared([], [a_run()])
    assert (new.exit_code, [f.verdict for f in new.findings]) == (0, ["new"])


def test_a_run_that_failed_in_head_fails() -> None:
    head = dataclasses.replace(a_run(), status=Status.FAILED, reason="rank 1 was killed")
    assert failing(compared([a_run()], [head])) == [("status", "ok", "failed", "differs")]


def test_the_newest_ok_run_speaks() -> None:
    failed = dataclasses.replace(a_run(), status=Status.FAILED, started_at="3")
    older = dataclasses.replace(a_run(payload_bytes=1), started_at="0")
    assert compared([a_run()], [older, a_run(), failed]).exit_code == 0


def test_another_choice_of_tuning_is_named_and_only_where_it_does_not_depend_on_timing() -> None:
    for cell, verdict in ((SYNCHRONOUS, "differs"), (ASYNCHRONOUS, "not compared")):
        pair = [a_run(cell, tuning={"lr_factor": factor}) for factor in (0.5, 1.0)]
        (found,) = (
            f for f in compared(pair[:1], pair[1:]).findings if f.metric == "tuned_lr_factor"
        )
        assert (found.base, found.head, found.verdict) == (0.5, 1.0, verdict)
        assert compared(pair[:1], pair[:1]).exit_code == 0
    assert all(f.metric != "tuned_lr_factor" for f in compared([a_run()], [a_run()]).findings)


def test_the_table_is_as_committed() -> None:
    comparison = compared(
        [a_run(), a_run(ASYNCHRONOUS)], [a_run(payload_bytes=500), a_run(ASYNCHRONOUS)], same=False
    )
    golden = Path(__file__).parent / "golden" / "compare.txt"
    assert table(comparison) + "\n" == golden.read_text()
    assert json.loads(json.dumps(comparison.to_json()))["verdict"] == "regression"


def test_the_committed_reference_is_what_its_plan_asks_for_and_passes_against_itself() -> None:
    """Where the first line fails, a cell has got another identity: `make reference`, and say why in
    the commit."""
    reference = Path(__file__).parent.parent / "results" / "reference"
    runs = Store(reference).runs()
    assert {run.cell_id for run in runs} == {cell.id for cell in plans.load("reference").cells}
    assert all(run.cell.id == run.cell_id and run.status == Status.OK for run in runs)
    for run in runs:
        jsonschema.validate(run.to_json(), SCHEMA)
        assert Store(reference).environment(run.machine, run.environment_id)["commit"]
    assert api.compare(reference, reference).exit_code == 0
