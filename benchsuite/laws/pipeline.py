"""Laws of layers over stages: steps, bubbles, memory and traffic are those of the formulas.

Every schedule makes the steps of one process, waits and keeps as much as its formula says, sends
what crosses the cuts, and holds tied weights twice and all else once. The ranks are processes. The
bubble is counted in slots, from the orders in which the parts did their passes; times are not
looked at.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchsuite import rules
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.runs import Change, run
from benchsuite.laws.harness.variants import VARIANTS, Fields
from benchsuite.laws.parallel import equals_undivided
from benchsuite.parallel import slots
from benchsuite.plan import plugins
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.worker import model_parallel, setup
from benchsuite.worker.setup import Training
from benchsuite.workload import Batch, micro_batches, seeded_layers, trained_parameters

EXACT = 1e-12  # for fractions in float64
MICRO = (1, 4, 8)  # numbers of micro-batches; on two stages the bubbles are 1/2, 1/5 and 1/9


@dataclass(frozen=True)
class Seen:
    """What one part found after a run, in a gradient that was watched."""

    facts: dict[str, Any]
    order: list[slots.Action]
    num_held: int  # elements of the module's parameters
    sent: int  # bytes that the library sent from this part
    batch: Batch


def _look(training: Training) -> Seen:
    """Takes one more gradient on this part and notes passes, traffic and what it holds."""
    part: Any = training.part
    batch = training.fetch((0, training.comm.rank, training.topology.num_workers))
    assert training.replica is not None
    sent = model_parallel.watched(
        training.replica, lambda: part.gradient(batch), training.cell.backend
    ).payload_bytes
    held = sum(p.numel() for p in trained_parameters(part.module).values())
    return Seen(dict(part.facts()), list(part.executed), held, sent, batch)


# -- laws ------------------------------------------------------------------------------------------


def bubble_is_told(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """The slots without work, counted from what all parts did, are those of the formula.

    The run file's number, which comes from the library's plan, is the same. Bound: 1e-12. In the
    twin another schedule runs.
    """
    result = run(make_ranks, cell, change=change, after=_look)
    seen = [worker.after for worker in result.workers]
    facts = seen[0].facts
    stages = cell.model_parallel * facts["num_chunks"]
    counted = slots.counted([part.order for part in seen], num_stages=stages)
    schedule = facts["schedule"]
    m = facts["num_micro_batches"]
    told = slots.predicted(
        _option(result.cell, "schedule", schedule),
        stages=cell.model_parallel,
        num_micro_batches=m,
        num_chunks=facts["num_chunks"],
    )
    gap = max(abs(counted - told), abs(counted - facts["bubble_counted"]))
    return Figure(
        gap, EXACT, f"{counted:.4f} counted, {told:.4f} told, m = {m}, {cases.label(cell)}"
    )


def in_flight_is_told(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """A stage keeps as many micro-batches for the backward pass as its formula says.

    They are m under gpipe and min(m, stages - stage) under 1f1b. Bound: exact. In the twin another
    schedule runs.
    """
    result = run(make_ranks, cell, change=change, after=_look)
    schedule = _option(result.cell, "schedule", "1f1b")
    gap = 0
    text = ""
    for stage, worker in enumerate(result.workers):
        seen: Seen = worker.after
        m = seen.facts["num_micro_batches"]
        told = m if schedule == "gpipe" else min(m, cell.model_parallel - stage)
        found = slots.in_flight(seen.order)
        gap = max(gap, abs(found - told))
        text += f"{found} of {told}, "
    return Figure(gap, 0, f"{text}stage by stage, {cases.label(cell)}")


def cuts_are_crossed(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """The library sends 2 (stages x V - 1) m activations a step.

    They have the sizes of the undivided chain's. Bound: exact. In the twin every batch goes through
    twice.
    """
    result = run(make_ranks, cell, change=change, after=_look)
    seen = [worker.after for worker in result.workers]
    facts = seen[0].facts
    sizes = _activation_bytes(result.cell, seen)
    told = 2 * facts["num_micro_batches"] * sum(sizes)
    sent = sum(part.sent for part in seen)
    wrong = abs(sent - told) + sum(part.facts["activation_bytes"] != sizes for part in seen)
    assert len(sizes) == cell.model_parallel * facts["num_chunks"] - 1
    return Figure(
        wrong, 0, f"{sent} bytes sent, {told} told over {len(sizes)} cuts, {cases.label(cell)}"
    )


def _activation_bytes(cell: Cell, seen: list[Seen]) -> list[int]:
    """The bytes at each cut of one micro-batch, from the undivided chain."""
    workload = setup.start_workload(cell)
    layers = seeded_layers(workload, cell.seed)
    nn.Sequential(*layers).to(setup.DTYPES[cell.precision])
    part_of = {layer: part for part, each in enumerate(seen) for layer in each.facts["layers"]}
    x = micro_batches(seen[0].batch, seen[0].facts["num_micro_batches"])[0].x
    sizes = []
    with torch.no_grad():
        for at, layer in enumerate(layers):
            x = layer(x)
            if at + 1 < len(layers) and part_of[at] != part_of[at + 1]:
                sizes.append(x.nbytes)
    return sizes


def stages_hold_the_model(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """The stages together hold P parameters, and once more what is tied across them.

    Bound: exact. In the twin a part keeps more.
    """
    result = run(make_ranks, cell, change=change, after=_look)
    seen = [worker.after for worker in result.workers]
    layers = seeded_layers(setup.start_workload(result.cell), cell.seed)
    whole = sum(p.numel() for p in trained_parameters(nn.Sequential(*layers)).values())
    here = [
        {id(p): p.numel() for at in part.facts["layers"] for p in layers[at].parameters()}
        for part in seen
    ]
    tied = sum(
        size
        for one, other in itertools.combinations(here, 2)
        for key, size in one.items()
        if key in other
    )
    held = sum(part.num_held for part in seen)
    layer_numbers = sorted(at for part in seen for at in part.facts["layers"])
    wrong = abs(held - whole - tied) + (layer_numbers != list(range(len(layers))))
    return Figure(wrong, 0, f"{held} held, P = {whole}, {tied} tied, {cases.label(cell)}")


def _option(cell: Cell, name: str, default: Any) -> Any:
    """An option of the cell's pipeline, or the default."""
    return cell.options.get("pipeline", {}).get(name, default)


