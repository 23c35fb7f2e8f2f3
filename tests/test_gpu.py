"""What a device changes: where ranks work, how time is read, how vectors reach a backend, what is
reported.

Tests with the marker `gpu` need a CUDA device; the others hold the logic without one, with events,
groups and devices that are faked at the edge of the CUDA interface.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchsuite.comm.groups import World
from benchsuite.comm.process import ProcessComm
from benchsuite.comm.staging import StagedGroup
from benchsuite.laws import Figure
from benchsuite.laws.harness import ranks
from benchsuite.laws.harness.cases import tiny
from benchsuite.laws.synchronous import equals_one_process
from benchsuite.measure.device_time import DeviceTimer, StepTimes
from benchsuite.plan.cell import Cell
from benchsuite.programs.gpu import check as gpu_check
from benchsuite.results import assemble
from benchsuite.results.assemble.cost import _device
from benchsuite.results.record import Outcome, Status
from benchsuite.update import clip_factor, fuse, in_chunks
from benchsuite.worker import device_figures, devices
from benchsuite.worker.build import build
from benchsuite.worker.clock import CHECK_EVERY, Diverged, StepClock, TimedPart
from benchsuite.worker.device_figures import HostEvent, matmul_ceiling, training_flops
from benchsuite.worker.loop import Loop
from benchsuite.worker.rank_record import Measured
from benchsuite.worker.snapshots import Snapshots
from benchsuite.workload import Batch, DeviceLoss, Part, Workload, mapped, micro_batches, to_device

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no CUDA device"
)
ROOT = Path(__file__).parent.parent
MS = 1_000_000  # ns


class Stream:
    """A device that takes a given time for each piece of work, by its own clock."""

    def __init__(self) -> None:
        self.at_ms = 0.0
        self.synchronised = 0

    def work(self, ms: float) -> None:
        self.at_ms += ms

    def event(self) -> Any:
        stream = self

        class Event:
            def record(self) -> None:
                self.at_ms = stream.at_ms

            def elapsed_time(self, end: Any) -> float:
                return float(end.at_ms - self.at_ms)

        return Event()

    def synchronise(self) -> None:
        self.synchronised += 1

    def timer(self) -> DeviceTimer:
        return DeviceTimer(self.event, self.synchronise)


# -- where a rank works ----------------------------------------------------------------------------


def test_local_ranks_take_devices_in_turn() -> None:
    assert [devices.number(rank, 4) for rank in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [devices.number(rank, 1) for rank in range(3)] == [0, 0, 0]


def test_a_rank_takes_its_device_and_float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert devices.choose(Cell(device="cuda"), local_rank=3) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_a_rank_without_a_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        devices.choose(Cell(device="cuda"), local_rank=0)
    assert devices.choose(Cell(), local_rank=5) == torch.device("cpu")


# -- time ------------------------------------------------------------------------------------------


def test_steps_and_their_spans_are_read_once_after_the_window() -> None:
    stream = Stream()
    timer = stream.timer()
    timer.start()
    for _ in range(3):
        timer.begin("compute")
        stream.work(5.0)
        timer.end("compute")
        timer.begin("blocked")
        stream.work(2.0)
        timer.end("blocked")
        stream.work(1.0)  # the update
        timer.end_step()
    assert stream.synchronised == 1, "between start and settle nobody waits"
    times = timer.settle()
    assert stream.synchronised == 2
    assert [step.compute_ns for step in times] == [5 * MS] * 3
    assert [step.blocked_ns for step in times] == [2 * MS] * 3
    assert np.diff([step.end_ns for step in times]).tolist() == [8 * MS] * 2


def test_spans_outside_the_window_are_not_counted() -> None:
    stream = Stream()
    timer = stream.timer()
    timer.begin("compute")  # a rollout before the loop
    timer.end("compute")
    timer.start()
    timer.end_step()
    timer.begin("blocked")  # what is drained after the last step
    stream.work(9.0)
    timer.end("blocked")
    assert [(step.compute_ns, step.blocked_ns) for step in timer.settle()] == [(0, 0)]


def test_the_step_clock_takes_device_times_and_reads_losses_at_the_end() -> None:
    """A step begins where the one before ended; data is at most what the device could have waited
    for."""
    clock = StepClock(2)
    clock.add((100, 101, 50, 0, 0, 0, 8), DeviceLoss(torch.tensor(1.5)))
    clock.add((101, 102, 1, 0, 3, 1, 8), DeviceLoss(torch.tensor(math.inf)))
    clock.settle([StepTimes(200, 80, 10), StepTimes(300, 60, 0)])
    columns = clock.to_json()
    assert (columns["start_ns"], columns["end_ns"]) == ([100, 200], [200, 300])
    assert (columns["compute_ns"], columns["blocked_ns"]) == ([80, 60], [10, 3])
    assert columns["data_ns"] == [10, 1], "of 50 ns that the host took, 10 were not covered"
    assert columns["loss"] == [1.5, None]


def test_a_divergence_on_a_device_is_noticed_without_asking_every_step() -> None:
    stream = Stream()
    asked = []

    class NoModel(Part):
        module = None
        shapes = {}
        params = torch.full((3,), math.nan)
        grad = torch.zeros(3)

        def gradient(self, batch: Any, ready: Any, until: Any) -> float:
            class Loss(DeviceLoss):
                def read(self) -> float:
                    asked.append(1)
                    return super().read()

            return Loss(torch.tensor(math.nan))

    part = TimedPart(NoModel(), timer=stream.timer())  # type: ignore[arg-type]
    for _ in range(CHECK_EVERY - 1):
        part.gradient(None)  # type: ignore[arg-type]
    assert not asked
    with pytest.raises(Diverged):
        part.gradient(None)  # type: ignore[arg-type]
    assert len(asked) == 1


def test_a_straggler_on_a_device_waits_for_its_work_and_then_as_long_again() -> None:
    stream = Stream()

    class NoModel(Part):
        module = None
        shapes = {}
        params = torch.zeros(3)
        grad = torch.zeros(3)

        def gradient(self, batch: Any, ready: Any, until: Any) -> float:
            stream.work(1.0)
            return 0.5

    part = TimedPart(NoModel(), timer=stream.timer(), slow_down=2.0)  # type: ignore[arg-type]
    assert part.gradient(None) == 0.5  # type: ignore[arg-type]
    assert stream.synchronised == 2, "before it begins, and when its work is done"


def test_the_loop_runs_by_device_times(tmp_path: Any) -> None:
    """The whole loop with events: rows, totals and snapshots by the device's clock, losses as on
    the CPU."""

    def body(comm: ProcessComm) -> tuple[dict[str, Any], Measured]:
        timer = DeviceTimer(HostEvent, lambda: None)
        made: list[TimedPart] = []

        def timed(part: Any, rank: int) -> Any:
            part._value = DeviceLoss  # what a replica on a device returns
            made.append(TimedPart(part, timer=timer))
            return made[0]

        training = build(tiny(), comm, wrap=timed)
        measured = Measured(StepClock(11), Snapshots(48, tmp_path, "0", settled_ns=timer.now_ns))
        Loop(training, made[0], comm, lambda phase, step: None, timer).run(measured, owner=True)
        return measured.clock.to_json(), measured

    [(columns, measured)] = ranks.thread_ranks(1, body)
    assert len(columns["loss"]) == 10 and all(loss is not None for loss in columns["loss"])
    assert columns["start_ns"][1:] == columns["end_ns"][:-1]
    assert measured.compute_ns == sum(columns["compute_ns"]) > 0
    assert measured.end_ns >= columns["end_ns"][-1]
    assert measured.snapshots.samples == [0, 48, 96, 144, 192, 240]


def test_a_loss_on_a_device_is_no_number_until_it_is_read() -> None:
    loss = DeviceLoss(torch.tensor(2.0))
    assert isinstance(loss, float) and math.isnan(loss) and loss.read() == 2.0


# -- batches, vectors ------------------------------------------------------------------------------


def test_micro_batches_cut_every_tensor_of_a_batch() -> None:
    x = torch.arange(12).view(6, 2)
    batch = Batch({"a": x, "b": (x + 1, "kept")}, torch.arange(6), 6)
    pieces = micro_batches(batch, 3)
    assert [piece.num_samples for piece in pieces] == [2, 2, 2]
    assert torch.equal(torch.cat([piece.x["a"] for piece in pieces]), x)
    assert torch.equal(pieces[2].x["b"][0], x[4:] + 1) and pieces[0].x["b"][1] == "kept"
    assert pieces[1].y.tolist() == [2, 3]
    with pytest.raises(ValueError, match="6 samples cannot be cut into 4"):
        micro_batches(batch, 4)


def test_a_batch_stays_where_it_belongs() -> None:
    batch = Batch(torch.zeros(2), torch.zeros(2), 2)
    assert to_device(batch, torch.device("cpu")) is batch
    assert mapped([torch.ones(1), None], lambda x: x + 1)[0].item() == 2.0


def test_an_optimiser_steps_chunks_on_the_cpu_and_one_vector_on_a_device() -> None:
    class OnDevice:
        is_cuda = True

        def element_size(self) -> int:
            return 4

        def numel(self) -> int:
            return 2**22

    vector: Any = OnDevice()
    assert in_chunks(vector) == [vector]
    assert len(in_chunks(torch.zeros(2**22))) == 16
    assert clip_factor(2.0, 1.0) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(
            params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
        ),
        lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
    ],
)
def test_a_fused_optimiser_makes_the_same_steps(make: Any) -> None:
    """What the recipe leaves open may be decided after it was made: this torch reads it at every
    step."""
    plain = torch.linspace(-1, 1, 1000)
    fused = torch.linspace(-1, 1, 1000)
    optimizers = make([plain]), make([fused])
    fuse(optimizers[1])
    assert optimizers[1].param_groups[0]["fused"] is True
    for _ in range(3):
        for vector, optimizer in zip((plain, fused), optimizers, strict=True):
            vector.grad = torch.sin(3 * vector)
            optimizer.step()
    assert torch.allclose(plain, fused, atol=1e-6), (
        f"{float((plain - fused).abs().max()):.3g} apart"
    )
    chosen = torch.optim.SGD([plain], lr=0.1, foreach=True)
    fuse(chosen)
    assert not chosen.param_groups[0]["fused"], "the recipe has chosen"


class _Copying(StagedGroup):
    """Every vector is in the wrong memory."""

    def _foreign(self, x: torch.Tensor) -> bool:
        return True


def staged_ranks(size: int, body: Any, *, strict: str = "") -> list[Any]:
    """Thread ranks whose vectors all go through copies."""

    def through_copies(comm: ProcessComm) -> Any:
        comm._group = _Copying(comm._group, torch.device("cpu"))
        return body(comm)

    return ranks.thread_ranks(size, through_copies, strict=strict)


@pytest.mark.parametrize(
    "topology", ["native", "ring", "tree", "halving_doubling", "direct", "parameter_server"]
)
def test_training_over_staged_vectors_equals_one_process(topology: str) -> None:
    figure: Figure = equals_one_process(staged_ranks, tiny(topology=topology, replicas=3))
    assert figure.holds, f"{topology}: {figure}"


def test_a_receive_is_there_when_it_was_waited_for_and_copies_count_as_waiting() -> None:
    def body(comm: ProcessComm) -> tuple[list[float], int]:
        x = torch.full((4,), float(comm.rank))
        y = torch.zeros(4)
        receiving = comm.irecv(y, 1 - comm.rank)
        sending = comm.isend(x, 1 - comm.rank)
        receiving.wait()
        sending.wait()
        whole = torch.zeros(8)
        comm.all_gather(whole, x)
        return [*y.tolist(), *whole.tolist()], comm.wait_ns

    for rank, (found, wait_ns) in enumerate(staged_ranks(2, body)):
        assert found == [1.0 - rank] * 4 + [0.0] * 4 + [1.0] * 4
        assert wait_ns > 0


def test_a_world_stages_only_where_a_device_is_in_use() -> None:
    assert World(None, lambda: None).staged is torch.cuda.is_initialized()


# -- figures ---------------------------------------------------------------------------------------


def test_the_ceiling_is_operations_over_the_median_time() -> None:
    stream = Stream()

    def event() -> Any:
        stream.work(2.0)  # each product takes 2 ms
        return stream.event()

    found = matmul_ceiling(
        "fp32", device="cpu", size=8, event=event, synchronise=stream.synchronise
    )
    assert found == pytest.approx(2 * 8**3 / 2e-3, rel=1e-9)
    assert (
        matmul_ceiling("bf16", device="cpu", size=64, event=HostEvent, synchronise=lambda: None) > 0
    )


class Silent(Workload):
    """A workload that states no operations."""


def test_training_takes_three_forward_passes() -> None:
    class Known:
        def layer_flops(self) -> list[int]:
            return [10, 20]

    known: Any = Known()
    assert training_flops(known) == 90
    unknown: Any = Silent()
    assert training_flops(unknown) is None


def _rank(index: int, ceiling: float | None, allocated: int) -> dict[str, Any]:
    device = {
        "name": "one",
        "index": index,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": 2 * allocated,
    }
    return {
        "host": 0,
        "device": device | {"flops_per_sample": 300, "matmul_ceiling_flop_per_s": ceiling},
    }


def test_the_share_of_the_ceiling_is_of_all_devices_that_were_used() -> None:
    """Two ranks on one device share its ceiling; two devices have two."""
    shared = _device([_rank(0, 1e6, 7), _rank(0, None, 9)], 2000.0)
    assert (shared["flop_per_s"], shared["num_devices"], shared["peak_device_bytes"]) == (6e5, 1, 9)
    assert shared["mfu"] == pytest.approx(0.6)
    assert _device([_rank(0, 1e6, 7), _rank(1, None, 9)], 2000.0)["mfu"] == pytest.approx(0.3)
    assert _device([{"host": 0, "device": None}], 2000.0) == {}, (
        "a run on the CPU has no such columns"
    )


def test_ranks_that_share_a_device_are_flagged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wall time speaks where each rank has a device of its own."""
    monkeypatch.setattr(assemble, "read_ranks", lambda cell, run_dir: [{}, {}])
    monkeypatch.setattr(
        assemble.results, "deterministic", lambda cell, found: {"diverged_step": None}
    )
    flags = []
    for num_devices in (1, 2):
        cost = {"wall_s": 1.0, "num_devices": num_devices}
        monkeypatch.setattr(
            assemble.costs, "measured", lambda cell, found, result, cost=cost: (dict(cost), {})
        )
        run = assemble.assemble(
            Cell(device="cuda", replicas=2),
            tmp_path,
            Outcome(Status.OK),
            code_id="c",
            machine="m",
            environment_id="e",
            cores=8,
            foreign_cpu_share=0.0,
        )
        flags.append((run.flags, run.cost["provenance"]))
    assert flags == [(("oversubscribed",), "counted"), ((), "measured")]


