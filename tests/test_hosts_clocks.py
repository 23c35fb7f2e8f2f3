"""Ranks of several hosts: their clocks have nothing in common but the barrier that they start
from."""

from __future__ import annotations

from typing import Any

from benchsuite.results.assemble.cost import on_one_clock


def rank(host: int, boot_ns: int) -> dict[str, Any]:
    """Two steps of 10 ns, an evaluation after the first."""
    steps = {"start_ns": [boot_ns, boot_ns + 10], "end_ns": [boot_ns + 10, boot_ns + 20]}
    evaluations = {"time_ns": [boot_ns + 10]} if host == 0 else None
    shots = {"samples": [64], "time_ns": [boot_ns + 10]}
    return {
        "host": host,
        "start_ns": boot_ns,
        "end_ns": boot_ns + 20,
        "steps": steps,
        "evaluations": evaluations,
        "snapshots": shots,
    }


def test_two_hosts_are_counted_from_their_common_start() -> None:
    aligned = on_one_clock([rank(0, 1_000), rank(1, 10**14)])
    assert [(each["start_ns"], each["end_ns"]) for each in aligned] == [(0, 20), (0, 20)]
    assert aligned[1]["steps"]["end_ns"] == [10, 20] and aligned[0]["evaluations"]["time_ns"] == [
        10
    ]
    assert [each["snapshots"]["time_ns"] for each in aligned] == [[10], [10]]


def test_one_host_keeps_its_one_clock() -> None:
    """A late start is real there."""
    ranks = [rank(0, 1_000), rank(0, 1_005)]
    assert on_one_clock(ranks) == ranks
