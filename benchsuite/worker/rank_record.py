"""What one rank writes down; `benchsuite/results/assemble/` makes the run of all ranks' records.

Everything is in integers of ns and bytes, so that sums over ranks are exact.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from benchsuite.comm.traffic import Calls, Traffic
from benchsuite.measure.memory import RankMemory
from benchsuite.measure.wire import WireBytes
from benchsuite.plan.hashing import finite
from benchsuite.topology.server_log import ServerLog
from benchsuite.worker.clock import StepClock
from benchsuite.worker.job import RankJob
from benchsuite.worker.setup import Training
from benchsuite.worker.snapshots import Snapshots
from benchsuite.worker.traffic_mode import derived_total
from benchsuite.workload import Workload


@dataclass
class Measured:
    """What the loop left behind on this rank."""

    clock: StepClock
    snapshots: Snapshots
    start_ns: int = 0
    end_ns: int = 0
    # Totals of the loop alone: later steps and barriers do not count.
    compute_ns: int = 0
    blocked_ns: int = 0
    ticket_wait_ns: int = 0
    cpu_s: float = 0.0
    wire: WireBytes = field(default_factory=WireBytes)
    traffic: Traffic = field(default_factory=Traffic)
    calls: Calls = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    server: ServerLog | None = None
    # What a library sent that calls itself (ddp), derived from steps after the run.
    derived: Traffic | None = None
    # What a part of a model-parallel replica says of itself at the loop's end.
    part_facts: dict[str, Any] = field(default_factory=dict)
    # What the library sent from part to part of a replica, derived from one gradient.
    derived_inside: Traffic | None = None
    barrier_ns: int = 0  # waiting for the others at the end
    memory: RankMemory = field(default_factory=RankMemory)
    device: dict[str, Any] | None = None  # of a rank on a device: `device_figures`


def rank_record(
    job: RankJob, training: Training, measured: Measured, evaluations: dict[str, Any] | None
) -> dict[str, Any]:
    """The document of this rank's file."""
    server = measured.server
    return {
        "rank": job.rank,
        "role": "server" if training.is_server else "worker",
        "start_ns": measured.start_ns,
        "end_ns": measured.end_ns,
        "host": job.hosts[job.rank] if job.hosts else 0,
        "life_cpu_s": time.process_time(),
        "steps": measured.clock.to_json(),
        "compute_ns": measured.compute_ns,
        "blocked_ns": measured.blocked_ns,
        "blocked_reason": training.strategy.blocked_reason,
        "ticket_wait_ns": measured.ticket_wait_ns,
        "barrier_ns": measured.barrier_ns,
        "cpu_s": measured.cpu_s,
        "peak_rss_bytes": measured.memory.peak_rss_bytes,
        "base_rss_bytes": measured.memory.base_rss_bytes,
        "peak_model_bytes": measured.memory.peak_model_bytes,
        "device": measured.device,
        "traffic": measured.traffic.to_json(),
        "derived": measured.derived.to_json() if measured.derived is not None else None,
        # Of the collectives that this rank was the first of. None where nobody called any through
        # `Comm`: ddp calls the library by itself.
        "derived_total": _derived_total(measured),
        "payload_source": payload_source(training),
        "events": measured.events,
        "wire": measured.wire.to_json(),
        "server": _server_json(server),
        "evaluations": evaluations,
        "snapshots": {"samples": measured.snapshots.samples, "time_ns": measured.snapshots.time_ns},
        "num_parameters": training.part.params.numel(),
        "model_parallel": _model_parallel_json(training, measured),
        "shapes": {name: list(shape) for name, shape in training.part.shapes.items()},
        "snapshot_of": training.strategy.snapshot_of,
        "apart": training.strategy.apart,
        "per_rollout": training.batches.per_rollout,
        "per_push": training.batches.per_push,
        "queues": training.strategy.batches_per_trajectory > 0,
        "clip": training.recipe.clip_norm is not None,
        "global_batch": training.recipe.global_batch,
        "budget": training.recipe.budget,
        "target": vars(training.workload.target),
        **data_facts(training.workload),
    }


def data_facts(workload: Workload) -> dict[str, str]:
    """The sha256 of the workload's data; {} where seed and code say what the data are.

    It is taken of files that are the user's, or that came with this Python.
    """
    digest = workload.data_sha256
    return {"data_sha256": digest} if digest else {}


def payload_source(training: Training) -> str:
    """Whether payload bytes are `counted` by our own sends or `derived` from library calls.

    A library makes some of the sends of a model-parallel replica, so its bytes are derived.
    """
    if training.replica is not None:
        return "derived"

    return training.strategy.payload_source or training.topology.payload_source


def _derived_total(measured: Measured) -> dict[str, Any] | None:
    """Traffic of the library's calls, those through our comms and those inside a model-parallel
    replica.
    """
    calls = derived_total(measured.calls) if measured.calls else None
    known = [each for each in (calls, measured.derived_inside) if each is not None]

    return Traffic.total(known).to_json() if known else None


def _model_parallel_json(training: Training, measured: Measured) -> dict[str, Any] | None:
    """What this rank holds of a model-parallel replica; None where a replica is one rank.

    reads: whether its samples are its own, or another part reads the same ones. held: elements of
    its vector. owned: those of them that no other part counts.
    """
    if training.replica is None:
        return None

    part = training.replica
    return {
        "replica": training.comm.rank,
        "part": part.replica.part,
        "reads": part.replica.part == 0 or part.share(0, 1) != (0, 1),
        "held": part.params.numel(),
        "owned": part.num_owned,
        "facts": measured.part_facts,
    }


def _server_json(log: ServerLog | None) -> dict[str, Any] | None:
    """A server's log as plain columns; None on a worker."""
    if log is None:
        return None

    own: dict[str, Any] = {}
    if log.losses is not None:
        own["losses"] = [finite(loss) for loss in log.losses]
    return own | {
        "log": log.columns(),
        "versions": log.version,
        "replies": log.replies,
        "first_read": log.first_read,
        "last_read": log.last_read,
        "overlapped_replies": log.overlapped_replies,
        "num_abandoned": log.num_abandoned,
        "abandoned_versions": log.abandoned_versions,
    }
