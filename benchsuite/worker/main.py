"""The life of one rank, in the article's order: connect, place, start, loop, drain, write.

    1 initialise   every rank builds the same model from one seed
    2 distribute   batches are handed out by index, so that any worker can be given any
    3 compute      forward, loss, backward: the local gradient
    4 aggregate    by parameter server or ring, as the strategy says
    5 update       one optimiser step
    6 repeat 3-5   until the budget is used; then drain, evaluate the snapshots, write

`run_rank(job)` is called in a fresh process by `cluster/`. `python -m benchsuite.worker` is what a
user's own torchrun starts: a supervisor that forks one such process per cell.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from benchsuite.comm import Traffic
from benchsuite.comm.groups import World
from benchsuite.comm.process import NO_GROUP, ProcessComm
from benchsuite.measure import faults, load, memory
from benchsuite.measure.beat import Beat, Phase
from benchsuite.measure.device_time import DeviceTimer
from benchsuite.measure.wire import WireBytes, WireMeter
from benchsuite.plan.cell import from_json
from benchsuite.worker import device_figures, devices, model_parallel, predict, setup
from benchsuite.worker.build import build
from benchsuite.worker.clock import StepClock, TimedPart
from benchsuite.worker.evaluation import evaluate
from benchsuite.worker.job import RankJob, write_rank_file
from benchsuite.worker.loop import Loop
from benchsuite.worker.rank_record import Measured, rank_record
from benchsuite.worker.rendezvous import connect, open_client, open_store
from benchsuite.worker.setup import Training
from benchsuite.worker.snapshots import Snapshots
from benchsuite.worker.traffic_mode import derived_run
from benchsuite.workload import Part

POLL_S = 0.002  # between two looks at a counter of the store

# What a comm calls a phase -> the phase of the beat.
_PHASES = {"send": Phase.SEND, "recv": Phase.RECV, "barrier": Phase.BARRIER, "serve": Phase.SERVE}


class Rank:
    """One rank's state from its start to its record; `run` reads as its life.

    Made in a fresh process, which ends when `run` returns. What is measured of the process itself
    (memory, time) so belongs to this cell alone.
    """

    def __init__(self, job: RankJob) -> None:
        self.job = job
        self.cell = from_json(job.cell)
        self.beat: Beat = faults.open_beat(job.beat_path, rank=job.rank, faults=self.cell.faults)
        self.loop: Loop | None = None
        # How many times as long as its own computation a straggler's gradient takes; 1.0: none.
        self.slow_down = 1.0
        if job.rank < self.cell.num_workers:
            self.slow_down = self.cell.straggler.get(str(job.rank), 1.0)
        # A straggler keeps its core busy, unless ranks share cores: then it would slow them too.
        self.busy = not load.oversubscribed(self.cell)
        self.lost = 0  # ranks that died while the strategy went on

        self.memory = memory.RankMemory()
        self.timer: DeviceTimer | None = None

    def run(self) -> None:
        """Runs the whole life of this rank and writes its record.

        The beat is told of every phase, so that a launcher which waits in vain can say where the
        rank has stopped.
        """
        memory.reset_peak()
        torch.set_num_threads(self.cell.threads)
        torch.use_deterministic_algorithms(self.cell.device == "cpu")
        # That mode also fills fresh memory with NaN. This helps to find reads of memory that nobody
        # wrote, and costs 1 % of a step of the digits CNN.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property

        # Where starting and ending a cell takes its time; `selfcheck` shows it.
        marks = {"entered": time.perf_counter_ns()}
        self.beat.enter(Phase.START, 0)
        # Connect and place: the store first, since the process group is made over it.
        self.store = open_store(self.job)
        device = devices.choose(self.cell, self.job.local_rank)
        self.timer = DeviceTimer() if device.type == "cuda" else None
        self.comm = connect(self.job, self.cell, self.store, self._enter, device)
        self.comm.timer = self.timer if self.cell.backend == "nccl" else None
        marks["connected"] = time.perf_counter_ns()
        # Build: the model comes from the cell's seed, dropout from this rank's own.
        setup.seed_rank(self.cell.seed, self.job.rank)
        training = build(
            self.cell, self.comm, wrap=self._timed, before_model=self.memory.begin_model
        )
        # The comm of the replica axis, which counts how long a strategy waits.
        axis: Any = training.comm
        self.loop = Loop(training, self.part, axis, self.beat.enter, self.timer)
        self._check_equal_start(training)
        marks["built"] = time.perf_counter_ns()

        measured = self._train(training)

        self.beat.enter(Phase.EVALUATE, self.loop.step)
        marks["left_loop"] = time.perf_counter_ns()

        if measured.device is not None:
            # The other ranks are quiet now, so the ceiling is measured on a device without company.
            arithmetic = device_figures.arithmetic(
                self.cell, training.workload, measures=self.job.rank == 0
            )
            measured.device |= arithmetic

        evaluations = evaluate(training, measured.snapshots)
        marks["evaluated"] = time.perf_counter_ns()
        self.beat.enter(Phase.WRITE, self.loop.step)
        # Write: the record last, when everything is known.
        record = rank_record(self.job, training, measured, evaluations)
        record["marks_ns"] = marks
        record["straggler"] = self._straggler()
        record["predicted"] = self._predicted(training)
        write_rank_file(self.job.run_dir, self.job.rank, json.dumps(record, allow_nan=False))

        self._leave(training)

    # -- the loop ----------------------------------------------------------------------------------

    def _train(self, training: Training) -> Measured:
        """Runs steps 3 to 6 and times them: a worker's loop, or a server's.

        The wire's counters are read around the loop, with a barrier on both sides of each reading.
        """
        # Only the rank that owns the curve pays for its copies.
        owner = training.owns_snapshots
        measured = self._measured(training, owner)
        meter = self._meter()
        meter.start()

        measured.cpu_s = -time.process_time()  # `_stop` adds the reading at the end
        assert self.loop is not None
        self.loop.run(measured, owner=owner)

        self._stop(measured, meter, training)
        return measured

    def _measured(self, training: Training, owner: bool) -> Measured:
        """Where the loop writes what it measures; only the rank that owns the curve takes
        snapshots.
        """
        recipe = training.recipe
        every = training.workload.target.evaluate_every if owner else 0
        settled_ns = self.timer.now_ns if self.timer is not None else None
        snapshots = Snapshots(every, self.job.run_dir, str(self.job.rank), settled_ns=settled_ns)

        num_steps = recipe.budget // recipe.global_batch
        return Measured(StepClock(num_steps + 1), snapshots, memory=self.memory)

    def _meter(self) -> WireMeter:
        """Reads the network's counters; on one rank of each host, because the counters are the
        host's.
        """
        return WireMeter(
            self.comm.barrier,
            interface=self.job.interface,
            private=self.job.private_network,
            reason=self.job.network_reason,
            reads=self.job.local_rank == 0,
        )

    def _all_ended(self, training: Training) -> int:
        """Waits until every rank has ended its loop or is known to be lost; returns how many are
        lost.

        Only for strategies that survive the loss of a worker: a barrier with a dead rank would
        never return, so ranks are counted in the store instead.
        """
        if not _survives(training):
            return 0

        self.store.add("ended", 1)

        while True:
            lost = int(self.store.add("lost", 0))
            if int(self.store.add("ended", 0)) + lost >= self.comm.size:
                return lost

            time.sleep(POLL_S)

    def _leave(self, training: Training) -> None:
        """Waits until no peer needs this rank any more.

        Rank 0 hosts the store, and its end takes the store away. Where a worker may be lost, the
        lost ones count as gone.
        """
        if not _survives(training):
            self.comm.barrier()
            return

        self.store.add("left", 1)
        if self.comm.rank != 0:
            return

        # Rank 0 hosts the store, so it stays until everybody has left or is known to be lost.
        gone = 0

        while gone < self.comm.size:
            gone = int(self.store.add("left", 0)) + int(self.store.add("lost", 0))
            time.sleep(POLL_S)

    def _stop(self, measured: Measured, meter: WireMeter, training: Training) -> None:
        """Closes the books of the loop: what is sent later (snapshots, barriers) is not the
        strategy's.
        """
        measured.cpu_s += time.process_time()
        measured.memory.end_loop()
        if self.timer is not None:
            measured.device = device_figures.peaks()
        # Copies: what is sent from here on is not the run's.
        measured.traffic = self.comm.traffic + Traffic()
        measured.calls = dict(self.comm.calls)
        # Told before the barriers below: rank 0 reads it after them, and finds it there.
        self.store.set(f"events/{self.comm.rank}", json.dumps(measured.events))

        begin = time.perf_counter_ns()
        self.lost = self._all_ended(training)

        if self.lost:
            measured.wire = WireBytes(
                reason=f"{self.lost} of {self.comm.size} ranks were lost: no common reading"
            )
            return

        measured.wire = meter.stop()
        measured.barrier_ns = time.perf_counter_ns() - begin

        if training.strategy.calls_library and training.topology.num_workers > 1:
            measured.derived = self._derive(training, measured)

        if training.replica is not None:
            # Read before the part is asked for one more gradient, which it would count.
            measured.part_facts = dict(training.replica.facts())
            measured.derived_inside = self._derive_inside(training, measured)

    def _derive(self, training: Training, measured: Measured) -> Traffic | None:
        """What a library that calls itself has sent in the whole run, derived from watched steps.

        These steps are made after the run, untimed, one of each kind that the strategy names. None
        after a divergence: the ranks may have stopped at different steps, and would wait for each
        other.
        """
        losses = measured.clock.to_json()["loss"]
        if not losses or None in losses:
            return None

        before = training.part.params.clone()
        num_workers = training.topology.num_workers
        batch = training.fetch((0, self.comm.rank, num_workers))
        # A strategy says which steps are alike: one of each kind is watched.
        cycles = training.strategy.cycles(len(losses))
        traffic = derived_run(lambda: training.strategy.step(batch), cycles, num_workers)
        training.part.params.copy_(before)  # the evaluation is of the run's last parameters

        return traffic

    def _derive_inside(self, training: Training, measured: Measured) -> Traffic | None:
        """What the library has sent between the parts of a replica in the whole run.

        Derived from one more gradient, which every part of every replica computes. None on servers,
        which have no part in it, and after a divergence.
        """
        losses = measured.clock.to_json()["loss"]
        if training.is_server or not losses or None in losses:
            return None

        return model_parallel.derive_inside(training, measured.events)

    # -- after the loop ----------------------------------------------------------------------------

    def _predicted(self, training: Training) -> dict[str, Any] | None:
        """On rank 0: what the strategy's own file says that this run must have sent.

        It follows from shapes and from the events that all ranks recorded. None where a rank was
        lost, whose events nobody knows.
        """
        if self.comm.rank != 0 or self.lost:
            return None

        per_rank = [json.loads(self.store.get(f"events/{rank}")) for rank in range(self.comm.size)]
        events = setup.gather_events(per_rank)
        traffic = predict.of_run(
            self.cell,
            training.strategy,
            training.part.shapes,
            events,
            training.setting,
            workload=training.workload,
        )
        return traffic.to_json()

    def _straggler(self) -> dict[str, Any] | None:
        """How this rank was slowed down, for its record; None where it was not."""
        if self.slow_down <= 1:
            return None

        return {"factor": self.slow_down, "how": "busy" if self.busy else "sleep"}

    # -- small things ------------------------------------------------------------------------------

    def _timed(self, part: Part, rank: int) -> TimedPart:
        """Puts the clock between strategy and part.

        The strategy works with what is returned and so is timed without knowing it.
        """
        self.part = TimedPart(part, slow_down=self.slow_down, busy=self.busy, timer=self.timer)
        return self.part

    def _enter(self, phase: str) -> None:
        """Tells the beat that a comm waits in this phase."""
        step = self.loop.step if self.loop is not None else 0
        self.beat.enter(_PHASES[phase], step)

    def _check_equal_start(self, training: Training) -> None:
        """Raises RuntimeError on rank 0 where two ranks start from different parameters.

        All ranks build the model from one seed, so a difference means that the workload draws from
        something else than torch's random state. Replicas would then never agree.
        """
        store = self.store
        store.set(f"start/{self.comm.rank}", json.dumps(model_parallel.digests(training)))
        if self.comm.rank != 0:
            return

        # Part -> the first rank that holds it, and the checksum of what it holds.
        first: dict[str, tuple[int, str]] = {}

        for rank in range(self.comm.size):
            for part, digest in json.loads(store.get(f"start/{rank}")).items():
                holder, expected = first.setdefault(part, (rank, digest))
                if digest != expected:
                    raise RuntimeError(
                        f"rank {rank} starts from other parameters than rank {holder} with the "
                        f"same seed {self.cell.seed}: layers() must depend on torch's random "
                        "state only"
                    )


def run_rank(job: RankJob) -> None:
    """Runs one rank of one cell, from connecting to writing its file. Called in a fresh process."""
    Rank(job).run()


def goodbye(job: RankJob) -> None:
    """Says goodbye to every server in the place of a worker that has died.

    For strategies with `survives = "worker"`: a server serves until all its workers have said
    goodbye. Counts the worker as lost, so that those who wait in `Rank._all_ended` go on.
    """
    cell = from_json(job.cell)
    store = open_client(job)
    # A comm without a process group: the dead worker has taken its own along.
    comm = ProcessComm(
        World(store, lambda: store), rank=job.rank, size=cell.world_size, group=NO_GROUP
    )
    topology = setup.make("topology", cell.topology, setup.options_for(cell, "topology"))
    topology.start(comm, num_servers=cell.num_servers)
    strategy = setup.make("sync", cell.sync, setup.options_for(cell, "sync"))
    # Each of a server's threads has a door of its own, and all of them are told.
    topology.use_threads(strategy.num_threads(topology.num_workers))
    topology.goodbye()
    store.add("lost", 1)


def _survives(training: Training) -> bool:
    """Whether the run of this strategy goes on when a worker dies."""
    return training.strategy.survives == "worker"
