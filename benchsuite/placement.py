"""Where a cell's ranks stand: on which host, behind which network port. Imports no torch."""

from __future__ import annotations

from benchsuite.cell import Cell


def hosts(cell: Cell) -> list[int]:
    """Host number of each rank: in blocks; `with_worker`: workers in blocks, server j on the host of worker j."""
    if cell.server_placement == "own_host":
        return [rank * cell.hosts // cell.world_size for rank in range(cell.world_size)]
    workers = [rank * cell.hosts // cell.num_workers for rank in range(cell.num_workers)]
    return workers + workers[: cell.num_servers]


def ports(cell: Cell) -> list[int]:
    """The network port of each rank: its host's. hosts = 1 stands for one host per rank, servers placed as it says."""
    if cell.hosts > 1:
        return hosts(cell)
    alone = list(range(cell.world_size))
    return alone if cell.server_placement == "own_host" else alone[: cell.num_workers] + alone[: cell.num_servers]
