"""Ranks for laws that are real processes.

They are for strategies that call the library by themselves, because the library has one default
group per process. A cluster's rank is handed a body to call and writes back what it returned.
"""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchsuite.comm import Traffic
from benchsuite.comm.process import ProcessComm
from benchsuite.laws import MakeRanks
from benchsuite.laws.harness.ranks import run_as_batch_work
from benchsuite.laws.harness.runs import RankRun, one_rank
from benchsuite.plan.cell import Cell, from_json
from benchsuite.plan.hashing import canonical
from benchsuite.results.record import Outcome, Status
from benchsuite.worker.job import RankJob, write_rank_file
from benchsuite.worker.rendezvous import connect, open_store

ENTRY = "benchsuite.laws.harness.process_ranks:call_body"


class Cluster(Protocol):
    """What starts the processes; `cluster/local.py` is one."""

    def run(self, cell: Cell, run_dir: Path, *, entry: str = "") -> Outcome:
        """Runs a cell in `run_dir`; each of its ranks calls `entry`."""


def process_ranks(cluster: Cluster, folder: Path) -> MakeRanks:
    """Ranks that are fresh processes of `cluster` and keep their files in `folder`.

    The body that they run must be a `functools.partial` with a keyword `cell`, and must pickle.
    """
    runs = itertools.count()

    def make_ranks(size: int, body: Callable[..., Any], *, strict: str = "") -> list[Any]:
        assert isinstance(body, partial)
        cell = body.keywords["cell"]
        assert not strict and cell.world_size == size
        run_dir = folder / str(next(runs))
        run_dir.mkdir()
        (run_dir / "body").write_bytes(pickle.dumps(body))
        outcome = cluster.run(cell, run_dir, entry=ENTRY)
        if outcome.status is not Status.OK:
            raise RuntimeError(outcome.reason)
        return [pickle.loads((run_dir / f"result{rank}").read_bytes()) for rank in range(size)]

    return make_ranks


def together(make_ranks: MakeRanks, shown: Sequence[Cell]) -> MakeRanks:
    """The same ranks, but started once for all cells of `shown` that have one world size.

    Starting processes takes longer than such a run, so the unchanged runs of these cells follow one
    another in the same processes, each on a group of its own. Where one of them fails, its error is
    raised for the caller who asks for that run; the others are not affected.
    """
    found: dict[str, list[Any]] = {}
    by_size: dict[int, dict[str, Cell]] = {}
    for cell in shown:
        by_size.setdefault(cell.world_size, {})[_key(cell)] = cell

    def call(size: int, body: Callable[..., Any], *, strict: str = "") -> list[Any]:
        assert isinstance(body, partial)
        arguments = body.keywords
        key = _key(arguments["cell"])
        unchanged = all(arguments.get(name) is None for name in ("change", "after"))
        if strict or not unchanged or body.func is not one_rank or key not in by_size.get(size, {}):
            return make_ranks(size, body, strict=strict)
        if key not in found:
            all_of_size = tuple(by_size[size].values())
            budget = dataclasses.replace(
                all_of_size[0].budget, timeout_s=sum(c.budget.timeout_s for c in all_of_size)
            )
            host = dataclasses.replace(all_of_size[0], budget=budget)
            ranks = make_ranks(size, partial(one_after_another, cell=host, shown=all_of_size))
            found.update(
                (name, [rank[at] for rank in ranks]) for at, name in enumerate(by_size[size])
            )
        failed = [result for result in found[key] if isinstance(result, str)]
        if failed:
            raise RuntimeError(failed[0])
        return found[key]

    return call


def _key(cell: Cell) -> str:
    return canonical(cell.to_json())


def one_after_another(
    comm: ProcessComm, *, cell: Cell, shown: Sequence[Cell]
) -> list[RankRun | str]:
    """The body that a rank runs for `together`: one result per cell, or the text of its error.

    `cell` is the one for which the ranks were started; the cells that are run are those in `shown`.
    """
    results: list[RankRun | str] = []
    for each in shown:
        own = comm.split(range(comm.size))
        assert own is not None
        own.traffic = Traffic()
        own.calls = {}
        try:
            results.append(one_rank(own, cell=each, change=None, after=None))
        except Exception as error:  # noqa: BLE001  told to who asks for this run; the others go on
            results.append(f"{type(error).__name__}: {error} [{each.label}]")
    return results


def call_body(job: RankJob) -> None:
    """The entry of a rank: connects, calls the pickled body, and writes what it returned."""
    import torch

    run_as_batch_work()
    torch.set_num_threads(1)
    comm = connect(job, from_json(job.cell), open_store(job), None)
    body = pickle.loads(Path(job.run_dir, "body").read_bytes())
    Path(job.run_dir, f"result{job.rank}").write_bytes(pickle.dumps(body(comm)))
    write_rank_file(job.run_dir, job.rank, "{}")
    comm.barrier()
