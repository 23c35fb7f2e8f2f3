"""Mistakes that other benchmark suites make, each as a test that this one does not make it.

Elsewhere: throughput against steps, warm-up and Student's t in test_window.py; machine-wide
interface counters in test_measure.py. Not applicable yet: reading a stop time before a device is
synchronised (no device), gradients averaged where parameters should be (no gossip, no local SGD).
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchsuite import rules
from benchsuite.cluster.cell_outcome import RankEnd, classify
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.measure import environment, faults, window, wire
from benchsuite.measure.beat import Phase, Pulse
from benchsuite.parallel.data import DataPart
from benchsuite.plan import cell as cells
from benchsuite.plan.cell import Cell, resolve
from benchsuite.report.text import binary, si
from benchsuite.results.record import Status
from benchsuite.topology.native import Topology as Native
from benchsuite.topology.ring import Topology as Ring
from benchsuite.worker import setup
from benchsuite.worker.predict import predicted
from benchsuite.workload import seeded_layers
from tests.bench import ROOT, TINY, Bench, fault

# throughput


def test_throughput_is_the_sum_over_workers_not_one_workers() -> None:
    """3 workers, 20 steps of 0.5 s, 8 samples each: 48 samples a second, not 16, and not 20 times
    that."""
    ends = np.tile(np.arange(1, 21) * 0.5, (3, 1))
    found = window.together(ends - 0.5, ends, np.full((3, 20), 8.0))
    assert found.samples_per_s == pytest.approx(48.0)


def test_warm_up_is_not_averaged_in() -> None:
    """10 steps of 2 s, then 90 of 1 s: the median and the rate are those of the 90."""
    ends = np.cumsum([2.0] * 10 + [1.0] * 90)[None, :]
    starts = np.concatenate([[[0.0]], ends[:, :-1]], axis=1)
    found = window.together(starts, ends, np.full((1, 100), 4.0))
    assert (found.samples_per_s, float(np.median(found.step_s))) == (4.0, 1.0)


def test_no_padding_is_counted_as_data() -> None:
    """Shards are disjoint and together the batch; a batch that does not divide is refused, never
    padded."""
    for name, preset, n in ((TINY, "default", 3), ("cnn", "smoke", 4)):
        workload = setup.make_workload(resolve(Cell(workload=name, preset=preset)))
        workload.start(seed=0, dtype=torch.float64)
        size = cells.global_batch(resolve(Cell(workload=name, preset=preset)))
        for index in (0, 7, 25):
            whole = workload.batch(index, shard=0, num_shards=1)
            shards = [workload.batch(index, shard=shard, num_shards=n) for shard in range(n)]
            assert (
                sum(shard.num_samples for shard in shards)
                == whole.num_samples
                == len(whole.x)
                == size
            )
            assert torch.equal(torch.cat([shard.x for shard in shards]), whole.x)
    (problem,) = rules.validate(resolve(Cell(workload="cnn", replicas=3)))
    assert "global batch(64) is not divisible by replicas(3) = 3: 64 % 3 = 1" in problem.reason


# counters and units


def test_counters_are_read_between_two_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one barrier only, a peer may still be sending: 3.94 S were read where 4.01 S were
    sent."""
    seen: list[str] = []

    def read(_: str) -> wire.Counters:
        seen.append("read")
        return wire.Counters(0, 0, 0)

    monkeypatch.setattr(wire, "read_counters", read)
    meter = wire.WireMeter(lambda: seen.append("barrier"), private=True)
    meter.start()
    meter.stop()
    assert seen == ["barrier", "read", "barrier"] * (len(seen) // 3)


def test_kib_is_1024_and_kb_is_1000() -> None:
    assert (binary(1023), binary(4096), binary(3 * 2**19), binary(2**31)) == (
        "1023 B",
        "4.0 KiB",
        "1.5 MiB",
        "2.00 GiB",
    )
    assert si(101_480) == "101 kB"
    ring = Ring(
        segment_kib=1024
    )  # 2^20 bytes: a chunk of 1 MiB is one message, one element more makes two
    edge = (0, 1)
    assert ring.predicted_traffic(2 * 2**18, 4, num_workers=2).messages[edge] == 2
    assert ring.predicted_traffic(2 * 2**18 + 2, 4, num_workers=2).messages[edge] == 4


# ranks


def test_rank_0_is_a_rank() -> None:
    """`if not rank` takes it for none: it can be slow, be struck, and be the culprit."""
    assert resolve(Cell(straggler={"0": 4.0}, replicas=2)).straggler == {"0": 4.0}
    faults.check(fault(0, "send", "SIGKILL"), 1)
    pulse = Pulse(pid=1, step=3, seq=9, phase=Phase.SEND)
    ends = [
        RankEnd(rank=0, role="worker", exit_code=-9, pulse=pulse, order=1),
        RankEnd(rank=1, role="worker", exit_code=None, pulse=pulse),
    ]
    outcome = classify(ends, timeout_s=9, at_deadline=False)
    assert (
        outcome.status is Status.FAILED
        and outcome.culprit is not None
        and outcome.culprit["rank"] == 0
    )


def test_a_mean_repeated_in_place_does_not_overflow() -> None:
    """A sum repeated in place grows N-fold each time: float32 is infinite after 128 doublings."""
    for make in (Ring, Native):

        def body(comm: Any, make: Any = make) -> float:
            topology = make()
            flat = torch.full((5,), 1e38)
            topology.start(comm)
            for _ in range(140):
                topology.mean(flat.mul_(0.5))
                flat.mul_(2.0)
            return float(flat.max())

        assert thread_ranks(2, body) == [torch.tensor(1e38).item()] * 2


# start


def test_the_start_depends_on_the_seed_alone() -> None:
    """Not on what drew random numbers before, nor on the number of workers, nor on the rank."""
    made = setup.make_workload(resolve(Cell(workload="cnn", preset="smoke")))
    made.start(seed=3, dtype=torch.float32)
    first = [p.detach().clone() for layer in seeded_layers(made, 3) for p in layer.parameters()]
    torch.rand(17)
    again = [p for layer in seeded_layers(made, 3) for p in layer.parameters()]
    other = [p for layer in seeded_layers(made, 4) for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def own(tmp_path: Path, method: str) -> str:
    """A workload of one's own: the tiny one with another method."""
    path = tmp_path / "twisted.py"
    path.write_text(f"{Path(TINY).read_text()}\n{method}")
    return str(path)


@pytest.mark.procs
@pytest.mark.timeout(60)
def test_ranks_that_start_apart_are_named(bench: Bench, tmp_path: Path) -> None:
    """A start that differs per rank, or a broadcast whose result is dropped on the others, would go
    unnoticed."""
    apart = own(
        tmp_path,
        "    def layers(self):\n        import os\n        torch.manual_seed(os.getpid())\n        return [nn.Linear(self.width, 1)]\n",
    )
    run = bench.run(workload=apart, topology="ring", replicas=2)
    assert run.status is Status.FAILED and run.reason is not None
    assert "rank 1 starts from other parameters than rank 0 with the same seed 0" in run.reason


@pytest.mark.procs
@pytest.mark.timeout(60)
def test_a_rank_has_the_threads_of_its_cell_not_as_many_as_cores(
    bench: Bench, tmp_path: Path
) -> None:
    """Else n ranks have n x cores threads."""
    counts = own(
        tmp_path, "    def evaluate(self, infer):\n        return float(torch.get_num_threads())\n"
    )
    for threads in (1, 2):
        run = bench.ok(workload=counts, topology="ring", threads=threads)
        assert run.result["final_metric"] == threads


@pytest.mark.procs
@pytest.mark.timeout(60)
def test_evaluation_takes_time_and_none_of_it_is_the_runs(bench: Bench, tmp_path: Path) -> None:
    """Six evaluations of 0.2 s: after the run, off its clock, and not 0 either."""
    slow = own(
        tmp_path,
        "    def evaluate(self, infer):\n        import time\n        time.sleep(0.2)\n        return 1.0\n",
    )
    run = bench.ok(workload=slow, topology="ring", replicas=2)
    assert len(run.result["evaluations"]["samples"]) == 6
    assert run.cost["wall_s"] < 1.2 < run.cost["launch_s"]


@pytest.mark.procs
@pytest.mark.timeout(60)
def test_a_run_that_diverges_is_a_miss_whatever_it_had_reached(
    bench: Bench, tmp_path: Path
) -> None:
    """The target is reached in every evaluation; the same run without NaN reaches it at once."""
    easy = own(tmp_path, "    def evaluate(self, infer):\n        return 0.1\n")
    for nan_at, reached in ((-1, 0), (3, None)):
        run = bench.ok(workload=easy, topology="ring", options={"twisted": {"nan_at": nan_at}})
        assert set(run.result["samples_to"].values()) == {reached}
        assert run.cost["bytes_to"]["target"] == reached and (
            run.cost["time_to"]["target"] is None
        ) == (reached is None)


@pytest.mark.procs
@pytest.mark.timeout(60)
def test_a_server_computes_no_gradients(bench: Bench) -> None:
    for sync in ("synchronous", "asynchronous"):
        run = bench.ok(sync=sync, topology="parameter_server", servers=2, replicas=1)
        worker, *servers = run.cost["ranks"]
        assert worker["role"] == "worker" and worker["compute_s"] > 0 and worker["steps"] == 10
        for server in servers:
            assert (server["role"], server["compute_s"], server["data_s"], server["steps"]) == (
                "server",
                0.0,
                0.0,
                0,
            )


@pytest.mark.procs
@pytest.mark.timeout(60)
def test_worker_0_can_be_the_straggler(bench: Bench) -> None:
    run = bench.ok(topology="ring", replicas=2, straggler={"0": 4.0}, steps=3)
    assert [split["straggler"] and split["straggler"]["factor"] for split in run.cost["ranks"]] == [
        4.0,
        None,
    ]


# environment


def test_the_commit_is_gits() -> None:
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode != 0:
        pytest.skip("not a git checkout")
    assert environment.collect()["commit"] == asked.stdout.strip()


def test_a_workload_with_dropout_and_frozen_layers_is_evaluated_without_and_predicted_without(
    tmp_path: Path,
) -> None:
    """The metric of the same parameters is one number; what is not trained is not sent."""
    net = tmp_path / "frozen_net.py"
    source = Path(TINY).read_text(encoding="utf-8")
    layers = "return [Residual(self.width) for _ in range(8)] + [nn.Linear(self.width, 1)]"
    assert layers in source
    frozen = "return [Residual(self.width).requires_grad_(False), nn.Dropout(0.9), nn.Linear(self.width, 1)]"
    net.write_text(source.replace(layers, frozen), encoding="utf-8")
    cell = resolve(Cell(workload=str(net), topology="ring", replicas=2))
    workload = setup.make_workload(cell)
    workload.start(seed=0, dtype=torch.float32)
    part = DataPart(workload, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    assert workload.evaluate(part.infer) == workload.evaluate(part.infer)
    assert part.module.training, "training goes on as before"
    num_trained = 8 + 1
    assert part.params.numel() == num_trained
    steps = 10
    assert predicted(cell).payload_bytes == steps * 2 * num_trained * 4
