"""Reads Chakra traces back, sharing nothing with the writer, and says what is wrong with them;
replays them on ports.

The encoding: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMP = 4
SEND = 5
RECV = 6
COLL = 7


@dataclass
class Node:
    rank: int
    id: int = 0
    name: str = ""
    type: int = 0
    ctrl: list[int] = field(default_factory=list)
    data: list[int] = field(default_factory=list)
    start_us: int = 0
    duration_us: int = 0
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def begin(self) -> int:
        return int(self.attrs["start_ns"])

    @property
    def end(self) -> int:
        return self.begin + int(self.attrs["duration_ns"])

    @property
    def message(self) -> tuple[int, int, int]:
        return self.attrs["comm_src"], self.attrs["comm_dst"], self.attrs["comm_tag"]

    @property
    def is_ticket(self) -> bool:
        return self.name.endswith(" ticket")


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at = at + 1
        shift = shift + 7
        if data[at - 1] < 0x80:
            return value, at


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        value: Any
        if key & 7 == 0:
            value, at = varint(data, at)
        else:
            assert key & 7 == 2, f"wire type {key & 7}"
            size, at = varint(data, at)
            value = data[at : at + size]
            at = at + size
        yield key >> 3, value


def numbers(packed: bytes) -> list[int]:
    found = []
    at = 0
    while at < len(packed):
        value, at = varint(packed, at)
        found.append(value)
    return found


def messages(path: Path) -> list[bytes]:
    data = path.read_bytes()
    at = 0
    found = []
    while at < len(data):
        size, at = varint(data, at)
        found.append(data[at : at + size])
        at += size
    assert at == len(data), "the last message is cut off"
    return found


def attribute(data: bytes) -> tuple[str, Any]:
    (first, name), (kind, value) = fields(data)
    assert first == 1 and kind in (7, 9, 13, 27, 29)  # int32, int64, uint64, bool, string
    return name.decode(), value.decode() if kind == 29 else bool(value) if kind == 27 else value


def read_node(rank: int, data: bytes) -> Node:
    node = Node(rank)
    plain = {1: "id", 3: "type", 6: "start_us", 7: "duration_us"}
    for number, value in fields(data):
        if number in plain:
            setattr(node, plain[number], value)
        elif number == 2:
            node.name = value.decode()
        elif number in (4, 5):
            (node.ctrl if number == 4 else node.data).extend(numbers(value))
        else:
            assert number == 10, f"field {number} of a node"
            node.attrs.update([attribute(value)])
    return node


Trace = dict[tuple[int, int], Node]


def read(traces: tuple[Path, ...]) -> Trace:
    found: Trace = {}
    for rank, path in enumerate(traces):
        head, *rest = messages(path)
        assert dict(fields(head))[1] == b"0.0.4"
        for node in (read_node(rank, each) for each in rest):
            assert (rank, node.id) not in found
            found[rank, node.id] = node
    return found


# -- what must hold of a trace ---------------------------------------------------------------------


def faults(trace: Trace) -> list[str]:
    """Sends without their receive, waits for nobody, circles, and events that begin before or long
    after they could."""
    found = []
    sides: dict[tuple[int, int, int], list[Node]] = defaultdict(list)
    for node in trace.values():
        if node.type in (SEND, RECV):
            sides[node.message].append(node)
            if node.rank != node.message[node.type == RECV]:
                found.append(f"rank {node.rank} has {node.name} {node.message}")
    for message, both in sides.items():
        if Counter(node.type for node in both) != {SEND: 1, RECV: 1}:
            found.append(f"message {message}: {[node.name for node in both]}")
        elif len({node.attrs["comm_size"] for node in both}) > 1:
            found.append(f"message {message}: {[node.attrs['comm_size'] for node in both]} bytes")
        elif (
            min(both, key=lambda node: node.type).begin > max(both, key=lambda node: node.type).end
        ):
            found.append(f"message {message} is there before it is sent")
    done: set[tuple[int, int]] = set()
    waiting = {
        key: {(key[0], after) for after in (*node.ctrl, *node.data)} for key, node in trace.items()
    }
    while free := [key for key, after in waiting.items() if after <= done]:
        for key in free:
            node = trace[key]
            after = [trace[each] for each in waiting.pop(key)]
            due = max((each.end for each in after), default=0)
            if node.begin != due:
                found.append(
                    f"rank {key[0]} node {key[1]} begins at {node.begin}, and all it waits for is over at {due}"
                )
            if any(each.start_us + each.duration_us > node.start_us for each in after):
                found.append(
                    f"rank {key[0]} node {key[1]} begins before what it waits for ends, in us"
                )
            done.add(key)
    return found + [
        f"rank {rank} node {number} waits for a circle, or for nothing there is"
        for rank, number in waiting
    ]


def bytes_by_edge(trace: Trace, kind: int = SEND) -> dict[tuple[int, int], int]:
    found: Counter[tuple[int, int]] = Counter()
    for node in trace.values():
        if node.type == kind and not node.is_ticket:
            found[node.message[:2]] += node.attrs["comm_size"]
    return dict(found)


def replay(trace: Trace, *, ns_per_byte: float, latency: int) -> int:
    """When the last event ends on the ports of `virtual/network.py`: only computing takes the time
    that the trace says."""
    out_free: Counter[int] = Counter()
    in_free: Counter[int] = Counter()
    waiting = {
        key: {(key[0], after) for after in (*node.ctrl, *node.data)} for key, node in trace.items()
    }
    followers = {key: [other for other, after in waiting.items() if key in after] for key in trace}
    heap = [
        (0, 1, *key) for key, after in waiting.items() if not after
    ]  # (time, 0 = at a port | 1 = begins, rank, id)
    ends: dict[tuple[int, int], int] = {}
    there: dict[tuple[int, int, int], int] = {}
    asked: dict[tuple[int, int, int], tuple[int, int]] = {}
    inside: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def ended(key: tuple[int, int], at: int) -> None:
        ends[key] = at
        for other in followers[key]:
            if waiting[other] <= ends.keys():
                heapq.heappush(heap, (max(ends[each] for each in waiting[other]), 1, *other))

    def arrived(message: tuple[int, int, int], at: int) -> None:
        there[message] = at
        if message in asked:
            ended(asked[message], at)

    heapq.heapify(heap)
    while heap:
        now, begins, rank, number = heapq.heappop(heap)
        node = trace[rank, number]
        key = (rank, number)
        duration = round(node.attrs.get("comm_size", 0) * ns_per_byte)
        if not begins:
            into = node.message[1]
            in_free[into] = max(now, in_free[into]) + duration
            arrived(node.message, in_free[into])
        elif node.type == COMP:
            ended(key, now + node.attrs["duration_ns"])
        elif node.type == SEND and node.is_ticket:
            ended(key, now)
            arrived(node.message, now + latency)
        elif node.type == SEND:
            leaves = max(now, out_free[rank])
            out_free[rank] = leaves + duration
            ended(key, leaves + duration)
            heapq.heappush(heap, (leaves + latency, 0, rank, number))
        elif node.type == RECV and node.message in there:
            ended(key, max(now, there[node.message]))
        elif node.type == RECV:
            asked[node.message] = key
        else:  # an all-reduce: a ring's price, from when everybody is there
            inside[node.attrs["comm_tag"]].append(key)
            size = len({each for each, _ in trace})
            if len(inside[node.attrs["comm_tag"]]) == size:
                moved = node.attrs["comm_size"] * ns_per_byte / size
                for each in inside[node.attrs["comm_tag"]]:
                    ended(each, now + round(2 * (size - 1) * (latency + moved)))
    assert ends.keys() == trace.keys(), f"{len(trace) - len(ends)} events never end"
    return max(ends.values())
