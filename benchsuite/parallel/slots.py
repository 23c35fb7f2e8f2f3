"""The bubble of a pipeline, the share of the time in which its parts wait for each other.

It is given by formula, and counted in slots from the order in which the parts do their passes. A
slot is a forward pass of a chunk, the half of its backward pass that gives the input's gradient,
or the half that gives the weights'; transfers take no time. Narayanan et al. 2021 (Megatron-LM),
section 2.2; Qi et al. 2023 (Zero Bubble Pipeline Parallelism), section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

# What is done (one of the letters below), the chunk, the micro-batch.
Action = tuple[str, int, int]

# The letters that the papers use. B is I and W in one.
FORWARD = "F"
BACKWARD = "B"
INPUT = "I"
WEIGHT = "W"

# How many slots each of them takes.
SLOTS = {FORWARD: 1, BACKWARD: 2, INPUT: 1, WEIGHT: 1}


def predicted(schedule: str, *, stages: int, num_micro_batches: int, num_chunks: int) -> float:
    """Share of the time that a part waits, by formula, where all chunks are equally long.

    (p - 1) / (V m + p - 1) for p stages, V chunks on each and m micro-batches. For the zero-bubble
    schedule forward, I and W are taken as equally long: (p - 1) / (3 V m + p - 1).
    """
    work = num_chunks * num_micro_batches * (3 if schedule == "zero_bubble" else 1)
    return float(Fraction(stages - 1, work + stages - 1))


def counted(orders: Sequence[Sequence[Action]], *, num_stages: int) -> float:
    """Share of the time that a part waits, counted from the orders of all parts.

    Everything starts as soon as what it needs is there. ValueError where the orders contradict each
    other, so that parts would wait for ever.
    """
    done: dict[Action, int] = {}  # -> the slot in which it is over
    at = [0] * len(orders)  # how far each part has come in its order
    free = [0] * len(orders)  # the slot in which each part is free again

    # Each part goes on as far as it can; rounds repeat until none of them can.

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
    """The slot from which an action could start, as far as others go; None: not known yet.

    A forward pass needs that of the chunk before. A backward pass needs its own forward pass and
    the gradient from the chunk behind. The weights' half needs only the input's half.
    """
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
    """What each part would do next, of those that are not through."""
    return [
        order[position] for order, position in zip(orders, at, strict=True) if position < len(order)
    ]


def in_flight(order: Sequence[Action]) -> int:
    """The most micro-batches whose forward pass a part has done and whose backward pass it has not.

    So many sets of activations are in its memory at once. I alone frees none: W still needs them.
    """
    most = now = 0

    for kind, _, _ in order:
        now += {FORWARD: 1, BACKWARD: -1, WEIGHT: -1}.get(kind, 0)
        most = max(most, now)

    return most


def in_flight_expected(
    schedule: str, *, stages: int, part: int, num_micro_batches: int
) -> int | None:
    """What `in_flight` should be: m for gpipe, min(m, stages - part) for 1f1b.

    None for the others, which no formula bounds here.
    """
    if schedule == "gpipe":
        return num_micro_batches

    return min(num_micro_batches, stages - part) if schedule == "1f1b" else None


def order_of(schedule: str, *, stages: int, part: int, num_micro_batches: int) -> list[Action]:
    """What a part of one chunk does, in its order.

    gpipe does all forward passes first. 1f1b does as many as keep the pipeline full, then one
    backward and one forward pass in turn.
    """
    ahead = num_micro_batches if schedule == "gpipe" else min(num_micro_batches, stages - part)
    order: list[Action] = [(FORWARD, part, micro) for micro in range(ahead)]

    for micro in range(num_micro_batches):
        order.append((BACKWARD, part, micro))
        if micro + ahead < num_micro_batches:
            order.append((FORWARD, part, micro + ahead))

    return order
