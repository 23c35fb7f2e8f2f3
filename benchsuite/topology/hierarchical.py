"""Hierarchical all-reduce: shared memory inside a host, then one rank of each host across (Jia et
al. 2018).

The ranks of a host add their vectors in rank order, each rank one part of them
(`host_memory.py`). The host's first rank reduces the host's sum with those of the other hosts,
over a ring or by the backend's all-reduce, and all ranks of the host get the result: summed first,
divided once, the same bits everywhere.

Sends 2 (H-1) M bytes per step between H hosts in all, 2 (H-1)/H M per first rank; one host alone
sends nothing. In a host of n ranks 2 (n-1) M bytes go through shared memory, and (n-1)/n M more
where there are other hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchsuite import topology
from benchsuite.comm import Comm, Traffic
from benchsuite.topology.host_memory import HostMemory, host_traffic
from benchsuite.topology.native import Topology as Native
from benchsuite.topology.ring import Topology as Ring


@dataclass
class Topology(topology.Topology):
    """Vectors are added inside each host first, then between hosts.

    The slow wire between hosts carries the sum of a host instead of the vectors of its ranks.
    """

    across: Literal["ring", "native"] = "ring"
    """Between the first ranks of the hosts: our ring, or the backend's all-reduce."""

    timing_free = True
    by_host = True  # what is added first depends on who shares a host
    owns_buffer = True
    kind = "collective"
    order = 5
    refuses = (
        {
            "rule": "cuda",
            "when": 'cell.device != "cpu"',
            "reason": (
                "topology = {name} with device = {cell.device}: ranks of a host meet in the "
                "host's memory"
            ),
            "remedy": "set topology = native, or device = cpu",
        },
    )
    num_workers = 0
    num_servers = 0

    def __post_init__(self) -> None:
        # Host number of each rank; empty until `place` is called.
        self._hosts: Sequence[int] = ()

    def place(self, hosts: Sequence[int]) -> None:
        """Takes the host number of each rank.

        A prediction of an instance that is not started needs it; without it all ranks are taken
        to be on one host.
        """
        self._hosts = tuple(hosts)

    @property
    def payload_source(self) -> str:
        """Says how bytes are known: the ring's sends are counted, the backend's calls derived.

        One host alone sends nothing, which is a count as well.
        """
        several_hosts = len(set(self._hosts)) > 1
        return "derived" if self.across == "native" and several_hosts else "counted"

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        self._comm = comm
        self.num_workers = comm.size
        self.place(comm.hosts)

        # A group is created by all ranks together, members or not: every rank makes all calls of
        # `split`, in the same order, and gets None for a group that it is not in.
        groups = ranks_by_host(self._hosts)
        inside = [comm.split(ranks) for ranks in groups if len(ranks) > 1]

        # The group of this rank's own host; None where it is alone there.
        here = next((part for part in inside if part is not None), None)
        self._memory = HostMemory(here) if here is not None else None

        self._between = self._make_across()
        if len(groups) > 1:
            firsts = comm.split([ranks[0] for ranks in groups])
            if firsts is not None:
                self._between.start(firsts)

    def buffer(self, numel: int, like: Tensor) -> Tensor:
        """Gives memory that the host's ranks share.

        A vector that lives here, or a slice of it, is neither copied in nor out of `mean`.
        """
        if self._memory is None:
            return torch.zeros(numel, dtype=like.dtype, device=like.device)

        return self._memory.slot(numel, like.dtype)

    def mean(self, flat: Tensor) -> None:
        """Replaces `flat` (P,) by the mean over the workers of all hosts.

        If `flat` lies in memory of `buffer`, it must lie at the same place of it on all ranks of
        the host: each adds its part of the others' vectors there.
        """
        divisor = self.num_workers

        # With one host there is nothing across, and the host's sum is divided where it is made.
        across = (
            partial(self._between.total, divisor=divisor) if len(set(self._hosts)) > 1 else None
        )
        # A rank that is alone on its host goes across at once.
        if self._memory is not None:
            self._memory.total(flat, divisor=divisor, across=across)
        elif across is not None:
            across(flat)

    def _make_across(self) -> Ring | Native:
        """Makes the topology of the hosts' first ranks, as the option `across` says."""
        return Ring() if self.across == "ring" else Native()

    # -- predictions -------------------------------------------------------------------------------

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        """Predicts the traffic of one mean, by local rank: between hosts, and through memory."""
        groups = ranks_by_host(self._hosts or (0,) * num_workers)
        traffic = Traffic()

        # Inside the hosts; an empty vector goes nowhere.
        for ranks in groups if numel else []:
            traffic += host_traffic(numel, itemsize, ranks, alone=len(groups) == 1)

        # Local rank h of the topology across is the first rank of host h.
        between = self._make_across().predicted_traffic(numel, itemsize, num_workers=len(groups))

        for (source, destination), num_bytes in between.payload.items():
            messages = between.messages[source, destination]
            traffic.add(groups[source][0], groups[destination][0], num_bytes, messages)

        return traffic


def ranks_by_host(hosts: Sequence[int]) -> list[list[int]]:
    """Lists the ranks of each host, hosts in the order of their first ranks.

    `hosts` has the host number of every rank.
    """
    groups: dict[int, list[int]] = {}
    for rank, host in enumerate(hosts):
        groups.setdefault(host, []).append(rank)

    return list(groups.values())
