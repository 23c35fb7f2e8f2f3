"""Laws of strategies whose replicas differ between agreements: each equals its serial loop.

They speak about `local_sgd` (and `ddp` with local steps), `diloco`, `elastic_averaging` over a
collective, `gossip` and `delayed`, whatever travels how. The loops are in `harness/serial.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.runs import (
    Change,
    count_different,
    option,
    recipe_of,
    relative,
    run,
    sync_of,
    with_options,
    worst,
)
from benchsuite.laws.harness.serial import LOOPS
from benchsuite.laws.synchronous import FLOAT64, equals_one_process
from benchsuite.laws.topology import is_counted
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.update import state_vectors
from benchsuite.worker.setup import Training


def equals_its_loop(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None, loop: str = ""
) -> Figure:
    """Every worker's parameters after every step are those of the serial loop of N replicas.

    Bound: a relative error of 1e-10. Among the twins replicas never meet, the division by N is
    missing, gradients are averaged instead of parameters, or nothing is delayed.
    """
    result = run(make_ranks, cell, change=change)
    path = LOOPS[loop or sync_of(cell)](result.cell)
    value, where = worst(
        [
            (relative(mine - theirs, theirs), f"worker {worker.rank} after step {step}")
            for worker in result.workers
            for step, (mine, at) in enumerate(zip(worker.params, path, strict=True))
            for theirs in [at[worker.rank]]
        ]
    )
    text = (
        f"||difference|| / ||parameters||, largest of {len(path) - 1} steps: {where}, {cell.label}"
    )
    return Figure(value, FLOAT64, text)


def has_loop(cell: Cell) -> bool:
    """Whether a serial loop of the strategy is written down, and nothing is lost on the way."""
    quantised = bool(option(cell, "diloco", "outer_bits"))
    in_turns = sync_of(cell) == "elastic_averaging" and bool(
        cell.num_servers
    )  # its order is what the times make it
    together = option(cell, "ddp", "local_steps") == 1
    return (
        sync_of(cell) in LOOPS
        and cell.compression == "none"
        and not (quantised or in_turns or together)
    )


def agree_together(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Right after an agreement all replicas hold the same bits, and between two they do not.

    Bound: exact. In the twins replicas never meet, or one element is not averaged.
    """
    result = run(make_ranks, cell, change=change)
    steps = len(result.workers[0].params) - 1
    due = [step for step in range(1, steps + 1) if _agrees_after(result.cell, step)]
    spread = sum(
        count_different(worker.params[step], result.workers[0].params[step])
        for worker in result.workers[1:]
        for step in due
    )
    alone = [step for step in range(1, steps + 1) if step not in due]
    never_apart = sum(
        all(
            bool(torch.equal(worker.params[step], result.workers[0].params[step]))
            for worker in result.workers[1:]
        )
        for step in alone
    )
    text = (
        f"{spread} elements differ after {len(due)} agreements, {never_apart} of {len(alone)} "
        "other steps end alike"
    )
    return Figure(spread + never_apart, 0, f"{text}, {cell.label}")


def _agrees_after(cell: Cell, step: int) -> bool:
    """Whether replicas agree after this step."""
    warmup = int(option(cell, sync_of(cell), "warmup_steps") or 0)
    return step <= warmup or (step - warmup) % int(option(cell, sync_of(cell), "local_steps")) == 0


def meets_in_turns(cell: Cell) -> bool:
    """Whether whole vectors agree every H steps."""
    whole = option(cell, "diloco", "fragments") in (None, 1) and not option(cell, "diloco", "delay")
    local = (option(cell, "ddp", "local_steps") or 1) > 1
    return (sync_of(cell) in ("local_sgd", "diloco") or local) and whole and cell.replicas > 1


