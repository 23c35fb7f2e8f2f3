"""Laws of shards: what the library gathers and reduces, and that it computes with the newest.

The ranks are processes. `tiny` is a chain of units, the last of which has an empty shard. The
transformer's embedding and head share a matrix and are the root unit. Rows that do not divide make
a shard that the library pads, and so copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.runs import Change, option, relative, run, worst
from benchsuite.laws.harness.variants import VARIANTS, Fields
from benchsuite.laws.parallel import held
from benchsuite.laws.synchronous import FLOAT64
from benchsuite.parallel.pieces import join
from benchsuite.parallel.shards import Unit, units_of
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.worker import model_parallel, setup
from benchsuite.worker.setup import Training
from benchsuite.worker.traffic_mode import TrafficMode
from benchsuite.workload import seeded_layers, trained_parameters

# Parameters are multiplied by this behind the library's back, as an optimiser or a loaded snapshot
# changes them.
SHRINK = 0.5
Calls = Counter[tuple[str, int]]  # (name, elements of the whole vector) -> times


@dataclass(frozen=True)
class Seen:
    """What one part found after a run."""

    calls: list[Calls]  # the library's, in a gradient and in one after an inference
    num_gathers: int  # gathers during the inferences of a rollout
    num_gathered: int  # parameters that were whole after each of these
    facts: dict[str, Any]
    params: Tensor  # its vector when the last gradient was computed
    grad: Tensor
    metric: float


def _ran(make_ranks: MakeRanks, cell: Cell, change: Change | None) -> list[Seen]:
    """What the parts of a run found."""
    result = run(make_ranks, cell, change=change, after=_look)
    return [worker.after for worker in result.workers]


def _look(training: Training) -> Seen:
    """What this part finds: calls of the library, gathered parameters, gradients and metrics.

    It takes two gradients, with an inference after each. Between them the parameters shrink behind
    the library's back.
    """
    part: Any = training.part
    batch = training.fetch((0, training.comm.rank, training.topology.num_workers))
    calls = []
    gathered = 0
    for _ in range(2):
        with TrafficMode() as seen:
            part.gradient(batch)
        calls.append(Counter((call.name, call.numel) for call in seen.calls if call.name != "send"))
        gathered += _num_gathered(part)
        part.params.mul_(SHRINK)
        metric = training.workload.evaluate(part.infer)
        gathered += _num_gathered(part)
    part.gradient(batch)
    with TrafficMode() as seen, part.whole():
        for _ in range(2):
            training.workload.evaluate(part.infer)
    gathered += _num_gathered(part)
    return Seen(
        calls,
        len(seen.calls),
        gathered,
        dict(part.facts()),
        part.params.clone(),
        part.grad.clone(),
        metric,
    )


def _num_gathered(part: Any) -> int:
    """How many of the part's parameters are whole and not sharded."""
    return sum(not isinstance(parameter, DTensor) for parameter in part.module.parameters())


# -- laws ------------------------------------------------------------------------------------------


