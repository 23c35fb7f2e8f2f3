"""A cell in virtual time: every rank's life in one thread, and the same records as fresh processes
would leave.

The ranks run the loop of `benchsuite/worker/loop.py` with the strategy's own file; what differs
from `worker.py` is the comm, the part and the clock. A cell whose parameters do not depend on who
is fast (`timing_free`) is trained once, in the plainest of worlds (`cell.untimed`), and timed
afterwards under each link and each spread of compute times (`Trajectory`): which gradients are
computed together, and so how they round, is then the same for all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchsuite.comm import Traffic
from benchsuite.comm.traffic import Calls
from benchsuite.errors import UsageError
from benchsuite.measure.memory import available_bytes
from benchsuite.parallel.data import DataPart
from benchsuite.plan import cell as cells
from benchsuite.plan import compute_time, placement
from benchsuite.plan.cell import Cell
from benchsuite.virtual.clock import VirtualClock
from benchsuite.virtual.comm import VirtualComm
from benchsuite.virtual.comm_world import Script, VirtualWorld
from benchsuite.virtual.gradients import Gradients, Graphs, loss_key
from benchsuite.virtual.network import Network
from benchsuite.virtual.part import Pool, Times, VirtualPart
from benchsuite.virtual.schedule import Schedule
from benchsuite.virtual.streams import ComputeTimes
from benchsuite.virtual.without_gradients import Losses, WithoutData, idle
from benchsuite.worker import predict, setup
from benchsuite.worker.build import build
from benchsuite.worker.clock import StepClock
from benchsuite.worker.evaluation import evaluate
from benchsuite.worker.job import RankJob
from benchsuite.worker.loop import Loop
from benchsuite.worker.rank_record import Measured, rank_record
from benchsuite.worker.setup import Training
from benchsuite.worker.snapshots import Snapshots
from benchsuite.worker.traffic_mode import derived_total
from benchsuite.workload import Workload

NS_PER_S = 1e9
GIB = 2**30
Record = dict[str, Any]


@dataclass(frozen=True)
class Trajectory:
    """What a timing-free cell does whatever the times are."""

    losses: list[list[float]]  # worker -> its losses step by step
    evaluations: Mapping[str, Any] | None  # rank 0's or the first server's, times apart
    facts: Mapping[str, Any]  # what computing it cost


@dataclass
class Kept:
    """What one process keeps from cell to cell: traced gradients, and trajectories to be timed
    again.
    """

    traced: dict[str, Graphs] = field(default_factory=dict)  # by `loss_key`
    # None: it diverged, or failed.
    trajectories: dict[str, Trajectory | None] = field(default_factory=dict)


class SimulationError(RuntimeError):
    """A rank raised, or all wait for each other. `culprit`: as in a run file."""

    def __init__(self, error: Exception, culprit: Mapping[str, Any] | None, now_s: float) -> None:
        lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
        said = f"rank {culprit['rank']} raised " if culprit else ""
        super().__init__(
            f"{said}{lines[0]}" + (f" (at {now_s:.6g} virtual seconds)" if culprit else "")
        )
        self.culprit = culprit


@dataclass(frozen=True)
class Simulated:
    """The ranks' records, and what the simulation itself cost."""

    records: list[Record]
    facts: Mapping[str, Any]
    schedule: Schedule | None = None  # where it was recorded


def simulate(
    cell: Cell,
    run_dir: str | Path,
    *,
    kept: Kept | None = None,
    times: Times | None = None,
    script: Script | None = None,
    batching: bool = True,
    start_order: Sequence[int] = (),
    record: bool = False,
) -> Simulated:
    """Runs a resolved cell.

    Snapshots over 64 MiB are spilled to `run_dir`.

    kept: of this process. times, script: in the place of the cell's compute times and of the
    counters' answers, where a recorded run is replayed. batching: False computes gradients one by
    one. start_order: the order in which the ranks are started (it changes nothing). record: also
    what was done when, as a `Schedule`.
    """
    kept = kept or Kept()
    key = (
        cells.trajectory_key(cell)
        if times is None and script is None and batching and not record
        else None
    )
    found = None
    known = None
    if key is not None:
        if key not in kept.trajectories:
            found = kept.trajectories[key] = _trajectory(cells.untimed(cell), run_dir, kept)
        known = kept.trajectories[key]
    made = _Simulation(
        cell,
        run_dir,
        kept,
        known=known,
        times=times,
        script=script,
        batching=batching,
        record=record,
    )
    simulated = made.run(start_order)
    if found is None:
        return simulated
    spent = {
        name: simulated.facts[name] + found.facts[name]
        for name in ("real_s", "cpu_s", "gradients", "groups")
    }
    facts = {**simulated.facts, **spent, "one_by_one": found.facts["one_by_one"], "retimed": False}
    return dataclasses.replace(simulated, facts=facts)


