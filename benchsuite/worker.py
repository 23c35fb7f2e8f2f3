"""The life of one rank, in the article's order: connect, place, start, loop, drain, write.

    1 initialise   every rank builds the same model from one seed
    2 distribute   batches are handed out by index, so that any worker can be given any
    3 compute      forward, loss, backward: the local gradient
    4 aggregate    by parameter server or ring, as the strategy says
    5 update       one optimiser step
    6 repeat 3-5   until the budget is used; then drain, evaluate the snapshots, write

`run_rank(job)` is called in a fresh process by `cluster/`. `python -m benchsuite.worker` is what a user's own
torchrun starts: a supervisor that forks one such process per cell.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # a user's own torchrun: the supervisor, which must not import torch
    from benchsuite.cluster.supervisor import main

    sys.exit(main(sys.argv[1:]))

import copy
import hashlib
import json
import math
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchsuite import cell as cells
from benchsuite import training as trainings
from benchsuite.cell import Cell
from benchsuite.comm import Traffic
from benchsuite.comm.process import NO_GROUP, ProcessComm, World
from benchsuite.job import RankJob, write_rank_file
from benchsuite.measure import faults, load, memory
from benchsuite.measure.beat import Beat, Phase
from benchsuite.measure.clock import Diverged, StepClock, TimedPart
from benchsuite.measure.snapshots import Snapshots
from benchsuite.measure.traffic_mode import TrafficMode, derive
from benchsuite.measure.wire import WireBytes, WireMeter
from benchsuite.topology.parameter_server import ServerLog
from benchsuite.training import Training
from benchsuite.workload import Part

PROCESS_GROUP_GRACE_S = 5.0  # one judge: the launcher's deadline comes first
_PHASES = {"send": Phase.SEND, "recv": Phase.RECV, "barrier": Phase.BARRIER, "serve": Phase.SERVE}


@dataclass
class Measured:
    """What the loop left behind on this rank."""

    clock: StepClock
    snapshots: Snapshots
    start_ns: int = 0
    end_ns: int = 0
    cpu_s: float = 0.0
    wire: WireBytes = field(default_factory=WireBytes)
    traffic: Traffic = field(default_factory=Traffic)
    events: dict[str, int] = field(default_factory=dict)
    server: ServerLog | None = None
    derived: Traffic | None = None
    barrier_ns: int = 0  # waiting for the others at the end


class Rank:
    """State of one rank; `run` reads as its life."""

    def __init__(self, job: RankJob) -> None:
        self.job, self.cell = job, cells.from_json(job.cell)
        self.beat: Beat = faults.open_beat(job.beat_path, rank=job.rank, faults=self.cell.faults)
        self.step = 0
        self.slow_down = self.cell.straggler.get(str(job.rank), 1.0) if job.rank < self.cell.num_workers else 1.0
        self.lost = 0  # ranks that died while the strategy went on
        self.busy = not load.oversubscribed(self.cell)

    def run(self) -> None:
        memory.reset_peak()
        torch.set_num_threads(self.cell.threads)
        torch.use_deterministic_algorithms(self.cell.device == "cpu")
        self.store = open_store(self.job)
        self.comm = connect(self.job, self.cell, self.store, self._enter)
        training = trainings.build(self.cell, self.comm, wrap=self._timed)
        self._check_equal_start(training)
        measured = self._serve(training) if training.is_server else self._work(training)
        self.beat.enter(Phase.EVALUATE, self.step)
        evaluations = self._evaluate(training, measured)
        self.beat.enter(Phase.WRITE, self.step)
        record = self._record(training, measured, evaluations)
        record["predicted"] = self._predicted(training, measured)
        write_rank_file(self.job.run_dir, self.job.rank, json.dumps(record, allow_nan=False))
        self._leave()

    # -- loops -----------------------------------------------------------------------------------------------

    def _work(self, training: Training) -> Measured:
        """A worker's loop: data, gradient, agreement, update."""
        strategy, workload, part, comm = training.strategy, training.workload, self.part, self.comm
        owner = strategy.snapshot_of == "replica" and comm.rank == 0
        measured = self._measured(training, owner)
        clock, global_batch = measured.clock, training.recipe.global_batch
        meter = self._meter()
        self._start(measured, meter)
        if owner:
            measured.snapshots.offer(strategy.snapshot(), samples=0, version=0)
        now = time.perf_counter_ns
        begin = now()
        while (work := strategy.next_index()) is not None:
            index, shard, num_shards = work
            compute, blocked = part.compute_ns, comm.wait_ns + part.library_wait_ns
            self.beat.enter(Phase.DATA, self.step)
            fetch = now()
            batch = workload.batch(index, shard=shard, num_shards=num_shards)
            data = now() - fetch
            self.beat.enter(Phase.COMPUTE, self.step)
            try:
                loss = strategy.step(batch)
            except Diverged:
                clock.add((begin, now(), data, 0, 0, index * num_shards + shard, 0), math.nan)
                break
            self.step += 1
            if owner:
                measured.snapshots.offer(strategy.snapshot(), samples=self.step * global_batch, version=self.step)
            end = now()
            compute, blocked = part.compute_ns - compute, comm.wait_ns + part.library_wait_ns - blocked
            clock.add((begin, end, data, compute, blocked, index * num_shards + shard, batch.num_samples), loss)
            begin = end
        strategy.finish()
        self._stop(measured, meter, training)
        if owner:
            samples = sum(clock.to_json()["samples"]) * training.topology.num_workers
            measured.snapshots.offer(strategy.snapshot(), samples=samples, version=self.step, last=True)
        return measured

    def _serve(self, training: Training) -> Measured:
        """A server's loop is the topology's; this takes snapshots of its slice."""
        owner = training.strategy.snapshot_of == "servers"
        measured = self._measured(training, owner)
        shard = training.shard()

        def on_update(samples: int, version: int) -> None:
            self.step = version
            if owner:
                measured.snapshots.offer(shard, samples=samples, version=version)

        meter = self._meter()
        self._start(measured, meter)
        if owner:
            measured.snapshots.offer(shard, samples=0, version=0)
        measured.server = training.serve(on_update)
        self._stop(measured, meter, training)
        if owner:
            samples = int(measured.server.num_pushes * training.recipe.global_batch / training.topology.num_workers)
            measured.snapshots.offer(shard, samples=samples, version=measured.server.version, last=True)
        measured.events = {"updates": measured.server.version}
        return measured

    def _measured(self, training: Training, owner: bool) -> Measured:
        recipe = training.recipe
        every = training.workload.target.evaluate_every if owner else 0
        snapshots = Snapshots(every, self.job.run_dir, str(self.job.rank))
        return Measured(StepClock(recipe.budget // recipe.global_batch + 1), snapshots)

    def _meter(self) -> WireMeter:
        return WireMeter(
            self.comm.barrier,
            interface=self.job.interface,
            private=self.job.private_network,
            reason=self.job.network_reason,
            reads=self.job.local_rank == 0,
        )

    def _start(self, measured: Measured, meter: WireMeter) -> None:
        meter.start()
        self.comm.wait_ns = self.comm.ticket_wait_ns = self.part.compute_ns = self.part.library_wait_ns = 0
        measured.cpu_s = -time.process_time()
        measured.start_ns = time.perf_counter_ns()

    def _all_ended(self, training: Training) -> int:
        """Waits until every rank has ended its loop or is known to be lost; returns how many are lost.

        Only for strategies that survive a worker: a barrier with a dead rank would not return. Counts in the store.
        """
        if getattr(training.strategy, "survives", "none") != "worker":
            return 0
        self.store.add("ended", 1)
        while True:
            lost = int(self.store.add("lost", 0))
            if int(self.store.add("ended", 0)) + lost >= self.comm.size:
                return lost
            time.sleep(0.002)

    def _leave(self) -> None:
        """Nobody takes the store away while a peer still needs it."""
        if not self.lost:
            self.comm.barrier()
            return
        self.store.add("left", 1)
        while self.comm.rank == 0 and int(self.store.add("left", 0)) + self.lost < self.comm.size:
            time.sleep(0.01)

    def _stop(self, measured: Measured, meter: WireMeter, training: Training) -> None:
        """The loop ends here: later traffic (snapshots, barriers) is not the strategy's."""
        measured.end_ns = time.perf_counter_ns()
        measured.cpu_s += time.process_time()
        measured.traffic = copy.deepcopy(self.comm.traffic)
        measured.events = dict(training.strategy.events)
        begin, before = time.perf_counter_ns(), self.comm.wait_ns
        self.lost = self._all_ended(training)
        if self.lost:
            measured.wire = WireBytes(reason=f"{self.lost} of {self.comm.size} ranks were lost: no common reading")
            return
        measured.wire = meter.stop()
        measured.barrier_ns = time.perf_counter_ns() - begin
        self.comm.wait_ns = before
        if payload_source(training) == "derived" and training.topology.num_workers > 1:
            measured.derived = self._derive(training, measured)

    def _derive(self, training: Training, measured: Measured) -> Traffic | None:
        """One more step, untimed, under the dispatch mode. Not after a divergence: the ranks may stand apart."""
        losses = measured.clock.to_json()["loss"]
        if not losses or None in losses:
            return None
        flat = training.part.params.clone()
        num_workers = training.topology.num_workers
        with TrafficMode() as seen:
            training.strategy.step(training.workload.batch(0, shard=self.comm.rank, num_shards=num_workers))
        training.part.params.copy_(flat)
        return derive(seen.calls, num_workers)

    # -- after the loop ---------------------------------------------------------------------------------------

    def _evaluate(self, training: Training, measured: Measured) -> dict[str, Any] | None:
        """The curve, on the rank that owns the snapshots; with several servers the first one gathers the slices."""
        snapshots, topology = measured.snapshots, training.topology
        if training.strategy.snapshot_of == "servers" and training.is_server:
            vectors = self._gather_slices(training, snapshots)
        elif training.strategy.snapshot_of == "replica" and self.comm.rank == 0:
            vectors = [snapshots[position] for position in range(len(snapshots))]
        else:
            return None
        if self.comm.rank not in (0, topology.num_workers):
            return None
        metrics: list[float | None] = []
        for vector in vectors:
            training.part.params.copy_(vector)
            value = training.workload.evaluate(training.part.infer)
            metrics.append(value if math.isfinite(value) else None)
        last = vectors[-1].detach().cpu().contiguous().numpy() if vectors else np.zeros(0)
        return {
            "samples": snapshots.samples[: len(vectors)],
            "version": snapshots.version[: len(vectors)],
            "time_ns": snapshots.time_ns[: len(vectors)],
            "metric": metrics,
            "checksum": hashlib.sha256(last.tobytes()).hexdigest(),
        }

    def _gather_slices(self, training: Training, snapshots: Snapshots) -> list[Tensor]:
        """Slices of equal position, joined on the first server (traffic outside the run)."""
        topology, comm = training.topology, self.comm
        first, ranks = topology.num_workers, range(topology.num_workers + 1, comm.size)
        mine = [snapshots[position] for position in range(len(snapshots))]
        count = torch.tensor([len(mine)])
        if comm.rank != first:
            comm.send(count, first)
            for vector in mine:
                if vector.numel():
                    comm.send(vector.contiguous(), first)
            return []
        slices = [mine]
        for rank in ranks:
            comm.recv(count, rank)
            start, stop = topology.slice_of(rank - first, training.part.params.numel())  # type: ignore[attr-defined]
            received = [torch.empty(stop - start, dtype=training.part.params.dtype) for _ in range(int(count))]
            for vector in received:
                if vector.numel():
                    comm.recv(vector, rank)
            slices.append(received)
        return [torch.cat(pieces) for pieces in zip(*slices, strict=False)]

    def _record(self, training: Training, measured: Measured, evaluations: dict[str, Any] | None) -> dict[str, Any]:
        """This rank's file. Everything in integers of ns and bytes; `assemble.py` makes the run of it."""
        server = measured.server
        return {
            "rank": self.job.rank,
            "role": "server" if training.is_server else "worker",
            "start_ns": measured.start_ns,
            "end_ns": measured.end_ns,
            "ready_s": time.process_time(),
            "steps": measured.clock.to_json(),
            "compute_ns": self.part.compute_ns,
            "blocked_ns": self.comm.wait_ns + self.part.library_wait_ns,
            "blocked_reason": getattr(training.strategy, "blocked_reason", None),
            "ticket_wait_ns": self.comm.ticket_wait_ns,
            "barrier_ns": measured.barrier_ns,
            "cpu_s": measured.cpu_s,
            "peak_rss_bytes": memory.peak_rss_bytes(),
            "traffic": measured.traffic.to_json(),
            "derived": measured.derived.to_json() if measured.derived is not None else None,
            "payload_source": payload_source(training),
            "events": measured.events,
            "wire": measured.wire.to_json(),
            "server": _server_json(server),
            "evaluations": evaluations,
            "straggler": self._straggler_json(),
            "num_parameters": training.part.params.numel(),
            "shapes": {name: list(shape) for name, shape in training.part.shapes.items()},
            "snapshot_of": training.strategy.snapshot_of,
            "clip": training.recipe.clip_norm is not None,
            "global_batch": training.recipe.global_batch,
            "budget": training.recipe.budget,
            "target": vars(training.workload.target),
        }

    def _predicted(self, training: Training, measured: Measured) -> dict[str, Any] | None:
        """On rank 0: what the strategy's own file says this run must have sent, from shapes and recorded events."""
        self.store.set(f"events/{self.comm.rank}", json.dumps(measured.events))
        if self.comm.rank != 0 or self.lost:
            return None
        events = trainings.gather_events(
            [json.loads(self.store.get(f"events/{rank}")) for rank in range(self.comm.size)]
        )
        return training.strategy.predicted_traffic(training.part.shapes, events, training.setting).to_json()

    def _straggler_json(self) -> dict[str, Any] | None:
        return {"factor": self.slow_down, "how": "busy" if self.busy else "sleep"} if self.slow_down > 1 else None

    # -- small things ----------------------------------------------------------------------------------------

    def _timed(self, part: Part, rank: int) -> TimedPart:
        self.part = TimedPart(part, slow_down=self.slow_down, busy=self.busy)
        return self.part

    def _enter(self, phase: str) -> None:
        self.beat.enter(_PHASES[phase], self.step)

    def _check_equal_start(self, training: Training) -> None:
        """All ranks must start from the same bits: a same-seed start that differs is a broken workload."""
        digest = hashlib.sha256(training.part.params.detach().cpu().numpy().tobytes()).hexdigest()
        store = self.store
        store.set(f"start/{self.comm.rank}", digest)
        if self.comm.rank == 0:
            for rank in range(1, self.comm.size):
                if store.get(f"start/{rank}").decode() != digest:
                    raise RuntimeError(
                        f"rank {rank} starts from other parameters than rank 0 with the same seed {self.cell.seed}: "
                        "layers() must depend on torch's random state only"
                    )


def run_rank(job: RankJob) -> None:
    """One rank of one cell, from connecting to its file."""
    Rank(job).run()


def goodbye(job: RankJob) -> None:
    """Says goodbye to every server in the place of a dead worker (strategies with `survives = "worker"`)."""
    cell, store = cells.from_json(job.cell), _client(job)
    comm = ProcessComm(World(store, lambda: store), rank=job.rank, size=cell.world_size, group=NO_GROUP)
    topology = trainings.make("topology", cell.topology, trainings.options_for(cell, "topology"))
    topology.start(comm, num_servers=cell.num_servers)
    topology.goodbye()
    store.add("lost", 1)


def connect(job: RankJob, cell: Cell, store: Any, on_phase: Any) -> ProcessComm:
    """Joins the run's process group. torch's default group is made too: DDP and the other libraries use it."""
    timeout_s = job.timeout_s + PROCESS_GROUP_GRACE_S
    dist.init_process_group(
        cell.backend,
        store=dist.PrefixStore("default", store),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    world = World(store, lambda: _client(job), backend=cell.backend, interface=job.interface, timeout_s=timeout_s)
    return ProcessComm(
        world, rank=job.rank, size=job.world_size, group=dist.group.WORLD, hosts=job.hosts, on_phase=on_phase
    )


def open_store(job: RankJob) -> Any:
    """This rank's client of the store; rank 0 hosts it on the socket it was handed, unless somebody else does."""
    if job.store_is_hosted or job.rank != 0:
        return _client(job)
    hosted = dist.TCPStore(
        job.store_host,
        job.store_port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=job.timeout_s + PROCESS_GROUP_GRACE_S),
        master_listen_fd=job.store_listen_fd,
    )
    return dist.PrefixStore(f"cell/{job.store_prefix}", hosted)


def _client(job: RankJob) -> Any:
    timeout = timedelta(seconds=job.timeout_s + PROCESS_GROUP_GRACE_S)
    client = dist.TCPStore(job.store_host, job.store_port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(f"cell/{job.store_prefix}", client)


def payload_source(training: Training) -> str:
    """`counted` by our own sends, or `derived` from library calls."""
    source = getattr(training.strategy, "payload_source", None) or getattr(training.topology, "payload_source", "counted")
    return str(source)


def _server_json(log: ServerLog | None) -> dict[str, Any] | None:
    if log is None:
        return None
    return {
        "log": log.columns(),
        "versions": log.version,
        "replies": log.replies,
        "first_read": log.first_read,
        "last_read": log.last_read,
        "overlapped_replies": log.overlapped_replies,
    }

