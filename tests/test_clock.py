"""Step rows, timed gradients, stragglers, snapshots, targets: what stands around the loop, by
hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchsuite.plan.target import Target, first_reached
from benchsuite.worker import clock, snapshots
from benchsuite.worker.clock import Diverged, StepClock, TimedPart
from benchsuite.worker.snapshots import Snapshots
from benchsuite.workload import Part

MS = 1_000_000


class FakeTime:
    """A clock that only `sleep`, `work` and (by 1 us) a look at it move."""

    def __init__(self) -> None:
        self.now = 0
        self.slept = 0

    def perf_counter_ns(self) -> int:
        self.now += 1000
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += round(seconds * 1e9)
        self.now += round(seconds * 1e9)


class FakePart(Part):
    """Its gradient takes 10 ms; its backward pass 10 ms and then 5 ms inside the library."""

    def __init__(self, time: FakeTime, loss: float = 1.0) -> None:
        self.time = time
        self.loss = loss
        self.module = nn.Linear(2, 1)
        self.shapes: dict[str, torch.Size] = {}
        self.params = torch.zeros(3)
        self.grad = torch.zeros(3)

    def gradient(self, batch: Any, ready: Any = None, until: Any = None) -> float:
        self.time.now += 10 * MS
        return self.loss

    def wrap(self, wrapper: Any) -> None:
        wrapper(self.module)

    def backward(self, batch: Any) -> float:
        self.time.now += 10 * MS
        self.module(torch.ones(1, 2)).sum().backward()
        self.time.now += 5 * MS
        return self.loss


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(clock, "time", fake)
    return fake


def timed(time: FakeTime, **fields: Any) -> TimedPart:
    return TimedPart(FakePart(time), **fields)  # type: ignore[arg-type]


def test_a_gradient_is_timed_alone(time: FakeTime) -> None:
    part = timed(time)
    for _ in range(3):
        part.gradient(None)  # type: ignore[arg-type]
        time.now += 100 * MS
    assert part.compute_ns / MS == pytest.approx(30, rel=1e-3)


@pytest.mark.parametrize("busy", [True, False])
def test_a_straggler_of_4_takes_4_times_its_own_compute(time: FakeTime, busy: bool) -> None:
    part = timed(time, slow_down=4.0, busy=busy)
    part.gradient(None)  # type: ignore[arg-type]
    assert part.compute_ns / MS == pytest.approx(40, rel=1e-3)
    assert time.slept / MS == (0 if busy else pytest.approx(30, rel=1e-3))


def test_what_a_library_does_after_the_last_gradient_is_waiting_not_computing(
    time: FakeTime,
) -> None:
    part = timed(time)
    part.wrap(lambda module: module)
    for _ in range(2):
        part.backward(None)  # type: ignore[arg-type]
    assert part.compute_ns / MS == pytest.approx(20, rel=1e-3)
    assert part.backward_wait_ns / MS == pytest.approx(10, rel=1e-3)


def test_a_straggler_under_a_library_waits_after_it_and_nothing_counts_twice(
    time: FakeTime,
) -> None:
    """10 ms of computing, 5 of library wait, then 3 x 10 ms more: 40 computing, 5 waiting, 45 in
    all."""
    part = timed(time, slow_down=4.0, busy=False)
    part.wrap(lambda module: module)
    begin = time.perf_counter_ns()
    part.backward(None)  # type: ignore[arg-type]
    assert part.compute_ns / 1e6 == pytest.approx(40, abs=0.01)
    assert part.backward_wait_ns / 1e6 == pytest.approx(5, abs=0.01)
    assert (time.perf_counter_ns() - begin) / 1e6 == pytest.approx(45, abs=0.01)


def test_divergence_is_a_loss_and_parameters_that_are_not_finite(time: FakeTime) -> None:
    """The first NaN loss is still sent: all replicas then stop at the same step, since all have NaN
    parameters."""
    part = FakePart(time, loss=math.nan)
    assert math.isnan(TimedPart(part).gradient(None) or 0.0)  # type: ignore[arg-type]
    part.params[1] = math.nan
    with pytest.raises(Diverged):
        TimedPart(part).gradient(None)  # type: ignore[arg-type]


def test_the_clock_grows_where_a_worker_takes_more_batches_than_planned() -> None:
    rows = StepClock(2)
    for step in range(5):
        rows.add((step, step + 1, 2, 3, 4, 10 + step, 8), 0.5 if step != 3 else math.nan)
    columns = rows.to_json()
    assert columns["start_ns"] == [0, 1, 2, 3, 4] and columns["index"] == [10, 11, 12, 13, 14]
    assert columns["loss"] == [0.5, 0.5, 0.5, None, 0.5]


# snapshots


def test_snapshots_are_taken_when_the_samples_pass_a_multiple_and_at_the_end(
    tmp_path: Path, time: FakeTime
) -> None:
    taken = Snapshots(48, tmp_path, "0")
    flat = torch.zeros(4)
    for step in range(11):
        flat.fill_(step)
        taken.offer(flat, samples=step * 20, version=step, time_ns=0)
    taken.offer(flat, samples=200, version=10, time_ns=0, last=True)
    taken.offer(flat, samples=210, version=10, time_ns=0, last=True)
    assert taken.samples == [0, 60, 100, 160, 200, 210]
    assert taken.version == [0, 3, 5, 8, 10, 10]
    assert [float(taken[k][0]) for k in range(len(taken))] == [0, 3, 5, 8, 10, 10], (
        "copies, not views"
    )
    assert taken.time_ns == sorted(taken.time_ns)


def test_without_an_interval_only_the_last_counts(tmp_path: Path) -> None:
    taken = Snapshots(0, tmp_path, "0")
    for samples in (0, 24, 48):
        taken.offer(torch.zeros(2), samples=samples, version=0, time_ns=0)
    taken.offer(torch.ones(2), samples=48, version=2, time_ns=0, last=True)
    assert taken.samples == [48] and float(taken[0].sum()) == 2


def test_over_64_mib_snapshots_go_to_the_run_directory(tmp_path: Path) -> None:
    flat = torch.zeros(5 * 2**20)  # 20 MiB
    taken = Snapshots(1, tmp_path, "3")
    for samples in range(1, 6):
        flat.fill_(samples)
        taken.offer(flat, samples=samples, version=samples, time_ns=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "snapshot-3-3.npy",
        "snapshot-3-4.npy",
    ]
    assert [float(taken[k][-1]) for k in range(5)] == [1, 2, 3, 4, 5]
    assert taken[4].dtype == torch.float32 and taken[4].shape == flat.shape


def test_one_snapshot_is_kept_in_memory_however_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SPILL_ABOVE_BYTES", 8)
    taken = Snapshots(0, tmp_path, "0")
    taken.offer(torch.ones(4), samples=1, version=1, time_ns=0, last=True)
    assert list(tmp_path.iterdir()) == [] and len(taken) == 1


# targets


def target(**fields: Any) -> Target:
    return Target(**{"metric": "accuracy", "easy": 90.0, "target": 95.0, "hard": 99.0, **fields})


@pytest.mark.parametrize(
    ("fields", "metrics", "reached"),
    [
        ({}, [80.0, 95.0, 94.0, 96.0], 1),  # the evaluation that saw it; equal is enough
        ({"criterion": "twice"}, [80.0, 95.0, 94.0, 96.0, 97.0], 4),  # the second of two in a row
        ({"criterion": "twice"}, [95.0, 94.0, 95.0, 94.0], None),
        (
            {"criterion": "twice"},
            [95.0, None, 95.0, 95.0],
            3,
        ),  # a value that is not there breaks the row
        ({"direction": "min"}, [99.0, 95.5, 95.0, 90.0], 2),
        ({}, [94.999, math.nan, None], None),
        ({}, [], None),
    ],
)
def test_a_target_is_reached_where_it_is_seen(
    fields: dict[str, Any], metrics: list[float | None], reached: int | None
) -> None:
    assert first_reached(target(**fields), 95.0, metrics) == reached


def test_a_missed_level_is_null_and_the_curve_costs_what_was_sent_until_then() -> None:
    """Four evaluations over 300 of 400 samples, 4000 bytes in all: sent evenly, so 10 bytes a
    sample."""
    from benchsuite.results.assemble import cost

    curve = {"time_ns": [10**9, 2 * 10**9, 4 * 10**9, 8 * 10**9]}
    result = {
        "evaluations": {"samples": [0, 100, 200, 300]},
        "samples": 400,
        "payload_bytes": 4000,
        "samples_to": {"easy": 100, "target": 300, "hard": None},
    }
    owner = {"evaluations": curve, "snapshot_of": "replica"}
    found = cost._curve_costs([{"evaluations": None}, owner], result, begin=10**9)
    assert found["evaluation_s"] == [0.0, 1.0, 3.0, 7.0]
    assert found["evaluation_bytes"] == [0, 1000, 2000, 3000]
    assert found["time_to"] == {"easy": 1.0, "target": 7.0, "hard": None}
    assert found["bytes_to"] == {"easy": 1000, "target": 3000, "hard": None}
    unknown = cost._curve_costs([owner], result | {"payload_bytes": None}, begin=0)
    assert unknown["bytes_to"] == dict.fromkeys(("easy", "target", "hard"))


def test_slices_of_several_servers_are_joined_in_their_order() -> None:
    """Three servers of one worker, two snapshots of 7 numbers each, on thread ranks."""
    from benchsuite.laws.harness.ranks import thread_ranks
    from benchsuite.topology.parameter_server import Topology
    from benchsuite.worker import evaluation

    def body(comm: Any) -> Any:
        topology = Topology()
        topology.start(comm, num_servers=3)
        params = torch.zeros(7)
        training: Any = SimpleNamespace(
            topology=topology, comm=comm, part=SimpleNamespace(params=params)
        )
        if comm.rank == 0:
            return None
        start, stop = topology.slice_of(topology.server, 7)
        mine = [torch.arange(7.0)[start:stop] + 10 * k for k in range(2)]
        return [v.tolist() for v in evaluation._gather_slices(training, mine)]  # type: ignore[arg-type]

    _, first, *others = thread_ranks(4, body)
    assert first == [[0, 1, 2, 3, 4, 5, 6], [10, 11, 12, 13, 14, 15, 16]]
    assert others == [[], []]
