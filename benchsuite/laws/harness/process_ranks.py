"""Ranks for laws that are real processes.

They are for strategies that call the library by themselves, because the library has one default
group per process. A cluster's rank is handed a body to call and writes back what it returned.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchsuite.comm import Traffic
from benchsuite.comm.process import ProcessComm
from benchsuite.laws import Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.ranks import run_as_batch_work
from benchsuite.laws.harness.runs import Change, RankRun, one_rank
from benchsuite.plan.cell import Cell, from_json, resolve
from benchsuite.plan.hashing import canonical
from benchsuite.results.record import Outcome, Status
from benchsuite.worker.job import RankJob, write_rank_file
from benchsuite.worker.rendezvous import connect, open_store
from benchsuite.worker.setup import Training

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


@dataclass(frozen=True)
class LawRun:
    """A run that a law asks for, known before the law is checked: what `runs.one_rank` takes."""

    cell: Cell
    change: Change | None = None
    after: Callable[[Training], Any] | None = None

    @property
    def answers(self) -> tuple[str, str]:
        """Keys of the requests that this run answers.

        They are the run itself, and the run with nothing called at its end: what `after` does comes
        when all else has been recorded.
        """
        return _key(self.cell, self.change, self.after), _key(self.cell, self.change, None)


def asked_by(law: Law, shown: Sequence[Cell]) -> Iterator[LawRun]:
    """The runs of a law on those of the cells whose ranks are processes, as far as it says them."""
    if law.own_run and not law.asks:
        return
    in_processes = [cell for cell in shown if cases.in_processes(cell)]
    for _, cell in cases.cases([law], in_processes):
        yield LawRun(resolve(cell), **law.asks)


def together(make_ranks: MakeRanks, asked: Iterable[LawRun]) -> MakeRanks:
    """The same ranks, but started once for all of these runs that have one world size.

    Starting processes takes longer than such a run, so the runs follow one another in the same
    processes, each on a group of its own. Where one of them fails, its error is raised for the
    caller who asks for that run; the others are not affected.
    """
    # World size -> key of a request -> the run that answers it. Runs that call something at their
    # end come first: they answer the same runs without it, too.
    by_size: dict[int, dict[str, LawRun]] = {}
    for each in sorted(asked, key=lambda run: run.after is None):
        requests = by_size.setdefault(each.cell.world_size, {})
        for key in each.answers:
            requests.setdefault(key, each)

    # What the ranks of a run returned, by the identity of the run.
    found: dict[int, list[Any]] = {}

    def call(size: int, body: Callable[..., Any], *, strict: str = "") -> list[Any]:
        assert isinstance(body, partial)
        known = body.func is one_rank and not strict
        run = by_size.get(size, {}).get(_key(**body.keywords)) if known else None
        if run is None:
            return make_ranks(size, body, strict=strict)
        if id(run) not in found:
            runs = list({id(each): each for each in by_size[size].values()}.values())
            timeout_s = sum(each.cell.budget.timeout_s for each in runs)
            budget = dataclasses.replace(run.cell.budget, timeout_s=timeout_s)
            host = dataclasses.replace(run.cell, budget=budget)
            ranks = make_ranks(size, partial(one_after_another, cell=host, runs=runs))
            found.update((id(each), [rank[at] for rank in ranks]) for at, each in enumerate(runs))
        failed = [result for result in found[id(run)] if isinstance(result, str)]
        if failed:
            raise RuntimeError(failed[0])
        return found[id(run)]

    return call


def _key(
    cell: Cell,
    change: Change | None = None,
    after: Callable[[Training], Any] | None = None,
) -> str:
    """Equal for equal runs; a function that has no name of its own is equal to nothing else."""
    names = []
    for function in (change, after):
        if inspect.isfunction(function):
            names.append(f"{function.__module__}.{function.__qualname__}")
        else:
            names.append("" if function is None else str(function))
    return canonical([cell.to_json(), *names])


def one_after_another(
    comm: ProcessComm, *, cell: Cell, runs: Sequence[LawRun]
) -> list[RankRun | str]:
    """The body that a rank runs for `together`: one result per run, or the text of its error.

    `cell` is the one for which the ranks were started; the cells that are run are those of `runs`.
    """
    results: list[RankRun | str] = []
    for each in runs:
        own = comm.split(range(comm.size))
        assert own is not None
        own.traffic = Traffic()
        own.calls = {}
        try:
            results.append(one_rank(own, cell=each.cell, change=each.change, after=each.after))
        except Exception as error:  # noqa: BLE001  told to who asks for this run; the others go on
            results.append(f"{type(error).__name__}: {error} [{each.cell.label}]")
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
