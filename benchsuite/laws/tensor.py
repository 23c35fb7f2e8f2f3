"""Laws of layers split by weight: what is sent in a step, and that slices compute the whole.

The ranks are processes. `tiny` gathers after every layer; `mlp` has one pair of matrices; `cnn` has
pairs of convolutions with a GroupNorm between them; the transformer has two pairs per block, with
and without tokens that are cut; the agent's networks are two side by side, or convolutions with
biases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.runs import Change, count_different, option, relative, run, worst
from benchsuite.laws.harness.variants import Fields
from benchsuite.laws.parallel import held
from benchsuite.laws.synchronous import FLOAT64
from benchsuite.parallel.pieces import join
from benchsuite.plan.cell import Budget, Cell, global_batch, resolve
from benchsuite.worker import model_parallel, setup
from benchsuite.worker.setup import Training
from benchsuite.worker.traffic_mode import TrafficMode
from benchsuite.workload import Batch, seeded_layers, trained_parameters

# Two pairs of matrices, each with an all-reduce forward and one backward (Shoeybi et al. 2019,
# section 3).
PER_BLOCK = 4
KINDS = {"all_reduce": "allreduce", "all_gather": "allgather", "reduce_scatter": "reduce_scatter"}
Alter = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Seen:
    """What one part found after a run, in a gradient that was watched."""

    batch: Batch
    calls: Counter[tuple[str, int]]  # (name, elements of the whole vector) -> times
    params: Tensor
    grad: Tensor
    num_split: int  # elements at the vector's beginning that only this part has
    output: Tensor  # what an inference gave


def _look(training: Training) -> Seen:
    """Takes one more gradient and one inference on this part, and notes the library's calls."""
    part: Any = training.part
    batch = training.fetch((0, 0, 1))
    with TrafficMode() as seen:
        part.gradient(batch)
    calls = Counter((call.name, call.numel) for call in seen.calls)
    num_split = part.facts()["split_elements"]
    output = part.infer(batch.x)
    return Seen(batch, calls, part.params.clone(), part.grad.clone(), num_split, output)


# -- laws ------------------------------------------------------------------------------------------