def test_a_rank_measures_what_its_workload_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_figures, "matmul_ceiling", lambda precision: 5.0)
    unknown: Any = Silent()
    found = device_figures.arithmetic(Cell(), unknown, measures=True)
    assert found == {"flops_per_sample": None, "matmul_ceiling_flop_per_s": 5.0}
    assert (
        device_figures.arithmetic(Cell(), unknown, measures=False)["matmul_ceiling_flop_per_s"]
        is None
    )


_FAKED = """
import json, socket, sys
import torch
from benchsuite.worker import device_figures, devices, main
from benchsuite.results.assemble import cost as costs, result as results
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.worker.job import RankJob
from benchsuite.measure.device_time import DeviceTimer

devices.choose = lambda cell, local_rank: torch.device("cuda", 0)
devices.current = lambda cell: torch.device("cpu")
main.DeviceTimer = lambda: DeviceTimer(device_figures.HostEvent, lambda: None)
device_figures.peaks = lambda: {"name": "fake", "index": 0, "peak_allocated_bytes": 5, "peak_reserved_bytes": 6}
device_figures.matmul_ceiling = lambda precision: 1e9
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
cell = resolve(Cell(workload="transformer", preset="smoke", device="cuda", budget=Budget(steps=8)))
job = RankJob(cell=cell.to_json(), rank=0, world_size=1, run_dir=sys.argv[1], store_port=port, timeout_s=60.0)
main.run_rank(job)
rank = json.load(open(sys.argv[1] + "/rank0.json"))
result = results.deterministic(cell, [rank])
cost, _ = costs.measured(cell, [rank], result)
names = ("device_name", "peak_device_bytes", "flops_per_sample", "flop_per_s", "mfu", "samples_per_s")
print(json.dumps({name: cost[name] for name in names} | {"compute_ns": rank["compute_ns"], "loss": result["loss"]}))
"""


