"""The rules on numbers of a cell: counts, divisibility, bounds.

A rule is silent where a number is not known, e.g. where a workload states no batch. Bounds of a
member's own options stand in the member's file. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from benchsuite.errors import UsageError
from benchsuite.plan.declared import SERVER
from benchsuite.plan.faults import check
from benchsuite.rules.view import Problem, Problems, View, names_of, one_of

PLACE = 30

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

    if view.has_servers and cell.num_servers < 1:
        yield Problem(
            "servers",
            f"topology = {view.label('topology')} with servers = {cell.num_servers}: it needs one "
            "at least",
            "set servers = 1 or more",
        )

    if view.topology.kind and not view.has_servers and cell.num_servers != 0:
        yield Problem(
            "servers",
            f"servers = {cell.num_servers} with topology = {view.label('topology')}, which has "
            "none",
            f"set servers = 0, or topology = {one_of(names_of('topology', kind=SERVER))}",
        )

    if not view.topology.kind and cell.num_servers < 0:
        yield Problem(
            "servers", f"servers = {cell.num_servers}: a count", "set servers = 0 or more"
        )

    if not view.parallel.divides and cell.model_parallel > 1:
        dividing = ", ".join(names_of("parallel", divides=True))
        yield Problem(
            "model_parallel",
            f"model_parallel = {cell.model_parallel} with parallel = {view.label('parallel')}: one "
            "rank is one replica",
            f"set model_parallel = 1, or parallel to one of {dividing}",
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
    if micro and (micro > 1 or view.parallel.stages):
        parts = parts * int(micro)
        formula = f"{formula} x num_micro_batches({micro:g})"

    if view.parallel.divides_batch:
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
    option = view.sync.agrees_after
    if not option:
        return

    sync = view.label("sync")
    every = view.number("sync", option)
    warmup = view.number("sync", "warmup_steps") or 0
    if warmup < 0:
        yield Problem(
            "local steps",
            f"warmup_steps = {warmup:g} of {sync}: steps that agree at first, 0 or more",
            "set warmup_steps = 0",
        )
        return

    if view.sync.every_step and every == 1:
        return  # gradients agree in every step
    if every is not None and every < 1:
        yield Problem(
            "local steps",
            f"{option} = {every:g} of {sync}: 1 or more is needed",
            f"set {option} = 1",
        )
        return

    if not every or view.steps is None:
        return

    left = view.steps - warmup
    if left < 0 or left % every:
        yield Problem(
            "local steps",
            f"(steps({view.steps}) - warmup_steps({warmup:g})) % {option}({every:g}) is "
            f"{left % every:g}: the run would not end with a synchronisation of {sync}",
            f"set {option} to a divisor, or the budget to a multiple",
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
    learning_rate,
    straggler,
    faults,
)
