"""The bubble of a pipeline: by formula, and counted in slots from the order in which its parts do
what they do.

A slot is a forward pass of a chunk, the half of its backward pass that gives the input's gradient,
or the half that gives the weights'; transfers take no time. Narayanan et al. 2021 (Megatron-LM),
section 2.2; Qi et al. 2023 (Zero Bubble Pipeline Parallelism), section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Action = tuple[str, int, int]  # what, chunk, micro-batch

# B = I and W in one
FORWARD = "F"
BACKWARD = "B"
INPUT = "I"
WEIGHT = "W"
SLOTS = {FORWARD: 1, BACKWARD: 2, INPUT: 1, WEIGHT: 1}


def predicted(schedule: str, *, stages: int, num_micro_batches: int, num_chunks: int) -> float:
    """Share of the time that a part waits, equal chunks. Of the zero-bubble schedule: forward, I
    and W equally long."""
    work = num_chunks * num_micro_batches * (3 if schedule == "zero_bubble" else 1)
    return float(Fraction(stages - 1, work + stages - 1))


def counted(orders: Sequence[Sequence[Action]], *, num_stages: int) -> float:
    """The same from the orders of all parts, where everything starts as soon as what it needs is
    there."""
    done: dict[Action, int] = {}  # -> the slot in which it is over
    at = [0] * len(orders)
    free = [0] * len(orders)

    while any(position < len(order) for position, order in zip(at, orders, strict=True)):
        moved = False
        for part, order in enumerate(orders):
            while at[part] < len(order):
                ready = _ready(order[at[part]], done, num_stages)
                if ready is None:
                    break

                free[part] = max(free[part], ready) + SLOTS[order[at[part]][0]]
                done[order[at[part]]] = free[part]
                at[part], moved = at[part] + 1, True

        if not moved:
            raise ValueError(
                "the parts wait for each other: " + ", ".join(map(str, _heads(orders, at)))
            )

    busy = sum(SLOTS[action[0]] for order in orders for action in order)
    return 1 - busy / (len(orders) * max(free))


def _ready(action: Action, done: dict[Action, int], num_stages: int) -> int | None:
    """The slot from which it could start, as far as others go; None: not known yet."""
    kind, chunk, micro = action
    if kind == FORWARD:
        return 0 if chunk == 0 else done.get((FORWARD, chunk - 1, micro))

    own = done.get((FORWARD, chunk, micro)) if kind != WEIGHT else done.get((INPUT, chunk, micro))
    if own is None or kind == WEIGHT or chunk == num_stages - 1:
        return own

    behind = [
        done[key]
        for key in ((BACKWARD, chunk + 1, micro), (INPUT, chunk + 1, micro))
        if key in done
    ]

    return max(own, *behind) if behind else None


def _heads(orders: Sequence[Sequence[Action]], at: Sequence[int]) -> list[Action]:
    return [
        order[position] for order, position in zip(orders, at, strict=True) if position < len(order)
    ]


def in_flight(order: Sequence[Action]) -> int:
    """The most micro-batches of a part whose forward pass is done and whose backward pass is
    not."""
    most = now = 0
    for kind, _, _ in order:
        now += {FORWARD: 1, BACKWARD: -1, WEIGHT: -1}.get(kind, 0)
        most = max(most, now)

    return most


def in_flight_expected(
    schedule: str, *, stages: int, part: int, num_micro_batches: int
) -> int | None:
    """m of gpipe, min(m, stages - part) of 1f1b; None: the others are not bounded by a formula
    here."""
    if schedule == "gpipe":
        return num_micro_batches

    return min(num_micro_batches, stages - part) if schedule == "1f1b" else None


def order_of(schedule: str, *, stages: int, part: int, num_micro_batches: int) -> list[Action]:
    """What a part of one chunk does: all forward passes first (gpipe), or as many as keep the
    pipeline full (1f1b)."""
    ahead = num_micro_batches if schedule == "gpipe" else min(num_micro_batches, stages - part)
    order: list[Action] = [(FORWARD, part, micro) for micro in range(ahead)]

    for micro in range(num_micro_batches):
        order.append((BACKWARD, part, micro))
        if micro + ahead < num_micro_batches:
            order.append((FORWARD, part, micro + ahead))

    return order