# -- broken twins ----------------------------------------------------------------------------------


def _other_schedule(training: Training) -> Training:
    """The change that runs GPipe, whatever was asked for."""
    part: Any = training.replica
    part._options = dataclasses.replace(part._options, schedule="gpipe")
    return training


def _undivided_mean(training: Training) -> Training:
    """The change in which micro-batches' gradients are added up and not divided by m."""
    part: Any = training.replica
    gradient = part.gradient

    def summed(batch: Batch, *given: Any) -> Any:
        loss = gradient(batch, *given)
        part.grad.mul_(part._options.num_micro_batches)
        return loss

    part.gradient = summed
    return training


def _untied(training: Training) -> Training:
    """The change in which each holder of a tied parameter keeps its own gradient."""
    part: Any = training.replica
    part._tied = {}
    return training


def _twice(training: Training) -> Training:
    """The change in which every batch goes through two times."""
    part: Any = training.replica
    gradient = part.gradient

    def both(batch: Batch, *given: Any) -> Any:
        gradient(batch, *given)
        return gradient(batch, *given)

    part.gradient = both
    return training


def _holds_more(training: Training) -> Training:
    """The change in which a part keeps a tensor that nobody uses."""
    part: Any = training.replica
    part.module.register_parameter("more", nn.Parameter(torch.zeros(1)))
    return training


# -- cells -----------------------------------------------------------------------------------------

TIME = Budget(timeout_s=60.0)
SHORT = Budget(steps=10, timeout_s=60.0)
REAL: tuple[Fields, ...] = (
    {"workload": "cnn", "preset": "digits"},
    {"workload": "transformer", "preset": "markov"},
)


