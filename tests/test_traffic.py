"""Predicted, payload and wire bytes per step, their law and their ratio."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from benchsuite.analysis.cells import describe
from benchsuite.analysis.traffic import PER_STEP, traffic
from benchsuite.results.columns import row
from benchsuite.results.record import Run
from tests import synthetic_runs as made

CELLS = made.quick_cells()


def _table(runs: list[Run]) -> pd.DataFrame:
    table = traffic(pd.DataFrame([row(run) for run in runs]), describe([run.cell for run in runs]))
    return table.set_index(["series", "replicas"])


def _cell(strategy: str, replicas: int) -> int:
    names = describe(CELLS)
    found = names[
        (names["series"] == strategy) & (names["replicas"] == replicas) & (names["straggler"] == "")
    ]
    return int(found["order"].iloc[0])


def test_bytes_per_step_follow_the_topologies():
    m = made.VECTOR_BYTES
    runs = [
        made.make_run(CELLS[_cell(s, 4)], 0)
        for s in ("synchronous/ring", "synchronous/parameter_server")
    ]
    runs.append(made.make_run(CELLS[_cell("asynchronous/parameter_server", 4)], 0))
    table = _table(runs)
    assert table.loc[("synchronous/ring", 4), "payload_bytes_per_step"].center == 2 * 3 * m
    assert table.loc[("synchronous/ring", 4), "busiest_port_bytes_per_step"].center == 2 * 3 / 4 * m
    assert (
        table.loc[("synchronous/parameter_server", 4), "payload_bytes_per_step"].center == 2 * 4 * m
    )
    asynchronous = table.loc[("asynchronous/parameter_server", 4)]
    assert (
        asynchronous["payload_bytes_per_step"].center == 2 * m
    )  # per update, which is 1/4 of a step
    assert asynchronous["payload_bytes_per_sample"].center == pytest.approx(2 * 4 * m / made.BATCH)


def test_the_law_holds_for_counted_rows_breaks_by_one_byte_and_says_nothing_of_derived_ones():
    good = made.make_run(CELLS[_cell("synchronous/ring", 2)], 0)
    assert _table([good]).loc[("synchronous/ring", 2), "law"] == "holds"
    wrong = dataclasses.replace(
        good, result={**good.result, "payload_bytes": good.result["payload_bytes"] + 1}
    )
    assert _table([wrong]).loc[("synchronous/ring", 2), "law"] == "broken"
    derived = made.make_run(CELLS[_cell("synchronous/native", 2)], 0)
    assert _table([derived]).loc[("synchronous/native", 2), "law"] == ""


def test_the_wire_ratio_counts_control_bytes_and_is_missing_without_a_wire_or_a_payload():
    run = made.make_run(CELLS[_cell("synchronous/parameter_server", 2)], 0)
    cost = {**run.cost, "wire_bytes": 2 * (run.result["payload_bytes"] + run.cost["control_bytes"])}
    ratio = _table([dataclasses.replace(run, cost=cost)]).loc[
        ("synchronous/parameter_server", 2), "wire_ratio"
    ]
    assert ratio.center == 2.0
    unseen = made.make_run(CELLS[_cell("synchronous/native", 4)], 0)  # wire_bytes is null
    silent = made.make_run(CELLS[_cell("synchronous/ring", 1)], 0)  # nothing is sent
    table = _table([unseen, silent])
    assert [summary.n for summary in table["wire_ratio"]] == [0, 0]


@pytest.mark.parametrize(
    ("payload", "flags", "law", "num_counted"),
    [
        ([800, 800], ["", "contended"], "holds", 2),
        ([800, 804], ["", ""], "broken", 2),
        ([800, None], ["", ""], "broken", 2),  # a payload that is missing is no proof
        ([800, None], ["", "lost_worker,oversubscribed"], "holds", 1),
        ([None, None], ["lost_worker", "lost_worker"], "", 0),
    ],
)
def test_the_law_is_held_against_runs_that_are_whole(
    payload: list[int | None], flags: list[str], law: str, num_counted: int
) -> None:
    predicted = [None if "lost" in flag else 800 for flag in flags]
    runs = pd.DataFrame(
        {
            "cell_id": ["c", "c"],
            "flags": pd.array(flags, dtype="string"),
            "payload_source": ["counted", "counted"],
            "predicted_bytes": pd.array(predicted, dtype="Int64"),
            "payload_bytes": pd.array(payload, dtype="Int64"),
            "control_bytes": 0,
            "wire_bytes": 900,
            "payload_bytes_per_sample": 1.0,
        }
        | dict.fromkeys(PER_STEP, 1.0)
    )
    (row,) = traffic(runs, pd.DataFrame({"cell_id": ["c"]})).to_dict("records")
    assert (row["law"], row["num_counted"]) == (law, num_counted)
