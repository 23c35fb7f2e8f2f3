"""Compute times: distributions with the mean and spread they claim, streams that are functions of
their keys alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchsuite import rules
from benchsuite.errors import UsageError
from benchsuite.plan import compute_time
from benchsuite.plan.cell import Cell, resolve
from benchsuite.virtual.streams import BLOCK, LONGEST_NS, ComputeTimes

# kind -> (parameters, coefficient of variation)
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "fixed": ({}, 0.0),
    "exponential": ({}, 1.0),
    "shifted_exponential": ({"shift": 0.75}, 0.25),
    "gamma": ({"cv": 0.1}, 0.1),
    "log_normal": ({"cv": 0.5}, 0.5),
    "pareto": ({"shape": 5.0}, 1 / np.sqrt(15.0)),
    # a share of 1/5 slow, 5 times as long: values 5/9 and 25/9
    "markov": ({"slow_factor": 5.0, "enter": 0.05, "leave": 0.2}, 8 / 9),
    "resampled": ({"values_s": "1.0 2.0 3.0 6.0"}, np.std([1, 2, 3, 6]) / 3),
}


def drawn(
    kind: str, count: int = 200_000, *, seed: int = 0, workers: int = 8, **more: Any
) -> np.ndarray[Any, Any]:
    times = ComputeTimes(
        {"kind": kind, "mean_s": 2.0, **KINDS[kind][0]}, seed=seed, samples=1, **more
    )
    return (
        np.array(
            [
                [times.ns(worker, step) for step in range(count // workers)]
                for worker in range(workers)
            ]
        )
        / 1e9
    )


def test_every_kind_is_tested() -> None:
    assert set(KINDS) == set(compute_time.KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_spread_are_what_the_table_says(kind: str) -> None:
    times = drawn(kind)
    cv = KINDS[kind][1]
    assert times.mean() == pytest.approx(2.0, rel=0.03), f"mean {times.mean():.4f} s, 2 s claimed"
    assert times.std() / times.mean() == pytest.approx(cv, rel=0.06, abs=1e-12), (
        f"cv {times.std() / times.mean():.4f}, {cv:.4f}"
    )


def test_slow_spells_last_as_long_as_their_chances_say() -> None:
    slow = drawn("markov", workers=1)[0] > 2.0
    assert slow.mean() == pytest.approx(0.2, rel=0.1), "enter / (enter + leave)"
    changes = np.flatnonzero(np.diff(slow.astype(int)) == 1)
    spells = slow.sum() / len(changes)
    assert spells == pytest.approx(5.0, rel=0.1), "1 / leave steps"


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_depends_on_seed_worker_and_step_alone(kind: str) -> None:
    first = drawn(kind, 4 * BLOCK, workers=2)
    assert np.array_equal(first, drawn(kind, 4 * BLOCK, workers=2)), "again"
    assert np.array_equal(first, drawn(kind, 8 * BLOCK, workers=4)[:2]), "beside other workers"
    if kind not in ("fixed",):
        assert not np.array_equal(first[0], first[1]), "workers have streams of their own"
        assert not np.array_equal(first, drawn(kind, 4 * BLOCK, workers=2, seed=1)), "seeds too"


def test_strategies_meet_the_same_draws() -> None:
    """Two cells with the same seed and other strategies: the k-th gradient of a worker takes the
    same time in both."""
    from benchsuite.virtual.world import simulate

    def compute(sync: str, topology: str) -> list[list[int]]:
        cell = resolve(
            Cell(
                workload="mlp",
                preset="smoke",
                sync=sync,
                topology=topology,
                replicas=4,
                clock="virtual",
                compute_time={"kind": "gamma", "cv": 0.5},
                gradients="none",
                batch_mode="fixed_per_worker",
            )
        )
        return [record["steps"]["compute_ns"] for record in simulate(cell, "unused").records[:4]]

    for mine, theirs in zip(
        compute("synchronous", "ring"), compute("asynchronous", "parameter_server"), strict=True
    ):
        shared = min(len(mine), len(theirs))
        assert shared > 40 and mine[:shared] == theirs[:shared]


def test_a_straggler_takes_its_factor_and_the_mean_follows_the_batch_as_measured() -> None:
    plain = drawn("gamma", 4 * BLOCK)
    slowed = drawn("gamma", 4 * BLOCK, factors={3: 4.0})
    assert np.allclose(slowed[3], 4 * plain[3], rtol=1e-8) and np.array_equal(slowed[:3], plain[:3])
    table = {"kind": "fixed", "overhead_s": 0.001, "per_sample_s": 0.0001}
    assert [ComputeTimes(table, seed=0, samples=n).ns(0, 0) for n in (1, 16, 64)] == [
        1_100_000,
        2_600_000,
        7_400_000,
    ]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "gama", "cv": 0.1}, "did you mean 'gamma'"),
        ({"kind": "gamma"}, "kind = gamma without cv"),
        ({"kind": "gamma", "cv": 0.0}, "cv = 0.0 of kind = gamma: set cv to a number above 0"),
        ({"kind": "pareto", "shape": 1.0}, "above 1 \\(or there is no mean\\)"),
        ({"kind": "markov", "slow_factor": 4, "enter": 1.5, "leave": 0.1}, "enter = 1.5"),
        ({"kind": "fixed", "mean_s": -1.0}, "mean_s = -1.0: seconds, above 0"),
        ({"kind": "fixed", "mean_s": 1.0, "overhead_s": 0.1, "per_sample_s": 0.1}, "two means"),
        ({"kind": "fixed", "overhead_s": 0.1}, "overhead_s without per_sample_s"),
        ({"kind": "fixed", "cv": 0.1}, "unknown compute_time key 'cv' of fixed"),
        ({"kind": "resampled"}, "needs measured times"),
        ({"kind": "resampled", "values_s": "1 x"}, "could not convert"),
        ({"kind": "resampled", "values_s": "1 -2"}, "at least one positive number"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused_with_a_remedy(
    table: dict[str, Any], said: str
) -> None:
    cell = Cell(
        workload="mlp",
        sync="asynchronous",
        topology="parameter_server",
        clock="virtual",
        compute_time=table,
    )
    text = "; ".join(f"{problem.reason}: {problem.remedy}" for problem in rules.validate(cell))
    assert re.search(said, text), text


def test_measured_times_are_read_into_the_cell(tmp_path: Path) -> None:
    run = tmp_path / "run.json"
    text = tmp_path / "times.txt"
    run.write_text(json.dumps({"raw": {"compute_s": [[0.011, 0.012], [0.013]]}}))
    text.write_text("0.011\n0.012 0.013\n")
    cells = [
        resolve(
            Cell(
                workload="mlp",
                clock="virtual",
                compute_time={"kind": "resampled", "path": str(path)},
            )
        )
        for path in (run, text)
    ]
    assert cells[0].compute_time == {
        "kind": "resampled",
        "values_s": "0.011000000 0.012000000 0.013000000",
    }
    assert cells[0].id == cells[1].id, "the id is of the values, not of where they stood"
    times = ComputeTimes(cells[0].compute_time, seed=0, samples=1)
    assert {times.ns(0, step) for step in range(200)} == {11_000_000, 12_000_000, 13_000_000}
    for content in ("", "{}", "eleven", '{"raw": {"compute_s": []}}'):
        text.write_text(content)
        with pytest.raises(UsageError, match="holds no measured compute times"):
            resolve(
                Cell(
                    workload="mlp",
                    clock="virtual",
                    compute_time={"kind": "resampled", "path": str(text)},
                )
            )
    with pytest.raises(UsageError, match="cannot be read"):
        resolve(
            Cell(
                workload="mlp",
                clock="virtual",
                compute_time={"kind": "resampled", "path": "nowhere"},
            )
        )


def test_a_time_beyond_64_bits_is_the_longest_never_none() -> None:
    times = ComputeTimes({"kind": "fixed", "mean_s": 1e5}, seed=0, samples=1.0, factors={0: 1e12})
    assert times.ns(0, 0) == LONGEST_NS