def collectives_are_told(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """The library's calls in one gradient are those that the plan tells.

    Bound: exact, in calls too many or too few. The twins leave sums out.
    """
    result = run(make_ranks, cell, change=change, after=_look)
    workload = setup.start_workload(result.cell)
    layers = model_parallel.meta_layers(workload)
    batch, _ = model_parallel.example(workload, layers, 1)
    parallel: Any = setup.make_parallel(result.cell)
    told = Counter(
        (KINDS[kind], numel)
        for kind, numel in parallel.collectives(workload, layers, batch, cell.model_parallel)
    )
    wrong = 0
    text = ""
    for worker in result.workers:
        seen = worker.after.calls
        wrong += sum(abs(seen[name] - told[name]) for name in seen | told)
        text = f"{seen.total()} collectives, {told.total()} told"
    return Figure(wrong, 0, f"{text}, {cases.label(cell)}")


def a_block_is_four(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """A transformer's gradient is 4 all-reduces of (B, T, d) per block, and nothing else.

    Bound: exact. The twins leave sums out, or cut tokens.
    """
    result = run(make_ranks, cell, change=change, after=_look)
    sizes = {
        name: option(result.cell, "transformer", name) for name in ("blocks", "context", "width")
    }
    activation = global_batch(result.cell) * sizes["context"] * sizes["width"]
    told = Counter({("allreduce", activation): PER_BLOCK * sizes["blocks"]})
    seen = [worker.after.calls for worker in result.workers]
    wrong = sum(abs(calls[name] - told[name]) for calls in seen for name in calls | told)
    return Figure(
        wrong,
        0,
        f"{dict(seen[0])}, {sizes['blocks']} blocks of {activation} elements, {cases.label(cell)}",
    )


def slices_compute_the_whole(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None, alter: Alter | None = None
) -> Figure:
    """Gradient and inference are those of one process at the parameters that the parts hold.

    `alter` does to the model of the one process what a change does to the parts' model. Bound: a
    relative error of 1e-10. The twins leave sums out, or split queries, keys and values in blocks
    instead of by head.
    """
    result = run(make_ranks, cell, change=change, after=_look)
    workload = setup.start_workload(result.cell)
    model = nn.Sequential(*seeded_layers(workload, cell.seed)).double()
    named = trained_parameters(model)
    pieces, shapes = held(result.cell)
    seen = [worker.after for worker in result.workers]
    params, grad = (
        join([getattr(each, name) for each in seen], pieces, shapes) for name in ("params", "grad")
    )
    nn.utils.vector_to_parameters(params, named.values())
    if alter is not None:
        alter(model)
    batch = seen[0].batch
    output = model(batch.x)
    gradients = torch.autograd.grad(workload.loss(output, batch), list(named.values()))
    gradient = nn.utils.parameters_to_vector(gradients)
    figures = [(relative(grad - gradient, gradient), "gradient")]
    figures += [
        (relative(each.output - output.detach(), output.detach()), "inference") for each in seen
    ]
    value, where = worst(figures)
    return Figure(value, FLOAT64, f"||difference|| / ||{where}||, {cases.label(cell)}")


def copies_are_equal(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """What stands on every part has the same bits on all after a run, and so has its gradient.

    Bound: exact. The twins leave sums out.
    """
    result = run(make_ranks, cell, change=change, after=_look)
    seen = [worker.after for worker in result.workers]
    copies = [(each.params[each.num_split :], each.grad[each.num_split :]) for each in seen]
    wrong = sum(
        count_different(one, other)
        for part in copies
        for one, other in zip(part, copies[0], strict=True)
    )
    return Figure(
        wrong, 0, f"{wrong} of 2 x {copies[0][0].numel()} elements differ, {cases.label(cell)}"
    )


# -- broken twins ----------------------------------------------------------------------------------


def _split(training: Training, how: str) -> list[Any]:
    """The modules that the plan splits in this way."""
    found = training.workload.tensor_plan().items()
    return [training.part.module.get_submodule(name) for name, each in found if each == how]


def _local(module: nn.Module, inputs: Any, output: Any) -> Tensor:
    """This part's own share of an output."""
    local: Tensor = output.to_local()
    return local


def _adds_nothing(training: Training) -> Training:
    """The change that leaves out the forward all-reduce.

    Behind rows each part goes on with its own sum.
    """
    for module in _split(training, "rows"):
        module._forward_hooks.clear()
        module.register_forward_hook(_local)
    return training


def _keeps_its_gradient(training: Training) -> Training:
    """The change that leaves out the backward all-reduce of a convolution split by outputs."""
    for module in _split(training, "columns"):
        if isinstance(module, nn.Conv2d):
            module._forward_pre_hooks.clear()
    return training


def _sums_no_tokens(training: Training) -> Training:
    """The change in which the gradient of a norm is that of a part's own tokens."""
    part: Any = training.part
    part._partial = part.grad[:0]
    return training


def _by_kind(model: nn.Module) -> None:
    """Reads the rows of the one matrix as ({q, k, v}, head, head_dim).

    The slices of a part are then no heads.
    """
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "qkv")]
    for block in blocks:
        block._attend = partial(_attend_by_kind, block._attend, block._head_dim)


def _attend_by_kind(attend: Callable[[Tensor], Tensor], head_dim: int, qkv: Tensor) -> Tensor:
    """Attention whose rows are in the order of kinds."""
    by_head = qkv.unflatten(-1, (3, -1, head_dim)).transpose(-3, -2)
    return attend(by_head.flatten(-3))


def _reads_by_kind(training: Training) -> Training:
    """The change in which the rows of the one matrix are read in the order of kinds."""
    _by_kind(training.part.module)
    return training


# -- cells -----------------------------------------------------------------------------------------

STEPS = Budget(steps=3, timeout_s=60.0)
CNN: Fields = {"workload": "cnn", "preset": "smoke"}
MLP: Fields = {"workload": "mlp", "preset": "smoke"}
TRANSFORMER: Fields = {"workload": "transformer", "preset": "smoke"}
AGENT: Fields = {"workload": "rl_agent", "preset": "smoke"}
FRAMES: Fields = {"workload": "rl_agent", "preset": "comm"}
CUT_TOKENS: Fields = {**TRANSFORMER, "options": {"tensor": {"sequence_parallel": True}}}


def on(**fields: Any) -> Fields:
    """Fields of a cell of tensor on 2 ranks."""
    return {"parallel": "tensor", "model_parallel": 2, "budget": STEPS, **fields}


def _cells(asked: cases.Asked) -> list[Cell]:
    """The cells of split layers that are asked for."""
    if not asked.is_about("tensor"):
        return []
    shapes: tuple[Fields, ...] = ({}, MLP, CNN, TRANSFORMER, CUT_TOKENS, AGENT, FRAMES)
    made = [
        cases.on(cases.tiny(), **on(model_parallel=size, **shape))
        for size in (2, 4)
        for shape in shapes
    ]
    return [resolve(cell) for cell in made]


def _applies(cell: Cell) -> bool:
    """Whether the cell's layers are split."""
    return cell.parallel == "tensor" and cell.replicas == 1 and cell.precision == "fp64"


def _has_whole_tokens(cell: Cell) -> bool:
    """Whether it is a transformer whose tokens are not cut."""
    cuts = option(cell, "tensor", "sequence_parallel")
    return _applies(cell) and cell.workload == "transformer" and not cuts


CELLS = cases.Cells(_cells, lambda cell: f"tensor on {cell.model_parallel} ranks")
LAWS = (
    Law(
        "collectives of split layers are those that the plan tells",
        collectives_are_told,
        _applies,
        (
            Control(
                "sums are left out",
                partial(collectives_are_told, change=_adds_nothing),
                on(**TRANSFORMER),
            ),
            Control(
                "gradients are not summed",
                partial(collectives_are_told, change=_keeps_its_gradient),
                on(**CNN),
            ),
            Control(
                "norms are not summed",
                partial(collectives_are_told, change=_sums_no_tokens),
                on(**CUT_TOKENS),
            ),
        ),
        asks={"after": _look},
    ),
    Law(
        "a transformer block is four all-reduces of its activation",
        a_block_is_four,
        _has_whole_tokens,
        (
            Control(
                "sums are left out",
                partial(a_block_is_four, change=_adds_nothing),
                on(**TRANSFORMER),
            ),
            Control("tokens are cut", a_block_is_four, on(**CUT_TOKENS)),
        ),
        asks={"after": _look},
    ),
    Law(
        "slices of weights compute the gradient of the whole",
        slices_compute_the_whole,
        _applies,
        (
            Control(
                "sums are left out",
                partial(slices_compute_the_whole, change=_adds_nothing),
                on(**MLP),
            ),
            Control(
                "a convolution's input has a part's gradient",
                partial(slices_compute_the_whole, change=_keeps_its_gradient),
                on(**CNN),
            ),
            Control(
                "queries, keys and values are split in blocks, not by head",
                partial(slices_compute_the_whole, change=_reads_by_kind, alter=_by_kind),
                on(**TRANSFORMER),
            ),
            Control(
                "norms are not summed",
                partial(slices_compute_the_whole, change=_sums_no_tokens),
                on(**CUT_TOKENS),
            ),
        ),
        asks={"after": _look},
    ),
    Law(
        "copies on all parts are equal bit for bit",
        copies_are_equal,
        _applies,
        (
            Control(
                "norms are not summed",
                partial(copies_are_equal, change=_sums_no_tokens),
                on(**CUT_TOKENS),
            ),
            Control(
                "sums are left out", partial(copies_are_equal, change=_adds_nothing), on(**MLP)
            ),
        ),
        asks={"after": _look},
    ),
)
