"""Runs a cell on the ranks of a law and keeps everything that laws look at.

Kept are the parameters after every step, losses, traffic, events and the servers' push logs. A
`Change` may alter what each rank runs: another recipe, given gradients, a broken twin. All that is
handed over is plain data, so that ranks may be threads or processes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.comm import Comm, Handle, Traffic
from benchsuite.comm.process import ProcessComm
from benchsuite.laws import MakeRanks
from benchsuite.plan import placement, plugins
from benchsuite.plan.cell import Cell, Scalar, resolve
from benchsuite.plan.hashing import canonical
from benchsuite.sync import Events, Work
from benchsuite.topology import bounds
from benchsuite.topology.server_log import ServerLog
from benchsuite.worker import model_parallel, setup
from benchsuite.worker.build import build
from benchsuite.worker.setup import Training
from benchsuite.worker.traffic_mode import derived_total
from benchsuite.workload import Batch, Part, Ready, Recipe, Shapes, read_loss

Change = Callable[[Training], Training]


@dataclass(frozen=True)
class PushLog:
    """The log of one server as plain integers, with one entry per push in the order of arrival."""

    worker: list[int]
    tag: list[int]  # the number of its batch
    version_read: list[int]
    # The version just before the push was applied, or at its arrival where that was later.
    version_before: list[int]
    version_next: list[int]  # the version of the answer to it; -1 = not answered
    version: int  # the number of updates in all
    replies: list[int]
    first_read: list[int]
    last_read: list[int]
    overlapped_replies: int
    # The sum over gradients that were given up of (version read next - version read).
    abandoned_versions: int = 0
    num_abandoned: int = 0

    @property
    def staleness(self) -> list[int]:
        """Of each push: how many versions its parameters were behind when it was applied."""
        return [
            before - read
            for before, read in zip(self.version_before, self.version_read, strict=True)
        ]


def push_log(log: ServerLog) -> PushLog:
    """The log of a server that has ended, as plain integers."""
    columns = log.columns()
    return PushLog(
        worker=columns["worker"],
        tag=columns["tag"],
        version_read=columns["version_read"],
        version_before=columns["version_before"],
        version_next=columns["version_next"],
        version=log.version,
        replies=list(log.replies),
        first_read=list(log.first_read),
        last_read=list(log.last_read),
        overlapped_replies=log.overlapped_replies,
        abandoned_versions=log.abandoned_versions,
        num_abandoned=log.num_abandoned,
    )


@dataclass(frozen=True)
class RankRun:
    """What one rank left behind.

    `params` holds the parameters at the start and after every step; on a server it is the server's
    slice at the start and after every version.
    """

    rank: int
    params: list[Tensor]
    losses: list[float | None]  # None where the gradient was given up
    work: list[Work]
    traffic: Traffic
    called: Traffic  # of library collectives called through the comm, derived
    events: dict[str, int]
    shapes: Shapes
    log: PushLog | None
    # What the library sent from part to part of a replica, derived from its calls.
    inside: Traffic = field(default_factory=Traffic)
    after: Any = None


@dataclass(frozen=True)
class Run:
    """All ranks of one run, workers first."""

    cell: Cell
    ranks: list[RankRun]

    @property
    def workers(self) -> list[RankRun]:
        return self.ranks[: self.cell.num_workers]

    @property
    def servers(self) -> list[RankRun]:
        return self.ranks[self.cell.num_workers :]

    @property
    def logs(self) -> list[PushLog]:
        return [server.log for server in self.servers if server.log is not None]

    @property
    def traffic(self) -> Traffic:
        """What all ranks sent through `Comm`, added up."""
        return sum((rank.traffic for rank in self.ranks), Traffic())

    @property
    def called(self) -> Traffic:
        """What the library's collectives that were called through `Comm` sent, added up over the
        ranks.
        """
        return sum((rank.called for rank in self.ranks), Traffic())

    @property
    def inside(self) -> Traffic:
        """What the library sent between the parts of each replica, added up over the ranks."""
        return sum((rank.inside for rank in self.ranks), Traffic())

    @property
    def events(self) -> Events:
        return setup.gather_events([rank.events for rank in self.ranks])

    @property
    def slices(self) -> list[tuple[int, int]]:
        """The range of the flat vector that each server owns."""
        return bounds(self.workers[0].params[0].numel(), max(1, self.cell.num_servers))


def run(
    make_ranks: MakeRanks,
    cell: Cell,
    *,
    change: Change | None = None,
    after: Callable[[Training], Any] | None = None,
    strict: str = "",
) -> Run:
    """Runs the cell to the end of its budget.

    `change` is made on each rank before its first step; `after` is called on each rank at its end,
    and its answer is kept in `RankRun.after`.
    """
    cell = resolve(cell)
    return Run(
        cell,
        make_ranks(
            cell.world_size, partial(one_rank, cell=cell, change=change, after=after), strict=strict
        ),
    )


def remembered(make_ranks: MakeRanks) -> MakeRanks:
    """The same ranks, which do not repeat a cell that they have run unchanged.

    Several laws look at one run. A run counts as unchanged where its body is a partial with a
    keyword `cell`, perhaps with a function of a module as `after`, and with None for all other
    keywords.
    """
    runs: dict[str, Any] = {}

    def call(size: int, body: Callable[[ProcessComm], Any], *, strict: str = "") -> list[Any]:
        keywords = body.keywords if isinstance(body, partial) else {}
        given = {name: value for name, value in keywords.items() if value is not None}
        cell = given.pop("cell", None)
        after = given.pop("after", None)
        looked = f"{after.__module__}.{after.__qualname__}" if inspect.isfunction(after) else ""
        if cell is None or given or "<" in looked or (after is not None and not looked):
            return make_ranks(size, body, strict=strict)
        assert isinstance(body, partial)  # it has a cell
        key = strict + looked + body.func.__module__ + canonical(cell.to_json())
        if key not in runs:
            runs[key] = make_ranks(size, body, strict=strict)
        found: list[Any] = runs[key]
        return found

    return call


def place(comm: Comm, cell: Cell) -> None:
    """Tells the comm which hosts the cell's ranks are on, since laws run on one machine."""
    if cell.hosts > 1:
        comm.hosts = placement.hosts(cell)


