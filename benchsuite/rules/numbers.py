"""The rules on numbers: counts, divisibility, bounds. No torch.

A rule is silent where a number is not known (a workload without a file states no batch). Options of
members that have no file yet are read under the names that stand here: local_steps (H),
warmup_steps, moving_rate, num_micro_batches (m), slack (s), num_environments.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from benchsuite.errors import UsageError
from benchsuite.measure.faults import check
from benchsuite.rules.combinations import MODEL_PARALLEL, SERVER
from benchsuite.rules.view import Problem, Problems, View

_FAULT = 'faults = [{ rank = 0, phase = "compute", step = 3, signal = "SIGKILL" }]'


def counts(view: View) -> Problems:
    """At least one of everything, servers only with a parameter server."""
    cell = view.cell
    for name in ("replicas", "model_parallel", "threads", "hosts"):
        if getattr(cell, name) < 1:
            yield Problem(
                "counts",
                f"{name} = {getattr(cell, name)}: at least 1 is needed",
                f"set {name} = 1 or more",
            )
    if view.name("topology") in SERVER and cell.num_servers < 1:
        yield Problem(
            "servers",
            f"topology = {view.label('topology')} with servers = {cell.num_servers}: it needs one "
            "at least",
            "set servers = 1 or more",
        )
    if view.name("topology") and view.name("topology") not in SERVER and cell.num_servers != 0:
        yield Problem(
            "servers",
            f"servers = {cell.num_servers} with topology = {view.label('topology')}, which has "
            "none",
            "set servers = 0, or topology = parameter_server",
        )
    if not view.name("topology") and cell.num_servers < 0:
        yield Problem(
            "servers", f"servers = {cell.num_servers}: a count", "set servers = 0 or more"
        )
    if view.name("parallel") == "data" and cell.model_parallel > 1:
        yield Problem(
            "model_parallel",
            f"model_parallel = {cell.model_parallel} with parallel = data: one rank is one replica",
            f"set model_parallel = 1, or parallel to one of {', '.join(MODEL_PARALLEL)}",
        )
    if cell.server_placement == "with_worker" and (
        cell.num_servers == 0 or cell.num_servers > cell.num_workers
    ):
        reason = (
            f"server_placement = with_worker: servers({cell.num_servers}) > "
            f"workers({cell.num_workers})"
        )
        if cell.num_servers == 0:
            reason = "server_placement = with_worker, and there is no server"
        yield Problem(
            "servers", reason, "set servers to at most the workers, or server_placement = own_host"
        )
    if cell.hosts > max(cell.world_size, 1):
        yield Problem(
            "hosts",
            f"hosts({cell.hosts}) > ranks({cell.world_size}): a host would have no rank",
            f"set hosts to at most {cell.world_size}",
        )


def budget(view: View) -> Problems:
    """At least one step in a positive time."""
    cell = view.cell
    samples = view.samples
    batch = view.global_batch
    if not cell.budget.timeout_s > 0:
        yield Problem(
            "budget",
            f"timeout_s = {cell.budget.timeout_s:g}: no run can end in it",
            "set budget.timeout_s above 0",
        )
    if cell.budget.steps is not None and cell.budget.steps < 1:
        yield Problem(
            "budget",
            f"steps = {cell.budget.steps}: at least 1 is needed",
            "set budget.steps = 1 or more",
        )
    elif samples is not None and samples < max(batch, 1):
        stated = "" if samples else " (neither the cell nor the preset states a budget)"
        yield Problem(
            "budget",
            f"samples({samples}) < global batch({batch}){stated}: not one step",
            f"set budget.samples to {max(batch, 1)} or more",
        )


def global_batch(view: View) -> Problems:
    """Every worker (and micro-batch) gets the same number of samples."""
    cell = view.cell
    batch = view.global_batch
    stated = view.number("workload", "global_batch")
    if stated is not None and stated < 1:
        yield Problem(
            "global batch",
            f"global_batch = {stated:g}: a step has 1 sample or more",
            f"set options.{view.label('workload')}.global_batch = 1 or more",
        )
    if batch <= 0 or cell.replicas < 1:
        return
    available = view.preset.get("num_samples")
    if isinstance(available, int) and batch > available:
        yield Problem(
            "global batch",
            f"global batch({batch}) > num_samples({available}): a step would take the data twice",
            "set the workload's global_batch (fixed_per_worker: x replicas) to at most "
            f"{available}",
        )
    parts = cell.replicas
    formula = f"replicas({cell.replicas})"
    micro = view.number("parallel", "num_micro_batches")
    if micro and (micro > 1 or view.name("parallel") == "pipeline"):
        parts = parts * int(micro)
        formula = f"{formula} x num_micro_batches({micro:g})"
    if view.name("parallel") == "fsdp":
        parts = parts * cell.model_parallel
        formula = f"{formula} x model_parallel({cell.model_parallel})"
    if parts > 0 and batch % parts:
        yield Problem(
            "global batch",
            f"global batch({batch}) is not divisible by {formula} = {parts}: {batch} % {parts} = "
            f"{batch % parts}",
            "set replicas to a divisor, or the workload's global_batch to a multiple",
        )


def local_steps(view: View) -> Problems:
    """The run ends with a synchronisation: (steps - warmup) % H == 0."""
    if view.name("sync") not in ("local_sgd", "diloco", "ddp"):
        return
    sync = view.label("sync")
    every = view.number("sync", "local_steps")
    warmup = view.number("sync", "warmup_steps") or 0
    if warmup < 0:
        yield Problem(
            "local steps",
            f"warmup_steps = {warmup:g} of {sync}: steps that agree at first, 0 or more",
            "set warmup_steps = 0",
        )
        return
    if sync == "ddp" and every == 1:
        return  # gradients agree in every step
    if every is not None and every < 1:
        yield Problem(
            "local steps",
            f"local_steps = {every:g} of {sync}: 1 or more is needed",
            "set local_steps = 1",
        )
    elif (
        every and view.steps is not None and (warmup > view.steps or (view.steps - warmup) % every)
    ):
        yield Problem(
            "local steps",
            f"(steps({view.steps}) - warmup_steps({warmup:g})) % local_steps({every:g}) is "
            f"{(view.steps - warmup) % every:g}: the run would not end with a synchronisation of "
            f"{sync}",
            "set local_steps to a divisor, or the budget to a multiple",
        )


def fragments(view: View) -> Problems:
    """Fragments of diloco agree at even distances, one after the other, and past servers."""
    if view.name("sync") != "diloco":
        return
    every, pieces, delay = (
        view.number("sync", name) for name in ("local_steps", "fragments", "delay")
    )
    if every is None or pieces is None or delay is None or every < 1:
        return
    if pieces < 1 or every % pieces:
        yield Problem(
            "fragments",
            f"fragments({pieces:g}) does not divide local_steps({every:g}): they agree in turn",
            "set fragments to a divisor of local_steps",
        )
    elif not 0 <= delay < every // pieces:
        yield Problem(
            "fragments",
            f"delay = {delay:g} with local_steps({every:g}) / fragments({pieces:g}) = "
            f"{every // pieces:g}: a mean is "
            "there before the next fragment's turn",
            f"set delay to 0 .. {every // pieces - 1:g}",
        )
    if view.name("topology") in SERVER and (pieces > 1 or delay > 0):
        yield Problem(
            "fragments",
            f"fragments = {pieces:g} and delay = {delay:g} with topology = "
            f"{view.label('topology')}: a server averages "
            "whole vectors, and its answer is waited for",
            "set fragments = 1 and delay = 0, or topology to a collective",
        )


def elastic(view: View) -> Problems:
    """N x moving_rate <= 1 and 0 < moving_rate < 1."""
    rate = view.number("sync", "moving_rate") if view.name("sync") == "elastic_averaging" else None
    if rate is None:
        return
    replicas = view.cell.replicas
    if not 0 < rate < 1:
        yield Problem(
            "moving rate",
            f"moving_rate = {rate:g}: 0 < moving_rate < 1 is needed",
            "set moving_rate = 0.1",
        )
    elif replicas * rate > 1 + 1e-12:
        yield Problem(
            "moving rate",
            f"replicas({replicas}) x moving_rate({rate:g}) = {replicas * rate:g} > 1: the centre "
            "would overshoot",
            f"set moving_rate to at most {1 / replicas:.4g}",
        )


def strategies(view: View) -> Problems:
    """Bounds of single strategies: staleness slack, backup workers, gossip pairs."""
    cell = view.cell
    sync = view.name("sync")
    slack = view.number("sync", "slack") if sync == "stale_synchronous" else None
    if slack is not None and slack < -1:
        yield Problem(
            "slack",
            f"slack = {slack:g}: steps ahead, 0 or more, or -1 for no bound",
            "set slack = 0 or -1",
        )
    backups = view.number("sync", "backup_workers") if sync in ("k_sync", "synchronous") else None
    if backups is not None and not 0 <= backups < max(cell.replicas, 1):
        yield Problem(
            "backup workers",
            f"backup_workers({backups:g}) of replicas({cell.replicas}): K = N - c = "
            f"{cell.replicas - backups:g}, "
            f"and 1 <= K <= {cell.replicas} is needed",
            f"set backup_workers to 0 .. {max(cell.replicas, 1) - 1}",
        )
    if (
        sync == "k_sync"
        and view.option("sync", "late") == "cancel"
        and view.option("sync", "wait") is False
    ):
        yield Problem(
            "late",
            "late = cancel with wait = false: without waiting no gradient is too late",
            "set late = finish, or wait = true",
        )
    if sync == "k_sync" and cell.num_servers > 1:
        yield Problem(
            "k_sync servers",
            f"servers = {cell.num_servers} with sync = k_sync: each would close its versions with "
            "other workers'",
            "set servers = 1",
        )
    if view.name("topology") == "random_matching" and cell.replicas % 2:
        yield Problem(
            "random matching",
            f"replicas = {cell.replicas} is odd: in a matching every worker has a partner",
            "set an even number of replicas, or topology = ring_neighbours",
        )
    seed = view.number("topology", "seed")
    if view.name("topology") == "random_matching" and seed is not None and seed < 0:
        yield Problem(
            "random matching",
            f"seed = {seed:g} of random_matching: 0 or more is needed",
            "set seed = 0",
        )


def learning_rate(view: View) -> Problems:
    """A factor that leaves the recipe a learning rate."""
    factor = view.cell.lr_factor
    if not 0 < factor < math.inf:
        yield Problem(
            "lr_factor",
            f"lr_factor = {factor:g}: the recipe's learning rate times this, a number above 0",
            "set lr_factor = 1, or e.g. 0.5",
        )


def straggler(view: View) -> Problems:
    """Workers that exist, and slower rather than faster."""
    workers = view.cell.num_workers
    for worker, factor in view.cell.straggler.items():
        if not 0 <= int(worker) < workers:
            yield Problem(
                "straggler",
                f"straggler.{worker} with {workers} workers: they are numbered 0 to {workers - 1}",
                "give a worker's number, or more replicas",
            )
        if not factor >= 1:
            yield Problem(
                "straggler",
                f"straggler.{worker} = {factor:g}: a factor of the step's compute time, 1 or more",
                f"set e.g. straggler.{worker} = 4.0",
            )


def options(view: View) -> Problems:
    """Threads, buckets, periods, segments and micro-batches: 1 or more."""
    of_sync = (("sync", name) for name in ("server_threads", "bucket_cap_mb", "period"))
    for axis, name in (*of_sync, ("topology", "segment_kib"), ("parallel", "num_micro_batches")):
        value = view.number(axis, name)
        if value is not None and value < 1:
            yield Problem(
                "counts",
                f"{name} = {value:g} of {view.label(axis)}: at least 1 is needed",
                f"set options.{view.label(axis)}.{name} = 1 or more",
            )


def faults(view: View) -> Problems:
    """An injected fault has its four keys, and hits a rank that exists in a phase that exists."""
    for fault in view.cell.faults:
        step = fault.get("step")
        rank = fault.get("rank")
        if not isinstance(rank, int) or not 0 <= rank < view.cell.world_size:
            yield Problem(
                "faults",
                f"fault in rank {rank!r} of {view.cell.world_size} ranks",
                f"set rank to 0 .. {view.cell.world_size - 1}",
            )
            continue
        try:
            check([fault], view.cell.world_size)
        except UsageError as error:
            yield Problem("faults", str(error), f"write e.g. {_FAULT}")
            continue
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            yield Problem(
                "faults", f"fault at step {step!r}: an integer, 0 or more", f"write e.g. {_FAULT}"
            )


RULES: tuple[Callable[[View], Problems], ...] = (
    counts,
    budget,
    global_batch,
    local_steps,
    fragments,
    elastic,
    strategies,
    learning_rate,
    straggler,
    options,
    faults,
)