def on(stages: int = 2, *, tiny: Fields | None = None, **options: Any) -> Fields:
    """Fields of a pipeline of `tiny.py`."""
    given = {"pipeline": options} if options else {}
    return {
        "parallel": "pipeline",
        "model_parallel": stages,
        "budget": TIME,
        "options": {**given, **(tiny or {})},
    }


def _cells(asked: cases.Asked) -> list[Cell]:
    """The cells of the pipeline that are asked for."""
    if not asked.is_about("pipeline"):
        return []
    made = [
        resolve(Cell(**real, precision="fp64", **{**on(stages, **given), "budget": SHORT}))
        for real in REAL
        for given in VARIANTS["pipeline"]
        for stages in (2, 4)
    ]
    made += [
        cases.tiny(**on(stages, **given)) for given in VARIANTS["pipeline"] for stages in (2, 4)
    ]
    made += [cases.tiny(**on(schedule="gpipe", num_micro_batches=m)) for m in MICRO if m != 4]
    made += [
        cases.tiny(**on(num_micro_batches=8)),
        cases.tiny(**on(3, schedule="interleaved", num_micro_batches=6)),
    ]
    return [cell for cell in made if not rules.validate(cell)]


def _applies(cell: Cell) -> bool:
    """Whether the cell is one replica in stages, in float64."""
    return cell.parallel == "pipeline" and cell.replicas == 1 and cell.precision == "fp64"


def _is_looked_at(cell: Cell) -> bool:
    """Whether the parts are watched: all cells of `tiny.py`, and others with the default schedule.

    The other workloads have unequal cuts and tied weights.
    """
    return _applies(cell) and (
        plugins.stem(cell.workload) == "tiny" or _option(cell, "schedule", "1f1b") == "1f1b"
    )


def _is_real(cell: Cell) -> bool:
    """Whether the workload is a real one; `tiny.py` is shown in `parallel.py`."""
    return _applies(cell) and plugins.stem(cell.workload) != "tiny"


def _has_formula(cell: Cell) -> bool:
    """Whether micro-batches in flight have a formula under the cell's schedule."""
    return _is_looked_at(cell) and _option(cell, "schedule", "1f1b") in ("gpipe", "1f1b")


TIED: Fields = {**REAL[1], **on(), "budget": SHORT}
CELLS = cases.Cells(_cells, lambda cell: f"pipeline on {cell.model_parallel} ranks")
LAWS = (
    Law(
        "every schedule makes the steps of one process",
        equals_undivided,
        _is_real,
        (
            Control(
                "micro-batches are added up",
                partial(equals_undivided, change=_undivided_mean),
                on(),
            ),
            Control(
                "tied gradients are not summed", partial(equals_undivided, change=_untied), TIED
            ),
        ),
    ),
    Law(
        "the bubble in slots is the formula's",
        bubble_is_told,
        _is_looked_at,
        (
            Control(
                "another schedule runs",
                partial(bubble_is_told, change=_other_schedule),
                on(schedule="zero_bubble"),
            ),
        ),
        asks={"after": _look},
    ),
    Law(
        "micro-batches in flight are as many as told",
        in_flight_is_told,
        _has_formula,
        (
            Control(
                "another schedule runs", partial(in_flight_is_told, change=_other_schedule), on()
            ),
        ),
        asks={"after": _look},
    ),
    Law(
        "what crosses the cuts is what the library sends",
        cuts_are_crossed,
        _is_looked_at,
        (
            Control(
                "every batch goes through twice", partial(cuts_are_crossed, change=_twice), on()
            ),
        ),
        asks={"after": _look},
    ),
    Law(
        "stages hold the model, and tied weights twice",
        stages_hold_the_model,
        _is_looked_at,
        (Control("a part keeps more", partial(stages_hold_the_model, change=_holds_more), on()),),
        asks={"after": _look},
    ),
)