def one_rank(
    comm: Comm, *, cell: Cell, change: Change | None, after: Callable[[Training], Any] | None
) -> RankRun:
    """The life of one rank without any measuring: build, train or serve, and collect what it
    leaves.
    """
    place(comm, cell)
    training = build(cell, comm)
    if change is not None:
        training = change(training)
    params: list[Tensor] = []
    losses: list[float | None] = []
    done: list[Work] = []
    log = None
    if training.is_server:
        shard = training.shard()
        params.append(_copy(shard))
        log = training.serve(lambda samples, version: params.append(_copy(shard)))
    else:
        params.append(_copy(training.part.params))
        while (work := training.strategy.next_index()) is not None:
            loss = training.strategy.step(training.fetch(work))
            losses.append(None if loss is None else read_loss(loss))
            done.append(work)
            params.append(_copy(training.part.params))
        training.strategy.finish()
    events = training.events(log)
    traffic = comm.traffic + Traffic()  # a copy: what `after` sends is not the run's
    called = derived_total(getattr(comm, "calls", {}))
    inside = Traffic()
    if training.replica is not None:
        inside = model_parallel.derive_inside(training, events)
    return RankRun(
        rank=comm.rank,
        params=params,
        losses=losses,
        work=done,
        traffic=traffic,
        called=called,
        events=events,
        shapes=dict(training.part.shapes),
        log=None if log is None else push_log(log),
        inside=inside,
        after=None if after is None else after(training),
    )


def _copy(vector: Tensor) -> Tensor:
    """A copy of the vector on the CPU, which is where laws compare."""
    return vector.detach().to("cpu", copy=True)


# -- changes ---------------------------------------------------------------------------------------


