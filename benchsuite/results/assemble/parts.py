"""Model-parallel replicas in a run file.

Whose samples count, one checksum of all parts, and what each part holds and sends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchsuite.comm.traffic import Traffic
from benchsuite.plan import hashing
from benchsuite.plan.cell import Cell
from benchsuite.plan.placement import replica_and_part

Rank = Mapping[str, Any]
# Facts of a part that were measured: they are no property of the cell, and belong to its cost.
TIMED = ("busy_s", "bubble_measured")


def counts(rank: Rank) -> bool:
    """Whether a worker's samples count: parts that read the same share of a batch are one
    reader.
    """
    held = rank.get("model_parallel")
    return held is None or bool(held["reads"])


def num_parameters(ranks: Sequence[Rank]) -> int:
    """The parameters of the whole model: what the parts of the first replica own together."""
    parts = _first_replica(ranks)
    return sum(part["owned"] for part in parts) if parts else int(ranks[0]["num_parameters"])


def checksum(ranks: Sequence[Rank]) -> str | None:
    """The sha256 of the last snapshot; of a model-parallel replica that of its parts' checksums."""
    found = [rank["evaluations"]["checksum"] for rank in ranks if rank["evaluations"]]
    if len(found) < 2:
        return found[0] if found else None

    return hashing.checksum("".join(found).encode())


def section(cell: Cell, ranks: Sequence[Rank], payload: Traffic | None) -> dict[str, Any]:
    """`{"parallel": ..}` of a cell with model-parallel replicas, else {}.

    held, owned: elements of each part's vector, and those of them that no other part counts. facts:
    what a part says of itself, times aside. The payload is told apart: from part to part of a
    replica, or between replicas (servers included).
    """
    parts = _first_replica(ranks)
    if not parts:
        return {}

    inside = None
    between = None

    if payload is not None:
        inside = 0

        for (source, destination), num_bytes in payload.payload.items():
            # A server is in no replica, so what it sends is never inside of one.
            replica = _replica(cell, source)
            if replica is not None and replica == _replica(cell, destination):
                inside += num_bytes

        between = payload.payload_bytes - inside

    facts = []
    for part in parts:
        facts.append({name: fact for name, fact in part["facts"].items() if name not in TIMED})
    return {
        "parallel": {
            "held": [part["held"] for part in parts],
            "owned": [part["owned"] for part in parts],
            "facts": facts,
            "inside_bytes": inside,
            "between_bytes": between,
        }
    }


def times(ranks: Sequence[Rank]) -> dict[str, Any]:
    """`{"parts": ..}`: times that the parts of the first replica took themselves; {} where they
    took none.
    """
    told = []
    for part in _first_replica(ranks):
        told.append({name: part["facts"][name] for name in TIMED if name in part["facts"]})
    return {"parts": told} if any(told) else {}


def _first_replica(ranks: Sequence[Rank]) -> list[Mapping[str, Any]]:
    """What the parts of the first replica recorded, in their order; [] where a replica is one
    rank.
    """
    parts = [rank["model_parallel"] for rank in ranks if rank.get("model_parallel")]
    first = [part for part in parts if part["replica"] == 0]
    return sorted(first, key=lambda part: int(part["part"]))


def _replica(cell: Cell, rank: int) -> int | None:
    """The replica that a rank belongs to; None for a server."""
    if rank >= cell.num_workers:
        return None

    replica, _ = replica_and_part(cell, rank)
    return replica
