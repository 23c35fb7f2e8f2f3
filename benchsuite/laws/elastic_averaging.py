"""Laws of elastic averaging: an exchange moves nothing away, and shrinks gaps by a known factor.

It is synchronous over a collective and asynchronous over a parameter server. The laws are shown
without gradients, from replicas that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.runs import (
    Change,
    GivenGradient,
    Run,
    both,
    option,
    plain_sgd,
    rebuilt,
    relative,
    run,
    sync_of,
    with_options,
    worst,
)
from benchsuite.plan.cell import Cell, resolve
from benchsuite.sync.elastic_averaging import Centre
from benchsuite.worker.setup import Training

CONSERVED = 1e-12


def sum_is_conserved(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """The sum of all replicas and the centre stays what it was at the start.

    It is compared after every exchange of all, and at the end. Bound: a relative error of 1e-12. In
    the twins the centre moves by N times what it should, or not at all.
    """
    result = run(make_ranks, cell, change=both(apart_without_gradients, change), after=centre_of)
    start = sum((worker.params[0] for worker in result.workers), torch.zeros(())) + _first_centre(
        result
    )
    end = sum((worker.params[-1] for worker in result.workers), torch.zeros(())) + last_centre(
        result
    )
    scale = sum(float(worker.params[0].norm()) for worker in result.workers)
    value = float((end - start).norm()) / scale
    return Figure(
        value, CONSERVED, f"||sum at the end - at the start|| / sum of ||x_i||, {cell.label}"
    )


def factor_of_an_exchange(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """A synchronous exchange leaves 1 - moving_rate (N + 1) of the gap to the centre.

    The gap is the mean of the replicas minus the centre, so the form is stable where moving_rate (N
    + 1) < 2. Bound: 1e-12. In the twin the centre moves by the mean of the pulls.
    """
    cell = resolve(with_options(cell, "elastic_averaging", period=1))
    result = run(make_ranks, cell, change=both(apart_without_gradients, change), after=centre_of)
    gap = torch.stack([worker.params[0] for worker in result.workers]).mean(0) - _first_centre(
        result
    )
    rate = float(option(cell, "elastic_averaging", "moving_rate"))
    exchanges = len(result.workers[0].params) - 1
    expected = gap * (1 - rate * (cell.num_workers + 1)) ** exchanges
    found = torch.stack([worker.params[-1] for worker in result.workers]).mean(0) - last_centre(
        result
    )
    value = float((found - expected).norm() / gap.norm())
    left = float(found.norm() / gap.norm())
    text = f"{left:.3g} of the gap is left after {exchanges} exchanges, {cell.label}"
    return Figure(value, CONSERVED * max(left, 1.0), text)


def each_exchange(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """A push of x moves the centre c by moving_rate (x - c), and the worker as much towards it.

    This is the asynchronous form, compared push by push from the servers' logs: c is the version
    that the push met. Bound: a relative error of 1e-12. In the twins the centre takes half the
    moving rate, or the worker drops the answer.
    """
    cell = resolve(with_options(cell, "elastic_averaging", period=1))
    result = run(make_ranks, cell, change=both(apart_without_gradients, change))
    rate = float(option(cell, "elastic_averaging", "moving_rate"))
    figures = []
    for server, log, (begin, end) in zip(result.servers, result.logs, result.slices, strict=True):
        done = [0] * cell.num_workers
        for worker, version in zip(log.worker, log.version_before, strict=True):
            own, after = (
                result.workers[worker].params[done[worker] + k][begin:end] for k in (0, 1)
            )
            centre, moved = server.params[version : version + 2]
            done[worker] += 1
            gap = own - centre
            where = f"server {server.rank}, version {version}"
            figures.append((relative(moved - centre - rate * gap, gap), f"the centre, {where}"))
            figures.append((relative(own - after - rate * gap, gap), f"worker {worker}, {where}"))
    value, where = worst(figures)
    text = (
        f"||way - moving_rate (x - c)|| / ||x - c||, largest of {len(figures) // 2} exchanges: "
        f"{where}, {cell.label}"
    )
    return Figure(value, CONSERVED, text)


def apart_without_gradients(training: Training) -> Training:
    """The change with replicas that start apart and are moved by exchanges only.

    The centre starts at 0.
    """
    recipe = plain_sgd(training.recipe, lr=0.0)
    changed = rebuilt(training, part=GivenGradient(training.part, _nothing), recipe=recipe)
    params = training.part.params
    generator = torch.Generator().manual_seed(100 + training.comm.rank)
    start = torch.randn(params.numel(), generator=generator, dtype=torch.float64).to(params.dtype)
    params.copy_(torch.zeros_like(start) if training.is_server else start)
    centre = getattr(changed.strategy, "centre", None)
    if centre is not None:
        centre.zero_()
    return changed


def _nothing(grad: Tensor, step: int) -> None:
    """A gradient of zeros."""
    grad.zero_()


def centre_of(training: Training) -> Tensor | None:
    """The rank's copy of the centre, where it has one."""
    if training.is_server:
        return training.shard().clone()
    centre = getattr(training.strategy, "centre", None)
    return None if centre is None else centre.clone()


