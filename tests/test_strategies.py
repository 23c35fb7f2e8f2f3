"""What runs of the newer strategies leave behind: whose parameters are evaluated, when, over which
samples; divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchsuite import rules
from benchsuite.laws.harness.cases import tiny
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.runs import run as run_ranks
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.laws.hogwild import increments_lost
from benchsuite.laws.traffic import described
from benchsuite.plan.cell import Budget, Cell
from benchsuite.sync.buckets import MIB, bucket_ranges
from benchsuite.sync.stale_synchronous import BoundedAhead
from benchsuite.worker import setup
from tests.bench import Bench
from tests.virtual_runs import run

SERVER = {"topology": "parameter_server"}
WAYS: list[dict[str, Any]] = [
    {"sync": "local_sgd", "topology": "ring", "options": {"local_sgd": {"local_steps": 5}}},
    {"sync": "local_sgd", **SERVER, "options": {"local_sgd": {"local_steps": 5}}},
    {"sync": "diloco", "topology": "native", "options": {"diloco": {"local_steps": 5}}},
    {
        "sync": "diloco",
        "topology": "ring",
        "options": {"diloco": {"local_steps": 10, "fragments": 2, "delay": 1}},
    },
    {"sync": "elastic_averaging", "topology": "tree"},
    {"sync": "elastic_averaging", **SERVER},
    {"sync": "gossip", "topology": "ring_neighbours"},
    {"sync": "gossip", "topology": "exponential"},
    {"sync": "hogwild", "options": {"hogwild": {"lock": "exclusive"}}},
    {"sync": "delayed", "topology": "direct"},
    {"sync": "stale_synchronous", **SERVER},
]


def virtual(way: dict[str, Any], **more: Any) -> Cell:
    fields = {
        "clock": "virtual",
        "replicas": 3,
        "compute_time": {"kind": "gamma", "mean_s": 0.01, "cv": 0.3},
        **way,
        **more,
    }
    made = tiny(("sgd", 0.05, 0.0), **fields)
    assert rules.validate(made) == []
    return made


def named(way: dict[str, Any]) -> str:
    return "-".join([way["sync"], way.get("topology", "")])


@pytest.mark.parametrize("way", WAYS, ids=named)
def test_every_sample_is_used_once_and_bytes_are_those_predicted(
    way: dict[str, Any], tmp_path: Path
) -> None:
    result, cost, _ = run(virtual(way, straggler={"0": 3.0}), tmp_path)
    assert result["samples"] == 240 and result["loss_samples"][-1] == 240
    assert result["loss_samples"] == sorted(result["loss_samples"])
    assert result["payload_bytes"] == result["predicted_bytes"]
    assert result["evaluations"]["samples"][0] == 0 and result["evaluations"]["samples"][-1] == 240
    assert cost["evaluation_s"] == sorted(cost["evaluation_s"])


@pytest.mark.parametrize("way", [WAYS[0], WAYS[6]], ids=named)
def test_the_mean_of_the_replicas_is_what_is_evaluated(way: dict[str, Any], tmp_path: Path) -> None:
    cell = virtual(way)
    result, _, _ = run(cell, tmp_path)
    ranks = run_ranks(virtual_ranks, cell)
    mean = torch.stack([worker.params[-1] for worker in ranks.workers]).mean(0)
    workload, part = setup.build_part(cell)
    part.params.copy_(mean)
    assert result["final_metric"] == pytest.approx(workload.evaluate(part.infer), rel=1e-12)


def test_a_mean_is_there_once_the_last_of_its_replicas_is(tmp_path: Path) -> None:
    """Gossip waits for neighbours only: replicas are at a step at different times."""
    cell = virtual(
        WAYS[6], replicas=4, compute_time={"kind": "fixed", "mean_s": 0.01}, straggler={"2": 5.0}
    )
    _, cost, _ = run(cell, tmp_path)
    slowest = max(split["virtual_s"] for split in cost["ranks"])
    assert cost["evaluation_s"][-1] == pytest.approx(slowest)
    assert slowest == pytest.approx(10 * 0.05), "ten steps of the slow one"


def test_workers_of_hogwild_are_handed_batches_so_a_slow_one_takes_fewer(tmp_path: Path) -> None:
    cell = virtual(WAYS[8], compute_time={"kind": "fixed", "mean_s": 0.01}, straggler={"0": 4.0})
    result, cost, _ = run(cell, tmp_path)
    steps = [split["steps"] for split in cost["ranks"]]
    assert result["updates"] == sum(steps) == 30 and result["events"]["updates"] == steps
    assert steps[0] < 5 < 10 < steps[1], steps


@pytest.mark.parametrize("way", WAYS, ids=named)
def test_a_run_that_diverges_ends_and_says_so(way: dict[str, Any], tmp_path: Path) -> None:
    """Batch 3 gives NaN: whoever waits for a replica that has diverged must not wait for ever."""
    options = {**way.get("options", {}), "tiny": {"nan_at": 3, "optimizer": "sgd", "lr": 0.05}}
    result, _, _ = run(virtual({**way, "options": options}), tmp_path)
    assert result["diverged_step"] is not None
    assert result["samples_to"] == {"easy": None, "target": None, "hard": None}
    assert result["payload_bytes"] == result["predicted_bytes"], "what was sent until then"


def test_buckets_are_cut_at_tensors_from_the_end_the_first_one_small() -> None:
    shapes = {
        str(k): torch.Size([size])
        for k, size in enumerate((300_000, 10, 200_000, 700_000, 100_000))
    }
    ranges = bucket_ranges(shapes, 4, 2.0)
    total = sum(shape.numel() for shape in shapes.values())
    assert ranges[0] == (total - 100_000, total), "700,000 elements more would be above 1 MiB"
    assert [stop for _, stop in ranges][1:] == [start for start, _ in ranges][:-1] and ranges[-1][
        0
    ] == 0
    assert bucket_ranges(shapes, 4, 1e6)[-1][0] == 0 and len(bucket_ranges(shapes, 4, 1e6)) == 2
    largest = max(stop - start for start, stop in ranges[1:]) * 4
    assert largest <= max(2.0 * MIB, 700_000 * 4), largest


def test_more_slack_lets_go_sooner_and_a_leaver_is_waited_for_by_nobody() -> None:
    policy = BoundedAhead(3, slack=1, per_clock=False)
    policy.start(torch.zeros(2), lambda gradient, *, num_gradients=1, oldest_of=(): None)
    one = torch.ones(2)
    assert policy.on_push(0, 0, one) == [0], "one step ahead is within slack 1"
    assert policy.on_push(0, 0, one) == [], "two are not"
    assert policy.on_push(1, 0, one) == [1]
    assert policy.on_goodbye(2) == [0], "the slowest has left: 2 - 1 <= 1"
    assert policy.events["held"] == 1


@pytest.mark.parametrize("apply", ["per_clock", "per_push"])
def test_a_stale_gradient_ages_until_it_is_applied_not_until_it_arrives(
    apply: str, tmp_path: Path
) -> None:
    """Three fixed workers, one five times slower, slack 3: the fast ones' gradients wait for their
    clock."""
    options = {"stale_synchronous": {"slack": 3, "apply": apply}}
    fixed = {"kind": "fixed", "mean_s": 0.01}
    result, _, raw = run(
        virtual({**WAYS[10], "options": options}, compute_time=fixed, straggler={"0": 5.0}),
        tmp_path,
    )
    log = raw["push_log"]
    if apply == "per_clock":  # push of step t is applied as version t
        assert log["version_before"] == [tag // 3 for tag in log["tag"]]
        assert result["staleness"]["max"] == 3, result["staleness"]
    else:
        assert log["version_before"] == list(range(30))
    assert min(b - r for b, r in zip(log["version_before"], log["version_read"], strict=True)) >= 0


@pytest.mark.parametrize(
    ("steps", "fragments", "delay"),
    [(20, 1, 0), (20, 2, 0), (20, 2, 1), (20, 5, 1), (10, 2, 4), (30, 1, 3)],
)
def test_diloco_announces_the_agreements_it_makes(steps: int, fragments: int, delay: int) -> None:
    options = {"diloco": {"local_steps": 10, "fragments": fragments, "delay": delay}}
    cell = tiny(
        sync="diloco", topology="ring", replicas=2, options=options, budget=Budget(steps=steps)
    )
    strategy, setting = described(cell)
    assert run_ranks(thread_ranks, cell).events == strategy.expected_events(steps, setting)


@pytest.mark.procs
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("sync", "topology", "options"),
    [
        ("hogwild", "native", {}),
        ("gossip", "exponential", {}),
        ("local_sgd", "hierarchical", {"local_sgd": {"local_steps": 5}}),
        ("delayed", "halving_doubling", {}),
        ("synchronous", "hierarchical", {"synchronous": {"bucket_mib": 0.001}}),
        ("elastic_averaging", "parameter_server", {}),
    ],
)
def test_real_processes_run_it_to_the_end(
    bench: Bench, sync: str, topology: str, options: dict[str, Any]
) -> None:
    done = bench.ok(sync=sync, topology=topology, replicas=2, options=options, steps=10)
    assert (
        done.result["payload_bytes"] == done.result["predicted_bytes"]
        and done.result["samples"] == 240
    )
    assert done.result["final_metric"] is not None and done.result["diverged_step"] is None


def test_what_is_lost_without_a_lock_is_counted() -> None:
    cell = tiny(sync="hogwild", replicas=3, options={"hogwild": {"lock": "none"}})
    lost, updates = increments_lost(thread_ranks, cell)
    assert updates == 30 and 0 <= lost < 30
