"""The `result` section of a run file: byte-identical when a deterministic cell is repeated."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchsuite.comm.traffic import Traffic
from benchsuite.plan.cell import Cell
from benchsuite.plan.placement import ports
from benchsuite.plan.target import Target, first_reached
from benchsuite.results.assemble import lag, parts

Rank = Mapping[str, Any]
Losses = tuple[
    list[float | None], list[int], int
]  # losses, samples consumed at each, samples in all
LEVELS = ("easy", "target", "hard")


def deterministic(cell: Cell, ranks: Sequence[Rank]) -> dict[str, Any]:
    """The `result` section: samples, losses, curve, events, staleness, traffic."""
    workers = [rank for rank in ranks if rank["role"] == "worker" and parts.counts(rank)]
    server = next((rank["server"] for rank in ranks if rank["role"] == "server"), None)
    asynchronous = served(ranks)
    losses, consumed, samples = _losses(cell, ranks, workers, server)
    diverged = next((step for step, loss in enumerate(losses) if loss is None), None)
    lost = [rank for rank in range(cell.world_size) if rank not in {each["rank"] for each in ranks}]
    evaluations = next((rank["evaluations"] for rank in ranks if rank["evaluations"]), None) or {}
    metric = evaluations.get("metric", [])
    looked = evaluations.get("samples", [])
    assert all(a < b for a, b in itertools.pairwise(looked)), f"evaluated after {looked} samples"
    first = ranks[0]
    target = Target(**first["target"])
    # a run that diverges is a miss at every level, whatever it had reached before
    reached = {
        level: None
        if diverged is not None
        else first_reached(target, getattr(target, level), metric)
        for level in LEVELS
    }
    steps = _steps(ranks, workers, server)
    result: dict[str, Any] = {
        "samples": samples,
        "steps": steps,
        "updates": steps,
        "num_parameters": parts.num_parameters(ranks),
        "loss": losses,
        "loss_samples": consumed,
        "evaluations": {
            name: evaluations.get(name, []) for name in ("samples", "metric", "version")
        },
        "target": first["target"],
        "samples_to": {
            level: None if at is None else evaluations["samples"][at]
            for level, at in reached.items()
        },
        "final_loss": losses[-1]
        if losses and diverged is None
        else None,  # a stale worker's last one may be finite
        "final_metric": metric[-1] if metric else None,
        "diverged_step": diverged,
        "checksum": parts.checksum(ranks),
        "events": _events(cell, ranks),
        "staleness": _staleness(server) if asynchronous else None,
    }

    if "data_sha256" in first:  # of a text; other data are what seed and code say
        result["data_sha256"] = first["data_sha256"]
    return result | lag.section(cell, workers, server) | _traffic(cell, ranks, lost)


def _losses(
    cell: Cell, ranks: Sequence[Rank], workers: Sequence[Rank], server: Any
) -> tuple[list[float | None], list[int], int]:
    """Loss of every step, samples consumed by then, samples of the whole run.

    A loss of None is a step that diverged.
    """
    if served(ranks):
        losses, consumed, samples = _losses_served(cell, workers, server)
    elif apart(ranks):
        losses, consumed, samples = _losses_handed_out(workers)
    else:
        losses, consumed, samples = _losses_together(workers)

    if None not in losses and any(_diverged(worker) for worker in workers):
        # A gradient on parameters that are not finite is not pushed: the servers never saw it.
        losses.append(None)
        consumed.append(samples)

    return losses, consumed, samples


def _steps(ranks: Sequence[Rank], workers: Sequence[Rank], server: Any) -> int:
    """Updates of the run: the server's versions, or the workers' steps, together or one by one."""
    if served(ranks) and server:
        versions: int = server["versions"]
        return versions

    counts = [taken(worker) for worker in workers]
    return sum(counts) if apart(ranks) else max(counts)


def served(ranks: Sequence[Rank]) -> bool:
    """Whether the servers' parameters count, so that every push is an update."""
    return bool(ranks[0]["snapshot_of"] == "servers")


def apart(ranks: Sequence[Rank]) -> bool:
    """Whether workers do not step together."""
    return served(ranks) or bool(ranks[0]["apart"])


def taken(worker: Rank) -> int:
    """The number of steps that consumed samples (a diverged step did not)."""
    return sum(1 for samples in worker["steps"]["samples"] if samples)


def _diverged(worker: Rank) -> bool:
    """Whether a loss was not finite.

    A gradient that was given up has no loss either, and says nothing.
    """
    given_up = set(worker["steps"]["abandoned"])
    return any(
        loss is None and step not in given_up for step, loss in enumerate(worker["steps"]["loss"])
    )


