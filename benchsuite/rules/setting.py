"""The rules on clock, backend, device, cluster and links.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from benchsuite.plan import compute_time, declared, plugins
from benchsuite.plan.cell import Cell
from benchsuite.rules.view import Problem, Problems, View, names_of, one_of

PLACE = 60
LARGEST_VIRTUAL_RING = 128
LARGEST_VIRTUAL_WORLD = 4096
LINKS = {"link_mbit": (1e-3, 1e9, "Mbit/s"), "link_latency_us": (0.0, 1e9, "us")}


@dataclass(frozen=True)
class Machine:
    """What the torch of a machine can do; None = nobody has looked."""

    torch: str | None = None
    num_cuda_devices: int | None = None
    gloo: bool | None = None
    nccl: bool | None = None
    mpi: bool | None = None


def clock(view: View) -> Problems:
    """The virtual clock simulates compute and network of plain data-parallel ranks."""
    if view.cell.clock == "wall":
        yield from _only_simulated(view)
        return
    for holds, what, why, remedy in _not_simulated(view):
        if holds:
            yield Problem(
                "virtual clock",
                f"{what} with clock = virtual: {why}",
                f"set {remedy}, or clock = wall",
            )
    yield from _links_inside_a_host(view)
    yield from _compute_time(view)


def _only_simulated(view: View) -> Problems:
    """Fields that mean something under the virtual clock only."""
    cell = view.cell
    given = {
        "compute_time": cell.compute_time is not None,
        "receive_cost": cell.receive_cost is not None,
        "gradients = none": cell.gradients == "none",
    }
    for what in (name for name, is_given in given.items() if is_given):
        yield Problem(
            "wall clock",
            f"{what} with clock = wall: real ranks take the time they take",
            f"set clock = virtual, or leave {what.partition(' ')[0]} out",
        )


def _not_simulated(view: View) -> tuple[tuple[bool, str, str, str], ...]:
    """(whether it is asked for, what, why it is not simulated, what to set) of each limit."""
    cell = view.cell
    return (
        *_wall_only(view),
        (_without_lock(view), "lock = none", "torn reads need real threads", "lock = exclusive"),
        (
            cell.device != "cpu",
            f"device = {cell.device}",
            "simulated workers share one process",
            "device = cpu",
        ),
        (
            cell.precision == "bf16",
            "precision = bf16",
            "simulated gradients are batched calls of a traced graph",
            "precision = fp32",
        ),
        (
            _num_micro_batches(view) > 1,
            f"num_micro_batches = {_num_micro_batches(view):g}",
            "a simulated gradient is computed whole, in its one compute time",
            "num_micro_batches = 1",
        ),
        (cell.backend != "gloo", f"backend = {cell.backend}", "nothing is sent", "backend = gloo"),
        (
            cell.threads != 1,
            f"threads = {cell.threads}",
            "a simulation runs in one thread",
            "threads = 1",
        ),
        (
            cell.world_size > LARGEST_VIRTUAL_WORLD,
            f"{cell.world_size} ranks",
            f"up to {LARGEST_VIRTUAL_WORLD} are simulated",
            f"replicas + servers to at most {LARGEST_VIRTUAL_WORLD}",
        ),
        (bool(cell.faults), "faults", "there is no process to strike", "faults = []"),
        (
            cell.cluster != "local",
            f"cluster = {cell.cluster}",
            "one process simulates all hosts",
            "cluster = local",
        ),
        (
            view.topology.all_to_all and cell.replicas > LARGEST_VIRTUAL_RING,
            f"topology = {view.label('topology')} with replicas = {cell.replicas}",
            f"2 N (N-1) messages of a mean are simulated up to {LARGEST_VIRTUAL_RING}",
            "topology = native (one priced rendezvous)",
        ),
    )


def _links_inside_a_host(view: View) -> Problems:
    """A topology that works inside a host has no link there that could be slow."""
    cell = view.cell
    linked = cell.link_mbit is not None or bool(cell.link_latency_us)
    if view.topology.by_host and cell.hosts == 1 and cell.replicas > 1 and linked:
        label = view.label("topology")
        yield Problem(
            "virtual clock",
            f"topology = {label} on links with hosts = 1, which stands for one host per rank in "
            f"virtual time: within one host {label} moves nothing over a link",
            "set hosts = 2 or more, or leave link_mbit and link_latency_us out",
        )


def _wall_only(view: View) -> Iterator[tuple[bool, str, str, str]]:
    """Members that say themselves why they cannot be simulated."""
    for axis in ("sync", "parallel", "topology", "compression", "workload"):
        says = view.says(axis)
        instead = says.simulate_instead or getattr(Cell, axis)
        what = f"{axis} = {view.label(axis)}"
        yield bool(says.wall_only), what, says.wall_only, f"{axis} = {instead}"


def _compute_time(view: View) -> Problems:
    for reason, remedy in compute_time.problems(view.cell.compute_time or compute_time.DEFAULT):
        yield Problem("compute_time", reason, remedy)

    known = {"copy_s_per_gib": 0.0, "incast": 1.0}
    for name, value in (view.cell.receive_cost or {}).items():
        if name not in known:
            yield Problem(
                "receive_cost",
                plugins.unknown("key", name, known, of="receive_cost"),
                f"leave {name} out",
            )
        elif isinstance(value, (bool, str)) or value < known[name]:
            yield Problem(
                "receive_cost",
                f"{name} = {value!r}: a number of at least {known[name]:g} is needed",
                f"set receive_cost.{name} = {known[name]:g} or more",
            )


def backend(view: View) -> Problems:
    """What NCCL cannot do."""
    cell = view.cell
    if cell.backend != "nccl":
        return
    if cell.device != "cuda":
        yield Problem(
            "nccl",
            f"backend = nccl with device = {cell.device}: NCCL moves GPU memory, one device per "
            "local rank",
            "set device = cuda, or backend = gloo",
        )

    if view.sync.cpu_only:
        yield Problem(
            "nccl",
            f"backend = nccl with sync = {view.label('sync')}, which works on CPU memory",
            "set backend = gloo",
        )
    elif _without_lock(view):
        yield Problem(
            "nccl",
            "backend = nccl with lock = none: threads on one device's communicator can deadlock",
            "set lock = exclusive, or backend = gloo",
        )


def device(view: View) -> Problems:
    """What works on the host's memory only."""
    cell = view.cell
    if cell.device == "cpu":
        return
    if cell.compression != "none" and not view.sync.calls_library:
        yield Problem(
            "cuda",
            f"compression = {view.label('compression')} with device = {cell.device}: a codec works "
            "on the host",
            f"set compression = none, sync = {one_of(names_of('sync', calls_library=True))} (the "
            "library's own hooks), or device = cpu",
        )