@pytest.mark.procs
def test_a_rank_on_a_device_leaves_a_whole_record(tmp_path: Path) -> None:
    """The worker's own life with the CUDA interface faked: staged group, event times, arithmetic,
    columns."""
    command = [sys.executable, "-c", _FAKED, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["device_name"], found["peak_device_bytes"], len(found["loss"])) == ("fake", 5, 8)
    assert found["compute_ns"] > 0 and None not in found["loss"]
    assert found["flop_per_s"] == pytest.approx(
        found["samples_per_s"] * found["flops_per_sample"], rel=1e-12
    )
    assert found["mfu"] == pytest.approx(found["flop_per_s"] / 1e9, rel=1e-12)


# -- make gpu-check --------------------------------------------------------------------------------

WITHOUT = (
    "pandas",
    "psutil",
    "seaborn",
    "matplotlib",
    "sklearn",
    "scipy",
    "greenlet",
    "rich",
    "jinja2",
    "gymnasium",
)


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_gpu_check_goes_all_the_way_on_the_cpu_with_torch_and_numpy_alone(
    tmp_path: Path,
) -> None:
    """Every part runs, every line passes, and the file has machine, torch and commit."""
    for name in WITHOUT:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed here')\n")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [
        sys.executable,
        "-P",
        "-m",
        "benchsuite.gpu_check",
        "--cpu-dry-run",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command,
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (tmp_path / "out").iterdir()
    document = json.loads(path.read_text())
    assert document["passed"] and document["dry_run"] and document["torch"] == torch.__version__
    assert document["commit"] and document["machine"] and document["started_at"]
    assert all(check["holds"] for check in document["checks"]) and len(document["checks"]) >= 18
    assert {run["unit"] for run in document["runs"]} >= {"tokens/s", "images/s"}
    assert len(document["rates"]["ours"]) == len(document["rates"]["hand"]) == 2


