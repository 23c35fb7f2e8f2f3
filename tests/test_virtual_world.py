"""Cells in virtual time: they repeat byte for byte, are timed again without training, and follow
theory where it is known."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from benchsuite import rules
from benchsuite.plan.cell import Budget, Cell, identity, resolve, trajectory_key
from benchsuite.results.columns import row
from benchsuite.results.record import Run, Status, dumps
from benchsuite.rules import plans
from benchsuite.virtual import world
from benchsuite.virtual.world import Kept, SimulationError, simulate
from tests.bench import ROOT, TINY
from tests.test_store import SCHEMA
from tests.virtual_runs import run

QUADRATIC = str(Path(__file__).parent / "workloads" / "quadratic.py")
GAMMA = {"kind": "gamma", "mean_s": 0.01, "cv": 0.3}
SERVER = {"topology": "parameter_server"}
WAYS: list[dict[str, Any]] = [
    {"sync": "synchronous", "topology": "ring"},
    {"sync": "synchronous", "topology": "native"},
    {"sync": "synchronous", **SERVER, "servers": 2},
    {"sync": "asynchronous", **SERVER},
    {"sync": "k_sync", **SERVER},
    {"sync": "k_sync", **SERVER, "options": {"k_sync": {"late": "cancel"}}},
    {"sync": "k_sync", **SERVER, "options": {"k_sync": {"wait": False, "batch": True}}},
]


def cell(workload: str = TINY, **fields: Any) -> Cell:
    fields = {
        "replicas": 3,
        "compute_time": GAMMA,
        "link_mbit": 100.0,
        "link_latency_us": 50.0,
        **fields,
    }
    made = resolve(Cell(workload=workload, clock="virtual", **fields))
    assert rules.validate(made) == []
    return made


def named(way: dict[str, Any]) -> str:
    return "-".join(map(str, way.values()))


@pytest.mark.parametrize("way", WAYS, ids=named)
def test_a_cell_repeats_byte_for_byte_whatever_order_its_ranks_are_started_in(
    way: dict[str, Any], tmp_path: Path
) -> None:
    made = cell(**way)
    texts = [dumps(run(made, tmp_path)[0])]
    texts.append(dumps(run(made, tmp_path)[0]))
    texts.append(dumps(run(made, tmp_path, start_order=range(made.world_size)[::-1])[0]))
    assert texts[0] == texts[1] == texts[2]
    assert dumps(run(made.with_seed(1), tmp_path)[0]) != texts[0]


@pytest.mark.parametrize("way", WAYS, ids=named)
def test_a_run_file_of_it_is_whole(way: dict[str, Any], tmp_path: Path) -> None:
    made = cell(**way)
    result, cost, raw = run(made, tmp_path)
    stored = Run(
        cell=made,
        code_id="c",
        status=Status.OK,
        result=result,
        cost=cost,
        raw=raw,
        machine="m",
        cell_id=made.id,
        started_at="2026-01-01T00:00:00Z",
    )
    jsonschema.validate(json.loads(dumps(stored.to_json())), SCHEMA)
    values = row(Run.parse(json.loads(dumps(stored.to_json()))))
    assert values["provenance"] == "virtual" and values["clock"] == "virtual"
    assert (
        values["virtual_s"] > 0
        and values["virtual_samples_per_s"] > 0
        and values["virtual_step_time_s_median"] > 0
    )
    for name in (
        "wall_s",
        "samples_per_s",
        "step_time_s_median",
        "time_to_target_s",
        "cpu_s_per_sample",
        "wire_bytes",
    ):
        assert values[name] is None, (
            f"{name} = {values[name]!r}: wall and virtual seconds never share a column"
        )
    assert (
        values["predicted_bytes"] == values["payload_bytes"] and values["final_metric"] is not None
    )
    assert json.loads(values["compute_time"]) == GAMMA


def test_an_undisturbed_step_takes_its_gradient_and_its_transfer(tmp_path: Path) -> None:
    """Ring, N = 2, equal workers: 10 ms, then 2 rounds of alpha + half a vector at 1 Mbit/s."""
    made = cell(
        sync="synchronous",
        topology="ring",
        replicas=2,
        compute_time={"kind": "fixed", "mean_s": 0.01},
        link_mbit=1.0,
    )
    _, cost, _ = run(made, tmp_path)
    half = 4 * 293 * 8 / 1e6  # 585 parameters: chunks of 293 and 292
    assert cost["step_time_s_median"] == pytest.approx(0.01 + 2 * (50e-6 + half), rel=1e-3)
    assert cost["compute_s_median"] == 0.01


# -- timed again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS[:3], ids=named)
def test_a_synchronous_cell_is_trained_once_and_timed_again(
    way: dict[str, Any], tmp_path: Path
) -> None:
    kept = Kept()
    first = cell(**way)
    others = [
        cell(**{**way, **change})
        for change in (
            {"link_mbit": 1.0},
            {"compute_time": {"kind": "exponential", "mean_s": 0.02}},
            {"straggler": {0: 4.0}},
            {"link_mbit": None, "link_latency_us": None},
            {"receive_cost": {"copy_s_per_gib": 50.0}},
        )
    ]
    run(first, tmp_path, kept=kept)
    for other in others:
        assert trajectory_key(other) == trajectory_key(first) and other.id != first.id
        again = run(other, tmp_path, kept=kept)
        whole = run(other, tmp_path)
        assert again[1]["simulation"]["retimed"] and again[1]["simulation"]["gradients"] == 0
        assert not whole[1]["simulation"]["retimed"] and whole[1]["simulation"]["gradients"] > 0
        assert dumps(again[0]) == dumps(whole[0]), "the same result, byte for byte"
        for name in ("virtual_s", "time_to", "idle_share", "evaluation_s", "ranks"):
            assert again[1][name] == whole[1][name], name


@pytest.mark.parametrize(
    ("workload", "replicas"), [("mlp", 16), ("cnn", 4)]
)  # groups of these sizes round otherwise than one by one
@pytest.mark.parametrize("topology", ["parameter_server", "ring"])
def test_a_result_does_not_depend_on_what_was_trained_before_it(
    workload: str, replicas: int, topology: str, tmp_path: Path
) -> None:
    """fp32: gradients that come one by one in this world and together in another must not round
    apart."""
    fields = {
        "sync": "synchronous",
        "topology": topology,
        "replicas": replicas,
        "budget": Budget(steps=20),
    }
    made = [
        cell(
            workload, **fields, compute_time={"kind": "exponential", "mean_s": 0.01}, link_mbit=link
        )
        for link in (1000.0, 10.0)
    ]
    alone = [dumps(run(one, tmp_path)[0]) for one in made]
    for order in ((0, 1), (1, 0)):
        kept = Kept()
        for index in order:
            assert dumps(run(made[index], tmp_path, kept=kept)[0]) == alone[index], (
                f"order {order}, cell {index}"
            )


def test_what_depends_on_who_is_fast_is_never_timed_again(tmp_path: Path) -> None:
    for way in WAYS[3:]:
        assert trajectory_key(cell(**way)) is None
    assert trajectory_key(cell(**WAYS[0], precision="fp64")) != trajectory_key(cell(**WAYS[0]))
    assert trajectory_key(cell(**WAYS[0], replicas=4)) != trajectory_key(cell(**WAYS[0]))
    assert trajectory_key(cell(**WAYS[0]).with_seed(1)) != trajectory_key(cell(**WAYS[0]))
    assert trajectory_key(resolve(Cell(workload=TINY, topology="ring", replicas=3))) is None, (
        "real runs are measured"
    )


def test_a_run_that_diverged_is_not_taken_for_another(tmp_path: Path) -> None:
    kept = Kept()
    nan = {"options": {"tiny": {"nan_at": 3}}}
    for link in (100.0, 1.0):
        result, cost, _ = run(cell(**WAYS[0], **nan, link_mbit=link), tmp_path, kept=kept)
        assert result["diverged_step"] == 3 and not cost["simulation"]["retimed"]
        assert result["samples_to"] == {"easy": None, "target": None, "hard": None}


# -- without gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", [WAYS[0], WAYS[3], WAYS[4], WAYS[5]], ids=named)
def test_without_gradients_times_bytes_and_staleness_are_the_same_and_nothing_is_said_of_training(
    way: dict[str, Any], tmp_path: Path
) -> None:
    made = cell(**way)
    bare = dataclasses.replace(made, gradients="none")
    assert bare.id != made.id
    (result, cost, _), (other, its_cost, _) = run(made, tmp_path), run(bare, tmp_path)
    for name in ("samples", "updates", "payload", "predicted", "staleness", "events"):
        assert result[name] == other[name], name
    assert its_cost["virtual_s"] == cost["virtual_s"] and its_cost["simulation"]["gradients"] == 0
    assert other["loss"] == [] and other["final_metric"] is None and other["target"] is None
    assert other["evaluations"]["metric"] == [] and other["checksum"] is None


def test_fields_that_came_later_do_not_change_the_ids_of_older_cells() -> None:
    plain = resolve(Cell(workload="cnn", topology="ring", replicas=2))
    assert "gradients" not in identity(plain) and "receive_cost" not in identity(plain)
    stored = {path.parent.name for path in (ROOT / "results" / "reference").glob("*/*/*.json")}
    assert {made.id for made in plans.load("reference").cells} <= stored


# -- known answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "converges"), [(0.440, True), (0.450, False)])
def test_delayed_gradient_descent_is_stable_up_to_2_sin_pi_over_2_times_2_tau_plus_1(
    lr: float, converges: bool, tmp_path: Path
) -> None:
    """Four equal workers: every gradient is tau = 3 versions old, the bound for curvature 1 is
    0.4450."""
    bound = 2 * math.sin(math.pi / (2 * (2 * 3 + 1)))
    assert bound == pytest.approx(0.4450, abs=5e-5) and (lr < bound) == converges
    made = cell(
        QUADRATIC,
        sync="asynchronous",
        **SERVER,
        replicas=4,
        precision="fp64",
        link_mbit=None,
        link_latency_us=None,
        compute_time={"kind": "fixed", "mean_s": 1.0},
        options={"quadratic": {"lr": lr}, "asynchronous": {"lr_rule": "same"}},
    )
    result, _, _ = run(made, tmp_path)
    metric = result["evaluations"]["metric"]
    assert result["staleness"]["max"] == 3
    assert (metric[-1] < 1e-6 * metric[0]) if converges else (metric[-1] > 1e3 * metric[0]), (
        f"lr {lr}: {metric}"
    )


# -- what cannot be batched, and errors ------------------------------------------------------------


@pytest.mark.parametrize(
    ("look_at", "said"),
    [
        ("value", "cannot be batched"),
        ("memory", "depends on more than its batch"),
        ("dropout", "every rank its own"),
        ("", ""),
    ],
)
def test_what_cannot_be_batched_is_computed_one_by_one_and_says_why(
    look_at: str, said: str, tmp_path: Path
) -> None:
    made = cell(
        QUADRATIC,
        sync="synchronous",
        topology="ring",
        replicas=4,
        options={"quadratic": {"look_at": look_at}},
    )
    result, cost, _ = run(made, tmp_path)
    assert said in cost["simulation"]["one_by_one"] and bool(
        cost["simulation"]["one_by_one"]
    ) == bool(said)
    assert cost["simulation"]["gradients"] == 4000 and len(result["loss"]) == 1000


def test_groups_beyond_the_memory_cap_are_cut_and_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cell(sync="synchronous", topology="native", replicas=12, precision="fp64")
    whole = run(made, tmp_path)[0]
    monkeypatch.setattr("benchsuite.virtual.gradients.MOST_BYTES", 4 * 8 * 585 * 5)
    cut = run(made, tmp_path)[0]
    assert max(abs(a - b) for a, b in zip(whole["loss"], cut["loss"], strict=True)) < 1e-10


def test_more_ranks_than_memory_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "available_bytes", lambda: 10_000)
    with pytest.raises(
        ValueError,
        match=r"3 ranks x 0.0 MiB, parameters and gradients: 0.0 GiB are needed.*gradients = none",
    ):
        simulate(cell(**WAYS[0]), tmp_path)
    simulate(cell(**WAYS[0], gradients="none"), tmp_path)


def test_an_error_in_a_rank_is_named_with_rank_role_and_time(tmp_path: Path) -> None:
    made = cell(
        sync="asynchronous",
        **SERVER,
        options={"asynchronous": {"momentum": "dana"}, "tiny": {"optimizer": "sgd"}},
    )
    with pytest.raises(
        SimulationError, match="rank 0 raised .*UsageError: momentum = dana.*at 0 virtual seconds"
    ) as caught:
        simulate(made, tmp_path)
    assert caught.value.culprit == {
        "rank": 0,
        "role": "worker",
        "how": "error",
        "phase": None,
        "step": None,
    }


def test_hosts_share_a_port_and_one_host_stands_for_one_per_rank(tmp_path: Path) -> None:
    alone = cell(sync="synchronous", topology="ring", replicas=4, link_mbit=1.0)
    paired = dataclasses.replace(alone, hosts=2)
    times = [run(made, tmp_path)[1]["virtual_s"] for made in (alone, paired)]
    assert times[1] < times[0], f"inside a host nothing is sent on a link: {times}"