def _losses_together(workers: Sequence[Rank]) -> Losses:
    """Losses of workers that step together: per step the mean over workers.

    None where one of them is not finite.
    """
    losses: list[float | None] = []
    consumed = []
    total = 0

    for step in range(min(len(worker["steps"]["loss"]) for worker in workers)):
        values = [worker["steps"]["loss"][step] for worker in workers]
        finite = [value for value in values if value is not None]
        losses.append(sum(finite) / len(finite) if len(finite) == len(values) else None)
        total += sum(worker["steps"]["samples"][step] for worker in workers)
        consumed.append(total)

    return losses, consumed, total


def _losses_handed_out(workers: Sequence[Rank]) -> Losses:
    """Losses of workers that batches are handed out to, in the order of the batches."""
    rows = []

    for worker in workers:
        steps = worker["steps"]
        rows += list(zip(steps["index"], steps["loss"], steps["samples"], strict=True))

    rows.sort(key=lambda row: row[0])
    consumed = []
    total = 0

    for _, _, samples in rows:
        total += samples
        consumed.append(total)

    return [loss for _, loss, _ in rows], consumed, total


def _losses_served(cell: Cell, workers: Sequence[Rank], server: Mapping[str, Any] | None) -> Losses:
    """Losses per push, in the order in which the first server took them.

    A batch's loss is found by its number. Batches whose gradient was given up count as samples. The
    losses of a lost worker went with it: its pushes count as samples and have no point on the
    curve.
    """
    assert server is not None
    per_push = workers[0]["global_batch"] * workers[0].get("per_push", 1) // cell.replicas
    loss_of = {
        index: (loss, samples)
        for worker in workers
        for index, loss, samples in zip(
            worker["steps"]["index"],
            worker["steps"]["loss"],
            worker["steps"]["samples"],
            strict=True,
        )
    }
    own = server.get("losses")  # of every push, where the server computed it
    losses: list[float | None] = []
    consumed = []
    total = 0

    for tag, given_up in zip(server["log"]["tag"], server["log"]["abandoned"], strict=True):
        loss, samples = loss_of.get(tag, (None, per_push))
        if own is not None:
            loss = own[len(losses)]
        total += samples

        if tag in loss_of or own is not None:
            losses.append(loss)
            consumed.append(total + given_up * per_push)

    return losses, consumed, total + server["num_abandoned"] * per_push


def _events(cell: Cell, ranks: Sequence[Rank]) -> dict[str, list[int]]:
    """The events of all ranks: name -> one number per rank, 0 for a rank that was lost."""
    names = sorted({name for rank in ranks for name in rank["events"]})
    by_rank = {rank["rank"]: rank["events"] for rank in ranks}
    return {
        name: [by_rank.get(rank, {}).get(name, 0) for rank in range(cell.world_size)]
        for name in names
    }


def _staleness(server: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Mean, maximum and histogram of the updates between a push's reading and its apply."""
    if server is None or not server["log"]["worker"]:
        return None

    log = server["log"]
    return lag.summary(
        [b - r for b, r in zip(log["version_before"], log["version_read"], strict=True)]
    )


def _traffic(cell: Cell, ranks: Sequence[Rank], lost: Sequence[int]) -> dict[str, Any]:
    """What the run sent, beside what was predicted; payload is None with the reason where it is
    not known.
    """
    counted = Traffic.total(Traffic.from_json(rank["traffic"]) for rank in ranks)
    source = ranks[0]["payload_source"]
    payload: Traffic | None = counted
    reason = None

    if lost:
        payload = None
        reason = f"what rank {', '.join(map(str, lost))} sent is not known: it was lost"
    elif any(rank["derived_total"] for rank in ranks):
        derived = [
            Traffic.from_json(rank["derived_total"]) for rank in ranks if rank["derived_total"]
        ]
        payload = Traffic.total([counted, *derived])
    elif source == "derived":
        one = next((rank["derived"] for rank in ranks if rank["derived"]), None)
        alone = sum(rank["role"] == "worker" for rank in ranks) == 1
        payload = counted + Traffic.from_json(one) if one else (counted if alone else None)
        if payload is None:
            reason = "derived from steps after the run, which a diverged run has not"

    predicted = next((rank["predicted"] for rank in ranks if rank["predicted"]), None)
    expected = Traffic.from_json(predicted) if predicted else None
    return parts.section(cell, ranks, payload) | {
        "predicted": predicted,
        "predicted_bytes": expected.payload_bytes if expected is not None else None,
        "payload": payload.to_json() if payload is not None else None,
        "payload_source": source,
        "payload_reason": reason,
        "payload_bytes": payload.payload_bytes if payload is not None else None,
        "shm_bytes": counted.shm_bytes,
        "messages": payload.num_messages if payload is not None else None,
        "busiest_port_bytes": payload.busiest_port(ports(cell)) if payload is not None else None,
    }