def units_travel_as_told(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """Each unit is gathered before the forward and the backward pass, and reduced once.

    A unit that stays gathered is not gathered again. An inference before a step changes nothing,
    and a rollout gathers once. Bound: exact, in calls too many or too few. The twins leave a unit
    gathered, free the root, or count an inference as a step.
    """
    cell = resolve(cell)
    seen = _ran(make_ranks, cell, change)
    size = cell.model_parallel
    reshard = option(cell, "fsdp", "reshard")
    told: Calls = Counter()
    for unit in _units(cell):
        stays = reshard == "gradient_only" or (unit.is_root and reshard == "but_root")
        told["_allgather_base", unit.numel(size)] += 1 if stays else 2
        told["_reduce_scatter_base", unit.numel(size, trained=True)] += 1
    wrong = 0
    text = ""
    for each in seen:
        wrong += abs(each.num_gathers - len(_units(cell)))
        for calls in each.calls:
            wrong += sum(abs(calls[name] - told[name]) for name in calls | told)
            names = Counter(name for name, _ in calls.elements())
            text = (
                f"{names['_allgather_base']} all-gathers, {names['_reduce_scatter_base']} "
                "reduce-scatters"
            )
    return Figure(wrong, 0, f"{text}, {len(_units(cell))} units, {cases.label(cell)}")


def shards_make_the_whole(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """The shards of all parts have P elements, and what the library reduces has P and the padding.

    The padding is what the parts say they have. Bound: exact. In the twin padding is not told.
    """
    cell = resolve(cell)
    seen = _ran(make_ranks, cell, change)
    whole = sum(p.numel() for p in trained_parameters(nn.Sequential(*_meta(cell))).values())
    kept = sum(each.params.numel() for each in seen)
    padding = sum(each.facts["num_padded"] for each in seen)
    calls = seen[0].calls[0]
    reduced = sum(
        numel * times for (name, numel), times in calls.items() if name == "_reduce_scatter_base"
    )
    text = f"{kept} elements held of {whole}, {padding} padded, {reduced} reduced"
    return Figure(
        abs(whole - kept) + abs(reduced - kept - padding), 0, f"{text}, {cases.label(cell)}"
    )


def nothing_stays_gathered(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """After a step and after an inference all parameters are shards again.

    Bound: exact. In the twin a backward pass frees nothing.
    """
    cell = resolve(cell)
    seen = _ran(make_ranks, cell, change)
    gathered = max(each.num_gathered for each in seen)
    return Figure(gathered, 0, f"{gathered} parameters were whole, {cases.label(cell)}")


def computes_with_the_newest(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """Gradient and inference are those of one process at the parameters in the flat vectors.

    Bound: a relative error of 1e-10. The twins add gradients up, gather once for all, or do not
    refresh padded shards.
    """
    cell = resolve(cell)
    seen = _ran(make_ranks, cell, change)
    pieces, shapes = held(cell)
    params, grad = (
        join([getattr(each, name) for each in seen], pieces, shapes) for name in ("params", "grad")
    )
    gradient, metric = _one_process(cell, params)
    figures = [(relative(grad - gradient, gradient), "gradient")]
    figures += [(abs(each.metric - metric) / abs(metric), "inference") for each in seen]
    value, where = worst(figures)
    return Figure(value, FLOAT64, f"||difference|| / ||{where}||, {cases.label(cell)}")


def _one_process(cell: Cell, params: Tensor) -> tuple[Tensor, float]:
    """(gradient, metric) of one process at these parameters."""
    workload = setup.start_workload(cell)
    model = nn.Sequential(*seeded_layers(workload, cell.seed)).double()
    trained = list(trained_parameters(model).values())
    nn.utils.vector_to_parameters(params, trained)
    batch = workload.batch(0, shard=0, num_shards=1)
    gradient = nn.utils.parameters_to_vector(
        torch.autograd.grad(workload.loss(model(batch.x), batch), trained)
    )
    with torch.no_grad():
        return gradient, workload.evaluate(model.eval())


def _meta(cell: Cell) -> list[nn.Module]:
    """The cell's model without memory."""
    return model_parallel.meta_layers(setup.start_workload(cell))


def _units(cell: Cell) -> list[Unit]:
    """The units that the cell's model is cut into."""
    return units_of(_meta(cell))


# -- broken twins ----------------------------------------------------------------------------------


def _modules(training: Training) -> Iterator[Any]:
    """The modules of this part that the library shards."""
    return (each for each in training.part.module.modules() if isinstance(each, FSDPModule))


def _keeps(training: Training) -> Training:
    """The change in which parameters stay gathered after the backward pass."""
    for module in _modules(training):
        module.set_reshard_after_backward(False, recurse=False)
    return training


def _sums(training: Training) -> Training:
    """The change in which gradients are added up and not divided."""
    for module in _modules(training):
        module.set_gradient_divide_factor(1.0)
    return training


def _keeps_one(training: Training) -> Training:
    """The change in which one unit is not freed between the passes."""
    list(_modules(training))[-1].set_reshard_after_forward(False, recurse=False)
    return training


def _frees_root(training: Training) -> Training:
    """The change in which the root unit is freed, which may stay."""
    next(_modules(training)).set_reshard_after_forward(True, recurse=False)
    return training


def _infers_with_hooks(training: Training) -> Training:
    """The change in which inference is a forward pass with hooks.

    It leaves behind what only a backward pass would clear.
    """
    part: Any = training.part
    part.infer = torch.no_grad()(part.module)
    return training


def _does_not_copy(training: Training) -> Training:
    """The change in which the library's copies of what it pads are not refreshed."""
    part: Any = training.part
    part._copied = [], []
    return training


def _loses_padding(training: Training) -> Training:
    """The change in which the parts say that nothing is padded."""
    part: Any = training.part
    part._facts = {**part._facts, "num_padded": 0}
    return training


# -- cells -----------------------------------------------------------------------------------------

TRANSFORMER: Fields = {
    "workload": "transformer",
    "preset": "smoke",
    "budget": Budget(steps=3, timeout_s=60.0),
}


def on(**fields: Any) -> Fields:
    """Fields of a cell of fsdp on 2 ranks."""
    return {"parallel": "fsdp", "model_parallel": 2, "budget": Budget(timeout_s=60.0), **fields}


def _cells(asked: cases.Asked) -> list[Cell]:
    """The cells of fsdp that are asked for."""
    if not asked.is_about("fsdp"):
        return []
    shapes = [on(options={"fsdp": given}) for given in VARIANTS["fsdp"]]
    shapes += [on(**TRANSFORMER, options={"fsdp": given}) for given in VARIANTS["fsdp"][:2]]
    shapes += [on(**UNEVEN), on(model_parallel=4), on(model_parallel=4, **TRANSFORMER)]
    return [resolve(cases.on(cases.tiny(), **shape)) for shape in shapes]


def _applies(cell: Cell) -> bool:
    """Whether the cell is sharded."""
    return cell.parallel == "fsdp" and cell.replicas == 1 and cell.precision == "fp64"


UNEVEN: Fields = {"options": {"tiny": {"width": 7}}}  # parts of 4 rows and of 3
GRADIENT_ONLY: Fields = {"options": {"fsdp": {"reshard": "gradient_only"}}}
CELLS = cases.Cells(_cells, lambda cell: f"fsdp on {cell.model_parallel} ranks")
LAWS = (
    Law(
        "every unit is gathered twice and reduced once",
        units_travel_as_told,
        _applies,
        (
            Control(
                "a unit stays gathered", partial(units_travel_as_told, change=_keeps_one), on()
            ),
            Control(
                "the root is freed",
                partial(units_travel_as_told, change=_frees_root),
                on(**TRANSFORMER),
            ),
            Control(
                "an inference counts as a step",
                partial(units_travel_as_told, change=_infers_with_hooks),
                on(),
            ),
        ),
        asks={"after": _look},
    ),
    Law(
        "shards make the whole, with the padding",
        shards_make_the_whole,
        _applies,
        (
            Control(
                "padding is not told", partial(shards_make_the_whole, change=_loses_padding), on()
            ),
        ),
        asks={"after": _look},
    ),
    Law(
        "nothing stays gathered after a step or an inference",
        nothing_stays_gathered,
        _applies,
        (
            Control(
                "a backward pass frees nothing",
                partial(nothing_stays_gathered, change=_keeps),
                on(),
            ),
        ),
        asks={"after": _look},
    ),
    Law(
        "shards compute with the newest parameters",
        computes_with_the_newest,
        _applies,
        (
            Control(
                "gradients are added up", partial(computes_with_the_newest, change=_sums), on()
            ),
            Control(
                "gathered once for all",
                partial(computes_with_the_newest, change=_keeps),
                on(**GRADIENT_ONLY),
            ),
            Control(
                "padded shards are not refreshed",
                partial(computes_with_the_newest, change=_does_not_copy),
                on(**UNEVEN),
            ),
        ),
        asks={"after": _look},
    ),
)