def precision(view: View) -> Problems:
    """Autocast is asked of the part that runs forward and loss."""
    if view.cell.precision == "bf16" and not view.parallel.autocast:
        yield Problem(
            "precision",
            f"precision = bf16 with parallel = {view.label('parallel')}: it does not run under "
            "autocast",
            "set parallel = data, or precision = fp32",
        )


def cluster(view: View) -> Problems:
    """Several hosts and links need somebody who has them."""
    cell = view.cell
    engine = cast(declared.Cluster, view.says("cluster"))
    if cell.hosts > 1 and cell.clock == "wall" and not engine.several_hosts:
        engines = names_of("cluster", several_hosts=True)
        yield Problem(
            "hosts",
            f"hosts = {cell.hosts} with cluster = {cell.cluster}, which starts ranks on this "
            "machine only",
            f"set hosts = 1, or cluster to {one_of(engines)}",
        )

    if cell.hosts > 1 and cell.clock == "wall" and cell.server_placement == "with_worker":
        yield Problem(
            "hosts",
            f"server_placement = with_worker on hosts = {cell.hosts}, where ranks are started in "
            "order: the "
            "servers, the last ones, share the last host",
            "set server_placement = own_host, or clock = virtual",
        )

    for name in ("link_mbit", "link_latency_us"):
        value = getattr(cell, name)
        if value is None:
            continue

        least, most, unit = LINKS[name]
        if not least <= value <= most:
            yield Problem(
                "links",
                f"{name} = {value:g}: a link has {least:g} to {most:g} {unit}",
                f"set {name} in this range, or none for a free link",
            )

        if cell.clock == "wall" and not engine.shapes_links:
            engines = names_of("cluster", shapes_links=True)
            others = f"cluster to {one_of(engines)}, " if engines else ""
            yield Problem(
                "links",
                f"{name} = {value:g} with cluster = {cell.cluster}: nobody shapes its links",
                f"set {others}clock = virtual, or leave {name} out",
            )