def _trajectory(cell: Cell, run_dir: str | Path, kept: Kept) -> Trajectory | None:
    """Trains; None where that fails or diverges: then every timing of the cell is simulated
    whole.
    """
    try:
        simulated = _Simulation(cell, run_dir, kept).run(())
    except SimulationError:
        return None
    losses = [record["steps"]["loss"] for record in simulated.records if record["role"] == "worker"]
    if any(None in worker for worker in losses):
        return None
    found = next(
        (record["evaluations"] for record in simulated.records if record["evaluations"]), None
    )
    known = (
        None
        if found is None
        else {name: value for name, value in found.items() if name != "time_ns"}
    )
    return Trajectory(losses, known, simulated.facts)


class _Simulation:
    """One cell; `run` once."""

    def __init__(
        self,
        cell: Cell,
        run_dir: str | Path,
        kept: Kept,
        *,
        known: Trajectory | None = None,
        times: Times | None = None,
        script: Script | None = None,
        batching: bool = True,
        record: bool = False,
    ) -> None:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
        self._cell = cell
        self._run_dir = run_dir
        self._kept = kept
        self._known = known
        self._clock = VirtualClock()
        self._schedule = Schedule(self._clock, cell.world_size) if record else None
        self._workload: Workload
        self._workload, template = setup.build_part(cell)
        assert isinstance(template, DataPart), "rules: the virtual clock needs parallel = data"
        # Timed again: nobody looks at it.
        acts_again = known is not None and self._workload.collects
        if cell.gradients == "none" or acts_again:
            self._workload = WithoutData(self._workload, cells.global_batch(cell))
        self._batch = cells.global_batch(cell) / cell.num_workers
        self._fits(template)
        self._pool = self._make_pool(template, batching=batching)
        self._recipe = setup.make_recipe(cell, self._workload)
        if isinstance(self._pool, Losses):
            self._recipe = dataclasses.replace(
                self._recipe, make_optimizer=idle(self._recipe.make_optimizer)
            )
        self._times = times or self._compute_times()
        self._world = self._make_world(script)
        self._records: list[Record] = [{}] * cell.world_size
        self._trainings: list[Training] = []
        self._calls: Calls = {}

    def run(self, start_order: Sequence[int]) -> Simulated:
        begin = time.perf_counter()
        cpu = time.process_time()
        for rank in start_order or range(self._cell.world_size):
            self._clock.spawn(rank, functools.partial(self._life, rank))
        try:
            self._clock.run()
        except Exception as error:
            raise SimulationError(error, self._culprit(), self._clock.now / NS_PER_S) from error
        first = self._records[0]
        first["predicted"] = self._predicted()
        first["derived_total"] = derived_total(self._calls).to_json()
        facts = self._facts(time.perf_counter() - begin, time.process_time() - cpu)
        return Simulated(self._records, facts, self._schedule)

    # -- what the ranks share ----------------------------------------------------------------------

    def _fits(self, template: DataPart) -> None:
        """UsageError where parameters and gradients of all ranks are more than this machine has
        free.
        """
        if self._cell.gradients == "none" or self._known is not None:
            return
        size = template.params.numel() * template.params.element_size()
        ranks = self._cell.world_size
        needed = 2 * ranks * size
        free = available_bytes()
        if free is not None and needed > free:
            raise UsageError(
                f"{ranks} ranks x {size / 2**20:.1f} MiB, parameters and gradients: "
                f"{needed / GIB:.1f} GiB are needed, "
                f"{free / GIB:.1f} GiB are free: set fewer replicas, a smaller preset, or "
                "gradients = none"
            )

    def _make_pool(self, template: DataPart, *, batching: bool) -> Pool | Losses:
        if self._cell.gradients == "none":
            return Losses(template)
        if self._known is not None:
            return Losses(template, self._known.losses)
        traced = self._kept.traced.setdefault(loss_key(self._cell), {})
        self._gradients = Gradients(
            self._workload, template, seed=self._cell.seed, traced=traced, batching=batching
        )
        return Pool(template, self._gradients, num_ranks=self._cell.world_size)

    def _compute_times(self) -> ComputeTimes:
        cell = self._cell
        factors = {int(worker): factor for worker, factor in cell.straggler.items()}
        table = cell.compute_time or compute_time.DEFAULT
        return ComputeTimes(table, seed=cell.seed, samples=self._batch, factors=factors)

    def _make_world(self, script: Script | None) -> VirtualWorld:
        cell = self._cell
        cost = self._cell.receive_cost or {}
        network = Network(
            self._clock,
            placement.ports(cell),
            link_mbit=cell.link_mbit,
            latency_us=cell.link_latency_us,
            incast=float(cost.get("incast", 1.0)),
        )
        copying = float(cost.get("copy_s_per_gib", 0.0)) * NS_PER_S / GIB
        return VirtualWorld(
            self._clock,
            network,
            receive_ns_per_byte=copying,
            script=script,
            schedule=self._schedule,
        )

    # -- the life of a rank ------------------------------------------------------------------------

    def _life(self, rank: int) -> None:
        cell = self._cell
        setup.seed_rank(cell.seed, rank)
        comm = VirtualComm(
            self._world,
            rank=rank,
            size=cell.world_size,
            hosts=placement.hosts(cell),
            calls=self._calls,
        )
        part = VirtualPart(self._pool, self._clock, self._times, rank=rank, schedule=self._schedule)
        training = build(cell, comm, given=(self._workload, self._recipe, part))
        owner = training.owns_snapshots
        every = training.workload.target.evaluate_every if owner else 0
        recipe = training.recipe
        measured = Measured(
            StepClock(recipe.budget // recipe.global_batch + 1),
            Snapshots(every, self._run_dir, str(rank)),
        )
        Loop(training, part, comm, lambda phase, step: None).run(measured, owner=owner)
        # A copy: joining slices for the evaluation is not the run's.
        measured.traffic = comm.traffic + Traffic()
        job = RankJob(cell={}, rank=rank, world_size=cell.world_size)
        evaluations = self._evaluations(training, measured.snapshots)
        self._records[rank] = rank_record(job, training, measured, evaluations) | {
            "straggler": self._straggler(rank)
        }
        if rank == 0:
            self._trainings.append(training)

    def _evaluations(self, training: Training, snapshots: Snapshots) -> dict[str, Any] | None:
        if self._cell.gradients == "none":
            return None
        if self._known is None:
            return evaluate(training, snapshots)
        first = training.comm.rank == (training.topology.num_workers if training.is_server else 0)
        if not first or not snapshots.samples or self._known.evaluations is None:
            return None
        return {**self._known.evaluations, "time_ns": snapshots.time_ns}

    def _straggler(self, rank: int) -> dict[str, Any] | None:
        factor = self._cell.straggler.get(str(rank), 1.0)
        return {"factor": factor, "how": "virtual"} if factor > 1 else None

    def _culprit(self) -> dict[str, Any] | None:
        failed = self._clock.failed
        if failed is None:
            return None
        role = "server" if failed.rank >= self._cell.num_workers else "worker"
        return {"rank": failed.rank, "role": role, "how": "error", "phase": None, "step": None}

    # -- afterwards --------------------------------------------------------------------------------

    def _predicted(self) -> dict[str, Any]:
        """What the strategy's own file says of this run, from shapes and recorded events."""
        training = self._trainings[0]
        events = setup.gather_events([record["events"] for record in self._records])
        return predict.of_run(
            self._cell, training.strategy, training.part.shapes, events, training.setting
        ).to_json()

    def _facts(self, real_s: float, cpu_s: float) -> dict[str, Any]:
        pool = self._pool
        computed = isinstance(pool, Pool)
        return {
            "real_s": real_s,
            "cpu_s": cpu_s,
            "gradients": pool.num_gradients,
            "groups": pool.num_groups,
            "abandoned": pool.num_abandoned,
            "one_by_one": self._gradients.reason if computed else "",
            "retimed": self._known is not None,
        }


def record(cell: Cell) -> tuple[Schedule, Simulated]:
    """Runs a resolved cell of the virtual clock without gradients, in this process; what it did,
    and its records.

    UsageError as of `simulate`.
    """
    with tempfile.TemporaryDirectory(prefix="benchsuite-") as run_dir:
        simulated = simulate(dataclasses.replace(cell, gradients="none"), run_dir, record=True)
    assert simulated.schedule is not None
    return simulated.schedule, simulated