def bytes_are_a_share(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Local SGD sends its share of the bytes of synchronous training.

    Of T steps, w of them synchronous, the share is w/T + (T - w)/(T H). With `averaged` the second
    term counts once more for each of the optimiser's vectors of P. Bound: exact. The twin agrees
    twice.
    """
    cell = resolve(cell)
    result = run(make_ranks, cell, change=change)
    recipe = recipe_of(cell)
    steps = recipe.budget // recipe.global_batch
    every = int(option(cell, "local_sgd", "local_steps"))
    warmup = int(option(cell, "local_sgd", "warmup_steps"))
    averaged = option(cell, "local_sgd", "momentum") == "averaged"
    vectors = 1 + (len(state_vectors(recipe, result.workers[0].shapes)) if averaged else 0)
    # Warm-up to the end is synchronous training, in which every mean is of one vector.
    always = run(make_ranks, with_options(cell, "local_sgd", warmup_steps=steps))
    whole = always.traffic.payload_bytes
    found = result.traffic.payload_bytes * steps * every
    due = whole * (warmup * every + (steps - warmup) * vectors)
    return Figure(
        abs(found - due),
        0,
        f"{found / max(whole, 1):g} = {due / max(whole, 1):g} of T x H, {cell.label}",
    )


def is_local_of_one(cell: Cell) -> bool:
    """Whether the cell is local SGD with H = 1, with plain SGD or momentum that is kept.

    It is synchronous training then.
    """
    kept = sync_of(cell) == "local_sgd" and option(cell, "local_sgd", "momentum") in (
        "local",
        "averaged",
    )
    recipe = recipe_of(cell)
    sgd = (
        isinstance(recipe.make_optimizer([torch.zeros(1)]), torch.optim.SGD)
        and recipe.clip_norm is None
    )
    return (
        kept
        and option(cell, "local_sgd", "local_steps") == 1
        and sgd
        and cell.compression == "none"
    )


def diloco_without_outer(
    make_ranks: MakeRanks, cell: Cell, *, outer_lr: float = 1.0, outer_momentum: float = 0.0
) -> Figure:
    """With outer learning rate 1 and outer momentum 0, diloco is local SGD with the same H.

    The inner state is kept. Bound: a relative error of 1e-10. In the twins the outer momentum is
    kept, or the outer step is shorter.
    """
    every = int(option(cell, "diloco", "local_steps"))
    plain = with_options(cell, "diloco", outer_lr=outer_lr, outer_momentum=outer_momentum)
    result = run(make_ranks, plain)
    options = {name: given for name, given in cell.options.items() if name != "diloco"}
    options["local_sgd"] = {"local_steps": every, "momentum": "local"}
    path = LOOPS["local_sgd"](
        resolve(dataclasses.replace(result.cell, sync="local_sgd", options=options))
    )
    value, where = worst(
        [
            (
                relative(mine - at[worker.rank], at[worker.rank]),
                f"worker {worker.rank} after step {step}",
            )
            for worker in result.workers
            for step, (mine, at) in enumerate(zip(worker.params, path, strict=True))
        ]
    )
    return Figure(
        value, FLOAT64, f"||difference|| / ||parameters|| to local_sgd, {where}, {cell.label}"
    )


def gradients_instead(training: Training) -> Training:
    """The change that averages neighbours' gradients where parameters are to be mixed."""
    strategy: Any = training.strategy
    part = training.part
    mix = strategy._mix
    set_out = strategy._set_out

    def mixed(under_way: Any) -> None:
        params = part.params.clone()
        part.params.copy_(part.grad)
        mix(set_out())
        part.grad.copy_(part.params)
        part.params.copy_(params)

    # nothing is sent before the gradient is there
    strategy._mix = mixed
    strategy._set_out = list
    return training


def without_averager(training: Training) -> Training:
    """The change with a replica of the library's local SGD that never meets the others."""
    strategy: Any = training.strategy
    strategy._averager = None
    return training


_SGD: Mapping[str, Any] = {"topology": "ring", "replicas": 3}
_LOCAL: Mapping[str, Any] = {
    **_SGD,
    "sync": "local_sgd",
    "options": {"local_sgd": {"local_steps": 5}},
}
_DILOCO: Mapping[str, Any] = {**_SGD, "sync": "diloco", "options": {"diloco": {"local_steps": 5}}}
_DDP: Mapping[str, Any] = {
    "sync": "ddp",
    "topology": "native",
    "replicas": 2,
    "options": {"ddp": {"local_steps": 5}},
    "budget": Budget(timeout_s=60.0),
}
_ONE: Mapping[str, Any] = {**_SGD, "sync": "local_sgd"}


def _with_mean(law: Any, mean: twins.Mean, broken: str, on: Mapping[str, Any]) -> Control:
    """A twin whose replicas use this mean."""
    return Control(broken, partial(law, change=twins.with_mean(mean)), on)


def _one(broken: str, momentum: str, optimizer: str) -> Control:
    """A twin of the law that local SGD with H = 1 is synchronous."""
    options = {
        "local_sgd": {"local_steps": 1, "momentum": momentum},
        "tiny": {"optimizer": optimizer},
    }
    return Control(broken, equals_one_process, {**_ONE, "options": options})


LAWS = (
    Law(
        "replicas that differ are their own serial loop",
        equals_its_loop,
        has_loop,
        (
            _with_mean(equals_its_loop, twins.silent, "replicas never meet", _LOCAL),
            _with_mean(equals_its_loop, twins.sum_only, "the divide by N is missing", _LOCAL),
            _with_mean(equals_its_loop, twins.chunk_skipped, "one element is not averaged", _LOCAL),
            _with_mean(
                equals_its_loop, twins.silent, "the outer gradient is a replica's own", _DILOCO
            ),
            _with_mean(
                equals_its_loop,
                twins.sum_only,
                "the centre moves too far",
                {**_SGD, "sync": "elastic_averaging"},
            ),
            Control(
                "neighbours' gradients are averaged, not parameters",
                partial(equals_its_loop, change=gradients_instead),
                {"sync": "gossip", "topology": "ring_neighbours", "replicas": 4},
            ),
            Control(
                "the averager is missing", partial(equals_its_loop, change=without_averager), _DDP
            ),
            Control(
                "nothing is delayed",
                partial(equals_its_loop, loop="delayed"),
                {**_SGD, "sync": "synchronous"},
            ),
        ),
    ),
    Law(
        "replicas hold the same bits after an agreement, and only then",
        agree_together,
        meets_in_turns,
        (
            _with_mean(agree_together, twins.silent, "replicas never meet", _LOCAL),
            _with_mean(agree_together, twins.chunk_skipped, "one element is not averaged", _DILOCO),
            Control(
                "the averager is missing", partial(agree_together, change=without_averager), _DDP
            ),
        ),
    ),
    Law(
        "local SGD with H = 1 is synchronous",
        equals_one_process,
        is_local_of_one,
        (
            _one("momentum starts afresh", "reset", "momentum"),
            _one("Adam's second moments are each replica's own", "local", "adam"),
        ),
    ),
    Law(
        "local SGD sends its share of synchronous bytes",
        bytes_are_a_share,
        lambda cell: (
            sync_of(cell) == "local_sgd" and is_counted(cell) and cell.compression == "none"
        ),
        (_with_mean(bytes_are_a_share, twins.twice, "agrees twice", _LOCAL),),
    ),
    Law(
        "diloco with outer lr 1 and momentum 0 is local SGD",
        diloco_without_outer,
        lambda cell: sync_of(cell) == "diloco" and meets_in_turns(cell) and has_loop(cell),
        (
            Control(
                "outer momentum is kept", partial(diloco_without_outer, outer_momentum=0.9), _DILOCO
            ),
            Control(
                "the outer step is shorter", partial(diloco_without_outer, outer_lr=0.7), _DILOCO
            ),
        ),
    ),
)
