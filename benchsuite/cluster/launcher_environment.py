"""Which rank this process is, on which host: told by the variables that launchers set.

torchrun, Slurm, Open MPI and PMI launchers are known. The first one whose rank variable is set
counts, so torchrun inside a Slurm job is torchrun.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from fcntl import ioctl

from benchsuite.errors import UsageError

_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class _Variables:
    """The names under which a launcher tells a process its place."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


# In the order in which they are asked: a torchrun inside a Slurm job sets its own variables beside
# those of Slurm, which say where the torchrun is and not where the rank is.
LAUNCHERS: Mapping[str, _Variables] = {
    "torchrun": _Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "slurm": _Variables("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "openmpi": _Variables(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "pmi": _Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those that the launcher started, and where they meet."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store_host: str
    store_port: int
    agent_store: bool  # the launcher hosts a store there already
    attempt: int  # torchrun's restart count

    @property
    def hosts(self) -> tuple[int, ...]:
        """Host number of each rank; launchers number the ranks host by host.

        Every host is taken to have as many ranks as this one.
        """
        return tuple(rank // self.local_world_size for rank in range(self.world_size))


def resolve(environment: Mapping[str, str]) -> Place:
    """The place of this process among the ranks.

    environment: that of the process. Raises UsageError where no launcher started it, or none said
    where the ranks meet.
    """
    for launcher, names in LAUNCHERS.items():
        if names.rank not in environment:
            continue

        missing = [
            name
            for name in (names.world_size, "MASTER_ADDR", "MASTER_PORT")
            if name not in environment
        ]

        if missing:
            lacking = ", ".join(missing)
            raise UsageError(
                f"{launcher} set {names.rank} but not {lacking}: export {missing[0]} for all ranks"
            )

        world_size = int(environment[names.world_size])
        rank = int(environment[names.rank])
        return Place(
            launcher=launcher,
            rank=rank,
            world_size=world_size,
            local_rank=int(environment.get(names.local_rank, rank)),
            local_world_size=int(environment.get(names.local_world_size, world_size)),
            store_host=environment["MASTER_ADDR"],
            store_port=int(environment["MASTER_PORT"]),
            # torchrun hosts a store in its agent; the other launchers host none
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )

    known = ", ".join(names.rank for names in LAUNCHERS.values())
    raise UsageError(
        f"no launcher started this process (none of {known} is set): start it with torchrun"
    )


def interface_towards(host: str) -> str:
    """The network interface through which this machine reaches `host`; `lo` for itself.

    gloo would otherwise take the interface that the host's own name resolves to, which on many
    machines is a loopback that no other host can reach. "" where it is not known; then gloo
    decides.
    """
    try:
        address = socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0]
        if ipaddress.ip_address(address).is_loopback:
            return "lo"

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: asks the routing table
            own = probe.getsockname()[0]

            for _, name in socket.if_nameindex():
                if _address(probe, name) == own:
                    return name
    except OSError:
        pass

    return ""


def _address(probe: socket.socket, name: str) -> str:
    """The IPv4 address of an interface; "" where it has none."""
    try:
        # The kernel's names have 15 bytes and a zero; the address stands in bytes 20 to 24 of its
        # answer, after the name and the head of a `sockaddr_in`.
        answer = ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    except OSError:  # an interface without an address
        return ""

    return socket.inet_ntoa(answer[20:24])
