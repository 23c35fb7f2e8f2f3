"""Laws of divided replicas (`pipeline`, `tensor`, `fsdp`), alone and under strategies.

Whatever divides a replica, its parts together make the steps of one process. Between replicas a
strategy does to the parts what it does to whole vectors. The ranks are processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchsuite import rules
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases, twins
from benchsuite.laws.harness.reference import one_process
from benchsuite.laws.harness.runs import Change, Run, rebuilt, relative, run, worst
from benchsuite.laws.harness.variants import RECIPES, VARIANTS, Fields, Recipe
from benchsuite.laws.synchronous import FLOAT64
from benchsuite.laws.topology import compare
from benchsuite.laws.traffic import described
from benchsuite.parallel.pieces import Piece, join
from benchsuite.plan import placement, plugins
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.worker import model_parallel, predict, setup
from benchsuite.worker.setup import Training
from benchsuite.workload import Batch, Shapes, seeded_layers, trained_parameters

# Strategies between replicas that are crossed with divided ones, besides `synchronous`.
OUTER = ("local_sgd", "diloco", "elastic_averaging")
# Workloads as they ship, and how many steps they are run for: an agent's first two rollouts.
REAL = ("cnn", "transformer", "mlp", "rl_agent")
STEPS = 20
TIME = Budget(timeout_s=60.0)


def equals_undivided(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Every replica's parts, put together, are after every step what one process is.

    Under a strategy whose replicas differ they are what that replica is where it is not divided.
    Bound: a relative error of 1e-10. The twins halve a part's gradient, clip by a part's own norm,
    or do not let replicas agree.
    """
    result = run(make_ranks, cell, change=change)
    pieces, shapes = held(result.cell)
    expected = _undivided(make_ranks, result.cell)
    figures = []
    for replica in range(result.cell.replicas):
        parts = [
            result.ranks[rank].params for rank in placement.ranks_of_replica(result.cell, replica)
        ]
        for step, (vectors, theirs) in enumerate(
            zip(zip(*parts, strict=True), expected[replica], strict=True)
        ):
            gap = relative(join(vectors, pieces, shapes) - theirs, theirs)
            figures.append((gap, f"replica {replica} after step {step}"))
    value, where = worst(figures)
    return Figure(value, FLOAT64, f"||difference|| / ||parameters||, {where}, {result.cell.label}")


