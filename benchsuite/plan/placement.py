"""Where a cell's ranks stand: on which host, behind which network port. Imports no torch."""

from __future__ import annotations

from benchsuite.plan.cell import Cell


def hosts(cell: Cell) -> list[int]:
    """The host's number for each rank.

    Ranks are placed in blocks. With `server_placement = with_worker` only the workers are, and
    server j stands on the host of worker j.
    """
    if cell.server_placement == "own_host":
        # Whole blocks whose sizes differ by one at most, also where the hosts do not divide the
        # ranks.
        return [rank * cell.hosts // cell.world_size for rank in range(cell.world_size)]

    workers = [rank * cell.hosts // cell.num_workers for rank in range(cell.num_workers)]
    return workers + workers[: cell.num_servers]


def replica_and_part(cell: Cell, rank: int) -> tuple[int, int]:
    """Which replica a worker belongs to, and which part of it the worker holds.

    rank: of a worker, so below `cell.num_workers`. With `replica_major` the parts of a replica have
    neighbouring ranks (worker rank = replica x model_parallel + part), with `part_major` the
    replicas of a part have.
    """
    if cell.rank_placement == "replica_major":
        return divmod(rank, cell.model_parallel)
    part, replica = divmod(rank, cell.replicas)
    return replica, part


def ranks_of_replica(cell: Cell, replica: int) -> list[int]:
    """World ranks of the parts of one replica, in the order of the parts."""
    if cell.rank_placement == "replica_major":
        return [replica * cell.model_parallel + part for part in range(cell.model_parallel)]
    return [part * cell.replicas + replica for part in range(cell.model_parallel)]


def ranks_of_part(cell: Cell, part: int) -> list[int]:
    """World ranks that hold one part, replica by replica, and then the servers.

    The servers are in every such list, because they hold slices of all parts.
    """
    workers = [ranks_of_replica(cell, replica)[part] for replica in range(cell.replicas)]
    return [*workers, *range(cell.num_workers, cell.world_size)]


def ports(cell: Cell) -> list[int]:
    """The network port of each rank, which is that of its host.

    `hosts = 1` stands for one host per rank here; servers stand where `server_placement` says.
    """
    if cell.hosts > 1:
        return hosts(cell)

    # With one host each, a server beside a worker shares that worker's port, and so waits for it.
    alone = list(range(cell.world_size))

    return (
        alone
        if cell.server_placement == "own_host"
        else alone[: cell.num_workers] + alone[: cell.num_servers]
    )