def tuning(view: View) -> Problems:
    """What trials cannot choose a learning rate for.

    They choose one factor per cell from what was trained, and `benchsuite run` runs them itself.
    """
    cell = view.cell
    if cell.tuning != "per_strategy":
        return

    refusals = (
        (
            cell.lr_factor != 1,
            f"lr_factor = {cell.lr_factor:g}",
            "trials choose it, for every strategy from one grid",
            "set lr_factor = 1, or tuning = same",
        ),
        (
            cell.gradients == "none",
            "gradients = none",
            "a trial would train nothing",
            "set gradients = computed, or tuning = same",
        ),
        (
            cast(declared.Cluster, view.says("cluster")).started_by != "",
            f"cluster = {cell.cluster}",
            "trials are run by `benchsuite run`, on this machine",
            "set tuning = same, and lr_factor to what a local run of the cell chose (column "
            "tuned_lr_factor)",
        ),
    )

    for holds, what, why, remedy in refusals:
        if holds:
            yield Problem("tuning", f"{what} with tuning = per_strategy: {why}", remedy)


def machine(view: View, machine: Machine) -> Problems:
    """What a legal cell asks of the machine; silent where nobody has looked."""
    cell = view.cell
    devices = machine.num_cuda_devices
    if cell.device == "cuda" and devices == 0:
        yield Problem(
            "cuda",
            f"device = cuda, but torch {machine.torch} sees no CUDA device here",
            "set device = cpu, or install a CUDA build of torch on a machine with a GPU",
        )

    if cell.backend == "nccl" and machine.nccl is False:
        yield Problem("nccl", f"torch {machine.torch} is built without NCCL", "set backend = gloo")

    ranks_here = math.ceil(cell.world_size / max(cell.hosts, 1))
    if cell.backend == "nccl" and machine.nccl and devices and devices < ranks_here:
        yield Problem(
            "nccl",
            f"{ranks_here} local ranks, but {devices} CUDA devices: NCCL needs a device per local "
            "rank",
            f"start at most {devices} ranks on this host, or set backend = gloo",
        )

    if cell.backend == "mpi" and machine.mpi is False:
        yield Problem(
            "mpi",
            f"torch {machine.torch} is built without MPI (is_mpi_available() is False)",
            "set backend = gloo, or build torch from source against MPI",
        )

    if cell.backend == "gloo" and machine.gloo is False:
        yield Problem(
            "gloo", f"torch {machine.torch} is built without gloo", "install the torch wheel"
        )


def _num_micro_batches(view: View) -> float:
    """Micro-batches of an undivided replica; a pipeline is refused as such."""
    if view.parallel.divides:
        return 1
    return view.number("parallel", "num_micro_batches") or 1


def _without_lock(view: View) -> bool:
    """Threads or workers that write at once."""
    return bool(view.option("sync", "lock") == "none")


RULES: tuple[Callable[[View], Problems], ...] = (
    clock,
    backend,
    device,
    precision,
    cluster,
    tuning,
)