def loss_is_of_the_replica(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """Every part tells the mean loss of its whole replica.

    The mean over all replicas is the loss of one process. Bound: a relative error of 1e-10. In the
    twin a sum over parts is not divided.
    """
    result = run(make_ranks, cell, change=change)
    workload = setup.start_workload(result.cell)
    expected = one_process(result.cell)
    model = nn.Sequential(*seeded_layers(workload, result.cell.seed)).to(
        setup.DTYPES[result.cell.precision]
    )
    trained = list(trained_parameters(model).values())
    figures = []
    for step in range(len(expected) - 1):
        nn.utils.vector_to_parameters(expected[step], trained)
        batch = workload.batch(step, shard=0, num_shards=1)
        with torch.no_grad():
            theirs = float(workload.loss(model(batch.x), batch))
        for part in range(result.cell.model_parallel):
            ranks = placement.ranks_of_part(result.cell, part)[: result.cell.replicas]
            told = sum(float(result.ranks[rank].losses[step] or 0.0) for rank in ranks) / len(ranks)
            figures.append(
                (
                    abs(told - theirs) / abs(theirs),
                    f"part {part} in step {step}: {told}, {theirs} alone",
                )
            )
    value, where = worst(figures)
    return Figure(value, FLOAT64, f"{where}, {result.cell.label}")


def parts_make_the_model(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """What the parts own is every parameter once, and a copy has its owner's bits after every step.

    Copies are tied or replicated parameters. Bound: exact. In the twin a copy starts from other
    values.
    """
    result = run(make_ranks, cell, change=change)
    pieces, shapes = held(result.cell)
    whole = sum(shape.numel() for shape in shapes.values())
    wrong = 0
    where = ""
    for replica in range(result.cell.replicas):
        ranks = placement.ranks_of_replica(result.cell, replica)
        for step in range(len(result.ranks[ranks[0]].params)):
            vectors = [result.ranks[rank].params[step] for rank in ranks]
            joined = join(vectors, pieces, shapes)
            missing = int(torch.isnan(joined).sum())
            split = dict(
                zip(shapes, joined.split([shape.numel() for shape in shapes.values()]), strict=True)
            )
            differing = sum(
                int(
                    (
                        piece.of(split[piece.name].view(shapes[piece.name]))
                        != view.view(piece.shape)
                    ).sum()
                )
                for vector, mine in zip(vectors, pieces, strict=True)
                for view, piece in zip(
                    vector.split([piece.shape.numel() for piece in mine]), mine, strict=True
                )
            )
            if missing + differing > wrong:
                wrong = missing + differing
                where = (
                    f"{missing} elements without owner, {differing} copies differ after step "
                    f"{step}, "
                )
    owned = sum(piece.shape.numel() for mine in pieces for piece in mine if piece.owned)
    return Figure(
        wrong + abs(owned - whole), 0, f"{where}{owned} owned of {whole}, {result.cell.label}"
    )


def inside_is_predicted(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """What was sent inside and between replicas is, on every edge, what is predicted.

    Compared are what the suite's comm counted and what the library was seen to send. Bound: exact.
    In the twin the parts tell each other more.
    """
    result = run(make_ranks, cell, change=change)
    strategy, setting = described(result.cell)
    told = predict.of_run(result.cell, strategy, {}, result.events, setting)
    seen = result.traffic + result.called + result.inside
    return compare(seen, told, result.cell)


def held(cell: Cell) -> tuple[list[list[Piece]], Shapes]:
    """Every part's pieces, and the shapes of the whole model."""
    workload = setup.start_workload(cell)
    layers = model_parallel.meta_layers(workload)
    shapes = {name: p.shape for name, p in trained_parameters(nn.Sequential(*layers)).items()}
    return setup.make_parallel(cell).pieces(workload, layers, cell.model_parallel), shapes


def _undivided(make_ranks: MakeRanks, cell: Cell) -> list[Sequence[Tensor]]:
    """Per replica its vector at the start and after every step."""
    if cell.sync == "synchronous":
        reference = one_process(cell)
        return [reference] * cell.replicas
    options = {
        name: given for name, given in cell.options.items() if name != plugins.stem(cell.parallel)
    }
    whole = dataclasses.replace(cell, parallel="data", model_parallel=1, options=options)
    theirs: Run = run(make_ranks, whole)
    return [worker.params for worker in theirs.workers]


# -- broken twins ----------------------------------------------------------------------------------


def half_of_a_part(training: Training) -> Training:
    """The change in which the last part of each replica hands over half of its gradient."""
    part: Any = training.replica
    if part is not None and part.replica.part == part.replica.size - 1:
        gradient = part.gradient

        def halved(batch: Batch, *given: Any) -> float | None:
            loss: float | None = gradient(batch, *given)
            part.grad.mul_(0.5)
            return loss

        part.gradient = halved
    return training


def own_loss(training: Training) -> Training:
    """The change in which each part tells a sum that was not divided.

    It is the mean loss times the number of parts.
    """
    part: Any = training.replica
    if part is not None:
        gradient = part.gradient
        part.gradient = lambda batch, *given: gradient(batch, *given) * part.replica.size
    return training


def own_norm(training: Training) -> Training:
    """The change in which each part clips by the norm of what it holds."""
    part: Any = training.replica
    if part is not None:
        part.gradient_norm = lambda: float(torch.linalg.vector_norm(part.grad))
    return training


def alone(training: Training) -> Training:
    """The change in which the same parts of different replicas do not agree."""
    return rebuilt(training, topology=twins.OtherMean(training.topology, twins.silent))


def other_copy(training: Training) -> Training:
    """The change in which what a part holds beside its own starts from other values."""
    part = training.replica
    if part is not None:
        part.params[part.num_owned :].add_(0.1)
    return training


def one_more(training: Training) -> Training:
    """The change in which the parts tell each other something that no prediction has."""
    part: Any = training.replica
    if part is not None:
        gradient = part.gradient

        def told(batch: Batch, *given: Any) -> float | None:
            part.replica.sum(0.0)
            loss: float | None = gradient(batch, *given)
            return loss

        part.gradient = told
    return training


# -- where they are shown --------------------------------------------------------------------------


def divided_cells(asked: cases.Asked) -> list[Cell]:
    """Every parallelism: its variants on 2 and 4 parts, products of 2 x 2, and real workloads."""
    if asked.clock != "wall" or asked.compression:
        return []
    made: list[Cell] = []
    for name in asked.members("parallel"):
        if plugins.stem(name) != "data":
            made += [
                cell for cell in _of(name) if asked.includes(sync=cell.sync, topology=cell.topology)
            ]
    return [cell for cell in made if not rules.validate(cell)]


def _of(name: str) -> list[Cell]:
    """The cells of one parallelism."""
    made = []
    for options in VARIANTS.get(name, ({},)):
        made += [
            _tiny(name, RECIPES[2], size, options={name: options} if options else {})
            for size in (2, 4)
        ]
    made += [_tiny(name, recipe, 2) for recipe in (RECIPES[5], ("muon", 0.01, 0.0))]
    products: list[tuple[str, str, int]] = [
        ("synchronous", "ring", 0),
        ("synchronous", "native", 0),
        ("synchronous", "parameter_server", 2),
        *((sync, "ring", 0) for sync in OUTER),
    ]
    for sync, topology, servers in products:
        own = {sync: VARIANTS[sync][0]} if sync in OUTER else {}
        recipe = RECIPES[1] if sync == "synchronous" else RECIPES[2]
        made.append(
            _tiny(
                name,
                recipe,
                2,
                sync=sync,
                topology=topology,
                servers=servers,
                replicas=2,
                options=own,
            )
        )
    made.append(
        _tiny(name, RECIPES[1], 2, topology="ring", replicas=2, rank_placement="part_major")
    )
    short = dataclasses.replace(TIME, steps=STEPS)
    real: dict[str, Any] = {
        "parallel": name,
        "model_parallel": 2,
        "precision": "fp64",
        "budget": short,
    }
    made += [resolve(Cell(workload=workload, **real)) for workload in REAL]
    # a tied matrix, clipped by two servers
    served: dict[str, Any] = {"replicas": 2, "topology": "parameter_server", "servers": 2}
    made.append(resolve(Cell(workload="transformer", **real, **served)))
    return made


def _tiny(
    name: str, recipe: Recipe, size: int, *, options: Fields | None = None, **fields: Any
) -> Cell:
    """A cell of `tiny.py` whose replicas are divided."""
    return cases.tiny(
        recipe, parallel=name, model_parallel=size, options=options, budget=TIME, **fields
    )


def subject(cell: Cell) -> str:
    """The name in the table: parallelism, strategy, topology, workload."""
    names = [
        plugins.stem(name) for name in (cell.parallel, cell.sync, cell.topology, cell.workload)
    ]
    return " ".join(names)


CELLS = cases.Cells(divided_cells, subject)


def _is_divided(cell: Cell) -> bool:
    """Whether the cell's replicas are divided."""
    return setup.is_model_parallel(cell)


def _on(name: str, clip_norm: float = 0.0, *, replicas: int = 1) -> dict[str, Any]:
    """Fields of a cell whose replicas are divided in two."""
    tiny = {"optimizer": "momentum", "lr": 0.05, "clip_norm": clip_norm}
    return {
        "parallel": name,
        "model_parallel": 2,
        "replicas": replicas,
        "topology": "native",
        "budget": TIME,
        "options": {"tiny": tiny},
    }


LAWS = (
    Law(
        "a divided replica makes the steps of one process",
        equals_undivided,
        _is_divided,
        (
            Control(
                "a part's gradient is halved",
                partial(equals_undivided, change=half_of_a_part),
                _on("fsdp"),
            ),
            Control(
                "a part clips by its own norm",
                partial(equals_undivided, change=own_norm),
                _on("pipeline", 0.5),
            ),
            Control(
                "replicas do not agree",
                partial(equals_undivided, change=alone),
                _on("tensor", replicas=2),
            ),
        ),
    ),
    Law(
        "every part tells the loss of its replica",
        loss_is_of_the_replica,
        lambda cell: (
            _is_divided(cell) and cell.sync == "synchronous" and cell.workload != "rl_agent"
        ),
        (
            Control(
                "a sum over parts is not divided",
                partial(loss_is_of_the_replica, change=own_loss),
                _on("fsdp"),
            ),
        ),
    ),
    Law(
        "the parts make the model, and copies are copies",
        parts_make_the_model,
        _is_divided,
        (
            Control(
                "a copy starts from other values",
                partial(parts_make_the_model, change=other_copy),
                _on("tensor"),
            ),
        ),
    ),
    Law(
        "what is sent inside and between replicas is predicted",
        inside_is_predicted,
        _is_divided,
        (
            Control(
                "the parts tell each other more",
                partial(inside_is_predicted, change=one_more),
                _on("pipeline"),
            ),
        ),
    ),
)
