"""A cell in virtual time: every rank's life in one thread, and the records that processes would
leave.

The ranks run the loop of `benchsuite/worker/loop.py` with the strategy's own file; what differs
from `worker/main.py` is the comm, the part and the clock. A cell whose parameters do not depend on
who is fast (`timing_free`) is trained once, in the plainest of worlds (`cell.untimed`), and timed
afterwards under each link and each spread of compute times (`Trajectory`). Which gradients are
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
from benchsuite.plan import compute_time, placement
from benchsuite.plan.cell import Cell, global_batch, trajectory_key, untimed
from benchsuite.virtual.clock import VirtualClock
from benchsuite.virtual.comm import VirtualComm
from benchsuite.virtual.comm_world import CounterAnswers, VirtualWorld
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
    """What a timing-free cell does, whatever the times are."""

    losses: list[list[float]]  # worker -> its losses step by step
    evaluations: Mapping[str, Any] | None  # rank 0's or the first server's, times apart
    facts: Mapping[str, Any]  # what computing it cost


@dataclass
class Kept:
    """What one process keeps from cell to cell: traced gradients, and known trajectories."""

    traced: dict[str, Graphs] = field(default_factory=dict)  # by `loss_key`
    # None: it diverged, or failed.
    trajectories: dict[str, Trajectory | None] = field(default_factory=dict)


class SimulationError(RuntimeError):
    """A rank raised, or all ranks wait for each other. `culprit`: as in a run file."""

    def __init__(self, error: Exception, culprit: Mapping[str, Any] | None, now_s: float) -> None:
        lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
        said = lines[0]
        if culprit:
            said = f"rank {culprit['rank']} raised {said} (at {now_s:.6g} virtual seconds)"
        super().__init__(said)
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
    counter_answers: CounterAnswers | None = None,
    batching: bool = True,
    start_order: Sequence[int] = (),
    record: bool = False,
) -> Simulated:
    """Runs a resolved cell of the virtual clock.

    Snapshots over 64 MiB are spilled to `run_dir`. kept: what this process keeps. times,
    counter_answers: take the place of the cell's compute times and of the counters' answers, where
    a recorded run is replayed. batching: False computes gradients one by one. start_order: the
    order in which the ranks are started (it changes nothing). record: also what was done when, as a
    `Schedule`.
    """
    kept = kept or Kept()
    # A trajectory stands for every timing of a cell, unless more than times is asked of this run.
    key = None
    if times is None and counter_answers is None and batching and not record:
        key = trajectory_key(cell)
    trained = None  # a trajectory that was made now, and so costs what it cost
    known = None

    if key is not None:
        if key not in kept.trajectories:
            trained = _trajectory(untimed(cell), run_dir, kept)
            kept.trajectories[key] = trained

        known = kept.trajectories[key]

    made = _Simulation(
        cell,
        run_dir,
        kept,
        known=known,
        times=times,
        counter_answers=counter_answers,
        batching=batching,
        record=record,
    )
    simulated = made.run(start_order)
    if trained is None:
        return simulated

    spent = {
        name: simulated.facts[name] + trained.facts[name]
        for name in ("real_s", "cpu_s", "gradients", "groups")
    }
    facts = {
        **simulated.facts,
        **spent,
        "one_by_one": trained.facts["one_by_one"],
        "retimed": False,
    }
    return dataclasses.replace(simulated, facts=facts)


def _trajectory(cell: Cell, run_dir: str | Path, kept: Kept) -> Trajectory | None:
    """Trains a cell and keeps what does not depend on times.

    None where training fails or diverges: then every timing of the cell is simulated whole.
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
    curve = None
    if found is not None:
        curve = {name: value for name, value in found.items() if name != "time_ns"}

    return Trajectory(losses, curve, simulated.facts)


