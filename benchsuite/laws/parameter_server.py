"""The law of parameter servers: their number changes nothing."""

from __future__ import annotations

import dataclasses
from functools import partial

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.runs import Change, count_different, recipe_of, run, sync_of, worst
from benchsuite.laws.synchronous import is_synchronous
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell

ELEMENTWISE = (
    "none",
    "fp16",
    "bf16",
    "sign",
)  # what these make of an element depends on that element alone


def servers_do_not_matter(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """After every step every worker pulls the bits that one server would have answered.

    This holds for elementwise optimisers without clipping, because a norm over slices is added in
    another order. It also needs a compression that treats elements alone: k of a slice, or its
    scale, differ from those of the whole. Bound: exact. In the twins the second server adds from
    the last rank down, or does not divide.
    """
    one = run(make_ranks, dataclasses.replace(cell, servers=1))
    many = run(make_ranks, cell, change=change)
    value, where = worst(
        [
            (count_different(mine, theirs), f"worker {a.rank} after step {step}")
            for a, b in zip(many.workers, one.workers, strict=True)
            for step, (mine, theirs) in enumerate(zip(a.params, b.params, strict=True))
        ]
    )
    return Figure(
        value, 0, f"{value:.0f} elements differ from one server's, worst {where}, {cell.label}"
    )


def _applies(cell: Cell) -> bool:
    """Whether the order of additions cannot depend on the number of servers."""
    elementwise = (
        recipe_of(cell).clip_norm is None and plugins.stem(cell.compression) in ELEMENTWISE
    )
    return (
        cell.num_servers > 1
        and sync_of(cell) == "synchronous"
        and is_synchronous(cell)
        and elementwise
    )


_ON = {"sync": "synchronous", "topology": "parameter_server", "servers": 2, "replicas": 3}

LAWS = (
    Law(
        "the number of servers changes no bit",
        servers_do_not_matter,
        _applies,
        (
            Control(
                "the second server adds from the last rank down",
                partial(
                    servers_do_not_matter, change=twins.with_policy(twins.Backwards, from_server=1)
                ),
                _ON,
            ),
            Control(
                "the second server does not divide",
                partial(
                    servers_do_not_matter, change=twins.with_policy(twins.Undivided, from_server=1)
                ),
                _ON,
            ),
        ),
    ),
)