def last_centre(result: Run) -> Tensor:
    """The centre at the end: a rank's copy, or the servers' slices put together."""
    if result.servers:
        return torch.cat([server.after for server in result.servers])
    centre: Tensor = result.workers[0].after
    return centre


def _first_centre(result: Run) -> Tensor:
    """The centre at the start."""
    return torch.zeros_like(result.workers[0].params[0])


class _Reckless(twins.Policy):
    """A server policy whose centre does not take what the worker gives."""

    def apply(self, gradient: Tensor, *, num_gradients: int = 1, **where: Any) -> None:
        super().apply(self._shard.clone(), num_gradients=num_gradients, **where)


def _half_rate(whole: Centre) -> Centre:
    """A server that goes half as far as the option says, and tells the worker so."""
    return Centre(whole._moving_rate / 2)


_ON: Mapping[str, Any] = {"sync": "elastic_averaging", "topology": "ring", "replicas": 3}
_SERVER: Mapping[str, Any] = {**_ON, "topology": "parameter_server", "servers": 1}


def _applies(cell: Cell) -> bool:
    """Whether the cell is elastic averaging in float64 without a compression."""
    return (
        sync_of(cell) == "elastic_averaging"
        and cell.compression == "none"
        and cell.precision == "fp64"
    )


LAWS = (
    Law(
        "elastic averaging conserves the sum of replicas and centre",
        sum_is_conserved,
        _applies,
        (
            Control(
                "the centre moves by the sum of sums",
                partial(sum_is_conserved, change=twins.with_mean(twins.sum_only)),
                _ON,
            ),
            Control(
                "the centre stays where it is",
                partial(sum_is_conserved, change=twins.with_policy(_Reckless)),
                _SERVER,
            ),
        ),
    ),
    Law(
        "an exchange leaves 1 - moving_rate (N + 1) of the gap to the centre",
        factor_of_an_exchange,
        lambda cell: _applies(cell) and not cell.num_servers,
        (
            Control(
                "the centre moves by the mean of the pulls",
                partial(
                    factor_of_an_exchange,
                    change=twins.with_mean(lambda whole, flat: _mean_of_mean(whole, flat)),
                ),
                _ON,
            ),
        ),
        own_run=True,
    ),
    Law(
        "over a server every exchange moves the centre and the worker by moving_rate of what is "
        "between them",
        each_exchange,
        lambda cell: _applies(cell) and bool(cell.num_servers),
        (
            Control(
                "the centre takes half the moving rate",
                partial(each_exchange, change=twins.with_policy(_half_rate)),
                _SERVER,
            ),
            Control(
                "the worker drops the answer",
                partial(each_exchange, change=twins.with_server(twins.Deaf)),
                _SERVER,
            ),
        ),
        own_run=True,
    ),
)


def _mean_of_mean(whole: Any, flat: Tensor) -> None:
    """A mean that divides by N once more."""
    whole.mean(flat)
    flat.div_(whole.num_workers)