class _Simulation:
    """One simulation of one cell; `run` is called once."""

    def __init__(
        self,
        cell: Cell,
        run_dir: str | Path,
        kept: Kept,
        *,
        known: Trajectory | None = None,
        times: Times | None = None,
        counter_answers: CounterAnswers | None = None,
        batching: bool = True,
        record: bool = False,
    ) -> None:
        # A virtual run repeats bit for bit; one worker process simulates many cells one after the
        # other.
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
        # A known trajectory is timed again: nobody looks at what acting would bring.
        acts_again = known is not None and self._workload.collects
        if cell.gradients == "none" or acts_again:
            self._workload = WithoutData(self._workload, global_batch(cell))
        self._batch = global_batch(cell) / cell.num_workers  # samples of one worker
        self._fits(template)
        # What the ranks share: the pool of gradients, the recipe, the times, the world of comms.
        self._pool = self._make_pool(template, batching=batching)
        self._recipe = setup.make_recipe(cell, self._workload)

        if isinstance(self._pool, Losses):
            self._recipe = dataclasses.replace(
                self._recipe, make_optimizer=idle(self._recipe.make_optimizer)
            )

        self._times = times or self._compute_times()

        self._world = self._make_world(counter_answers)
        self._records: list[Record] = [{}] * cell.world_size
        self._trainings: list[Training] = []
        self._calls: Calls = {}

    def run(self, start_order: Sequence[int]) -> Simulated:
        """Runs all ranks to their ends and gathers what they recorded."""
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
        """Raises UsageError where the vectors of all ranks do not fit into the machine's free
        memory.
        """
        if self._cell.gradients == "none" or self._known is not None:
            return

        size = template.params.numel() * template.params.element_size()
        ranks = self._cell.world_size
        needed = 2 * ranks * size  # parameters and gradients
        free = available_bytes()

        if free is not None and needed > free:
            raise UsageError(
                f"{ranks} ranks x {size / 2**20:.1f} MiB, parameters and gradients: "
                f"{needed / GIB:.1f} GiB are needed, "
                f"{free / GIB:.1f} GiB are free: set fewer replicas, a smaller preset, or "
                "gradients = none"
            )

    def _make_pool(self, template: DataPart, *, batching: bool) -> Pool | Losses:
        """Where gradients come from: they are computed, or known, or none."""
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
        """How long gradients take in this cell, stragglers included."""
        cell = self._cell
        factors = {int(worker): factor for worker, factor in cell.straggler.items()}
        table = cell.compute_time or compute_time.DEFAULT

        return ComputeTimes(table, seed=cell.seed, samples=self._batch, factors=factors)

    def _make_world(self, counter_answers: CounterAnswers | None) -> VirtualWorld:
        """The network of this cell, and what its ranks share."""
        cell = self._cell
        # A receiver's own costs, which a link does not have.
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
            counter_answers=counter_answers,
            schedule=self._schedule,
        )

    # -- the life of a rank ------------------------------------------------------------------------

    def _life(self, rank: int) -> None:
        """One rank from its start to its record, as `worker/main.py` does it under the wall
        clock.
        """
        cell = self._cell
        setup.seed_rank(cell.seed, rank)
        # From here on as under the wall clock: comm, part, training, loop, record.
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
        # A copy: what is sent to evaluate the snapshots is not the run's.
        measured.traffic = comm.traffic + Traffic()

        job = RankJob(cell={}, rank=rank, world_size=cell.world_size)
        evaluations = self._evaluations(training, measured.snapshots)
        self._records[rank] = rank_record(job, training, measured, evaluations) | {
            "straggler": self._straggler(rank)
        }
        if rank == 0:
            self._trainings.append(training)

    def _evaluations(self, training: Training, snapshots: Snapshots) -> dict[str, Any] | None:
        """The rank's curve: evaluated now, or known from the trajectory with the times of this
        run.
        """
        if self._cell.gradients == "none":
            return None
        if self._known is None:
            return evaluate(training, snapshots)

        # The rank that owned the curve in the run that is known: rank 0, or the first server.
        owner = training.topology.num_workers if training.is_server else 0
        first = training.comm.rank == owner
        if not first or not snapshots.samples or self._known.evaluations is None:
            return None

        return {**self._known.evaluations, "time_ns": snapshots.time_ns}

    def _straggler(self, rank: int) -> dict[str, Any] | None:
        """How the rank was slowed down, for its record; None where it was not."""
        factor = self._cell.straggler.get(str(rank), 1.0)
        return {"factor": factor, "how": "virtual"} if factor > 1 else None

    def _culprit(self) -> dict[str, Any] | None:
        """Whose error ended the run, as a run file names it; None where all ranks wait."""
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

        traffic = predict.of_run(
            self._cell, training.strategy, training.part.shapes, events, training.setting
        )
        return traffic.to_json()

    def _facts(self, real_s: float, cpu_s: float) -> dict[str, Any]:
        """What the simulation cost: seconds of this machine, and how gradients were computed."""
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
    """Runs a resolved cell without gradients, in this process; returns its schedule and its
    records.

    UsageError as of `simulate`.
    """
    with tempfile.TemporaryDirectory(prefix="benchsuite-") as run_dir:
        simulated = simulate(dataclasses.replace(cell, gradients="none"), run_dir, record=True)
    assert simulated.schedule is not None
    return simulated.schedule, simulated