def test_without_a_device_the_check_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == gpu_check.NO_DEVICE != 0
    assert f"torch {torch.__version__} sees no CUDA device" in capsys.readouterr().out


def test_a_part_that_breaks_fails_the_check_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(found: gpu_check.Found, device: str) -> None:
        raise RuntimeError("no kernel")

    for part in ("presets", "shared", "laws"):
        monkeypatch.setattr(
            gpu_check, part, lambda found, device: found.check("part", True, "1 of 1")
        )
    monkeypatch.setattr(gpu_check, "hand_written", broken)
    assert gpu_check.main(["--cpu-dry-run", "--out", str(tmp_path)]) == gpu_check.FAILED
    document = json.loads(next(tmp_path.iterdir()).read_text())
    assert [check["holds"] for check in document["checks"]] == [True, True, False, True]
    assert document["checks"][2]["detail"] == "RuntimeError: no kernel" and not document["passed"]


def test_the_committed_gpu_check_passed_on_a_device_and_says_where_and_with_what() -> None:
    paths = sorted((ROOT / "results" / "reference" / "gpu").glob("gpu-check-*.json"))
    assert paths, "results/reference/gpu/ holds no result of `make gpu-check`"
    for path in paths:
        found = json.loads(path.read_text())
        assert (
            found["passed"] and not found["dry_run"] and not found["dirty"] and not found["absent"]
        ), path.name
        assert (
            len(found["commit"]) == 40 and found["machine"] and found["device"] and found["torch"]
        ), path.name
        assert all(check["holds"] for check in found["checks"]), path.name
        [gpt2] = [
            run
            for run in found["runs"]
            if (run["cell"]["workload"], run["cell"]["preset"]) == ("transformer", "gpu")
        ]
        assert (
            gpt2["mfu"] >= gpu_check.LEAST_MFU and found["rates"]["ratio"] >= gpu_check.LEAST_RATIO
        ), path.name
        assert gpt2["mfu"] * gpt2["matmul_ceiling_flop_per_s"] == pytest.approx(gpt2["flop_per_s"])


# -- with a device ---------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("topology", ["native", "ring", "parameter_server"])
def test_training_on_cuda_equals_one_process_on_the_cpu(topology: str, replicas: int) -> None:
    figure = equals_one_process(
        ranks.thread_ranks, tiny(topology=topology, replicas=replicas, device="cuda")
    )
    assert figure.holds, f"{topology} N = {replicas}: {figure}"


@pytest.mark.gpu
@needs_gpu
def test_laws_of_messages_hold_for_vectors_on_cuda() -> None:
    def body(comm: ProcessComm) -> float:
        x = torch.full((1000,), float(comm.rank + 1), device="cuda")
        comm.all_reduce(x)
        return float(x.sum())

    assert ranks.thread_ranks(2, body) == [3000.0, 3000.0]