def rebuilt(training: Training, **pieces: Any) -> Training:
    """The same rank with other pieces, which must be started where they need to be.

    Unless a strategy is among the pieces, a fresh one is made and started on them.
    """
    strategy = setup.make_strategy(training.cell, training.workload)
    changed = dataclasses.replace(training, **{"strategy": strategy, **pieces})
    changed.strategy.start(
        changed.comm, changed.part, changed.recipe, changed.topology, changed.compression
    )
    return changed


def both(first: Change | None, second: Change | None) -> Change | None:
    """The change that makes first the one and then the other; None stands for no change."""
    if first is None or second is None:
        return first or second
    return partial(_both, first=first, second=second)


def _both(training: Training, *, first: Change, second: Change) -> Training:
    return second(first(training))


class GivenGradient(Part):
    """A part whose gradient is not computed: `fill(grad, step)` writes it."""

    def __init__(self, part: Part, fill: Callable[[Tensor, int], None]) -> None:
        self._part = part
        self._fill = fill
        self._step = 0
        self.module = part.module
        self.shapes = part.shapes
        self.params = part.params

    @property
    def grad(self) -> Tensor:
        """The part's own gradient vector."""
        return self._part.grad

    @grad.setter
    def grad(self, value: Tensor) -> None:
        self._part.grad = value

    def infer(self, x: Tensor) -> Tensor:
        return self._part.infer(x)

    def wrap(self, wrapper: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
        self._part.wrap(wrapper)

    def backward(self, batch: Batch) -> float:
        return self._part.backward(batch)

    def gradient(
        self, batch: Batch, ready: Ready | None = None, until: Handle | None = None
    ) -> float | None:
        self._fill(self.grad, self._step)
        self._step += 1
        if ready is not None:
            ready(0, self.grad.numel())
        return 0.0


def plain_sgd(recipe: Recipe, lr: float = 1.0) -> Recipe:
    """The recipe with plain SGD: every update is -lr times the gradient.

    There is no momentum, no schedule and no clipping.
    """
    return dataclasses.replace(
        recipe,
        make_optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        lr=lambda progress: lr,
        clip_norm=None,
    )


def from_zero_with_ones(training: Training) -> Training:
    """Starts all parameters at 0 and makes every gradient 1.

    After U updates with learning rate 1 every parameter is -U, which float32 holds exactly up to
    2^24.
    """
    training.part.params.zero_()
    return rebuilt(
        training, part=GivenGradient(training.part, _one), recipe=plain_sgd(training.recipe)
    )


def _one(grad: Tensor, step: int) -> None:
    grad.fill_(1.0)


# -- cells -----------------------------------------------------------------------------------------


def with_options(cell: Cell, member: str, **values: Scalar) -> Cell:
    """The cell with other options of one of its members."""
    options = {name: dict(given) for name, given in cell.options.items()}
    options[member] = {**options.get(member, {}), **values}
    return dataclasses.replace(cell, options=options)


def sync_of(cell: Cell) -> str:
    """The name of the strategy whose laws the cell's strategy obeys.

    A member obeys its own. A user's file says so in its class, as `obeys = "synchronous"`.
    """
    if not plugins.is_path(cell.sync):
        return cell.sync
    return str(plugins.find("sync", cell.sync).constants.get("obeys", ""))


def option(cell: Cell, member: str, name: str) -> Any:
    """The value of an option in a resolved cell, None where it has no such option."""
    if member not in cell.options and member == sync_of(cell):
        member = plugins.stem(cell.sync)
    return cell.options.get(member, {}).get(name)


def recipe_of(cell: Cell) -> Recipe:
    """The recipe that the cell trains with."""
    cell = resolve(cell)
    return setup.make_recipe(cell, setup.make_workload(cell))


def count_different(one: Tensor, other: Tensor) -> int:
    """The number of elements whose values differ; a NaN differs from everything."""
    return int((one != other).sum())


def relative(difference: Tensor, reference: Tensor) -> float:
    """The relative error ||difference|| / ||reference|| in the 2-norm."""
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(reference))


def worst(figures: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest value and where it was found; a NaN counts as larger than all numbers."""
    return max(
        figures,
        key=lambda pair: (pair[0] != pair[0], pair[0]),
        default=(float("nan"), "nothing was compared"),
    )
