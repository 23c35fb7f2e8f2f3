"""The law of asynchronous training that needs the lock.

With gradients of ones, every answer is one whole version of the parameters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.runs import (
    Change,
    both,
    from_zero_with_ones,
    option,
    run,
    with_options,
)
from benchsuite.laws.server_log import has_lock
from benchsuite.plan.cell import Cell


def answers_are_whole_versions(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """With gradients of ones every answer is one whole version, and no update is lost.

    Parameters start at 0 and the learning rate is 1, so version v is the constant -v. Each slice
    that is pulled is constant, each of -1 to -U is pulled once, and the server ends at -U, where U
    is the number of updates. Bound: exact, while U < 2^24. The twins tear answers, lose every
    fourth update, make every update twice, or lose answers.
    """
    cell = with_options(cell, "asynchronous", lr_rule="same")
    result = run(make_ranks, cell, change=both(from_zero_with_ones, change))
    updates = sum(result.events["pushes"])
    torn = 0
    values = []
    ends = []
    for server, (start, stop) in zip(result.servers, result.slices, strict=True):
        pulled = [vector[start:stop] for worker in result.workers for vector in worker.params[1:]]
        torn += sum(not bool((piece == piece[0]).all()) for piece in pulled)
        values.append(sorted(-int(piece[0]) for piece in pulled))
        ends.append(-float(server.params[-1].max()))
    expected = list(range(1, updates + 1))
    strange = sum(
        1 for read in values for mine, theirs in zip(read, expected, strict=False) if mine != theirs
    )
    missing = sum(abs(len(read) - updates) for read in values)
    gap = sum(abs(end - updates) for end in ends)
    return Figure(
        torn + strange + missing + gap,
        0,
        f"{torn} torn answers, {strange + missing} versions not pulled once, servers end at "
        f"-{ends}, U = {updates}, "
        f"{cell.label}",
    )


_ON = {"sync": "asynchronous", "topology": "parameter_server", "servers": 1, "replicas": 3}


class _Twofold(twins.Policy):
    """A server policy that applies every gradient twice."""

    def apply(self, gradient: Tensor, *, num_gradients: int = 1, **where: Any) -> None:
        super().apply(gradient, num_gradients=num_gradients, **where)
        super().apply(gradient, num_gradients=num_gradients, **where)


LAWS = (
    Law(
        "gradients of ones: every answer is one whole version, the last one -U",
        answers_are_whole_versions,
        lambda cell: (
            has_lock(cell)
            and cell.compression == "none"
            and option(cell, "asynchronous", "momentum") == "shared"
        ),
        (
            Control(
                "torn answers",
                partial(answers_are_whole_versions, change=twins.with_policy(twins.Torn)),
                _ON,
            ),
            Control(
                "every fourth update is lost",
                partial(answers_are_whole_versions, change=twins.with_policy(twins.Forgetful)),
                _ON,
            ),
            Control(
                "every update is made twice",
                partial(answers_are_whole_versions, change=twins.with_policy(_Twofold)),
                _ON,
            ),
            Control(
                "answers are lost",
                partial(answers_are_whole_versions, change=twins.with_server(twins.Deaf)),
                _ON,
            ),
        ),
        own_run=True,
    ),
)
