"""A rank as torchrun starts it: forks a fresh process per cell, waits for it, says how it ended.

`torchrun ... -m benchsuite.worker --cells cells.json --out RUN` on every host. Every supervisor
leaves `RUN/<index>-<cell id>-s<seed>/supervisor<k>.json` beside its rank's record, and
`supervisor_records.py` reads them together. A dead rank costs its cell, never the job: the
supervisor's own exit code is 0 unless the input is unusable (2).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

from benchsuite.cluster import cells_file, launcher_environment
from benchsuite.cluster.cell_outcome import SERVER_LOST
from benchsuite.cluster.lifeline import die_with_parent
from benchsuite.cluster.rank_imports import (
    RANK_ENTRY,
    preloaded_modules,
    python_path,
    set_one_thread,
)
from benchsuite.cluster.rank_processes import Ending, RankProcesses, start_fork_server
from benchsuite.errors import UsageError
from benchsuite.measure import faults
from benchsuite.plan import declared
from benchsuite.plan.cell import Cell
from benchsuite.results.record import now_iso
from benchsuite.worker.job import EXIT_PARENT_GONE, RankJob, write_atomic

# A rank calls it before its entry: the others are started by other supervisors, one by one.
AWAIT_ALL_RANKS = "benchsuite.cluster.arrival:await_all_ranks"
RECORD_SCHEMA = 1  # of what a supervisor leaves
# How long a rank waits for the others to arrive, beyond the previous cell's deadline.
# It covers a host whose disk is slow to import torch, as `START_S` of the local engine does.
ARRIVAL_S = 120.0


def main(arguments: Sequence[str]) -> int:
    """Becomes a supervisor: this process, which may have imported torch, is replaced by it.

    arguments: those of the command line. Does not return. A supervisor only waits; with torch it
    would hold hundreds of megabytes for that, on every host and for every rank.
    """
    os.environ["PYTHONPATH"] = python_path()
    # What Python still holds in its buffers would be lost with the old program.
    sys.stdout.flush()
    sys.stderr.flush()
    module = "benchsuite.cluster.rank_supervisor"
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


def cell_folder(out: Path, index: int, cell: Cell) -> Path:
    """Where everything about one cell of a job goes: position in the job, id and seed name it."""
    return out / f"{index}-{cell.id}-s{cell.seed}"


class _Supervisor:
    """One rank of a job: its part in every cell, one after the other."""

    def __init__(
        self, place: launcher_environment.Place, out: Path, *, entry: str, modules: Sequence[str]
    ) -> None:
        """Notes the place among the ranks, and finds the interface towards the others.

        out: the job's folder, absolute. entry: what each rank calls. modules: what the fork server
        imports.
        """
        self._place = place
        self._out = out
        self._entry = entry
        self._modules = modules
        self._interface = launcher_environment.interface_towards(place.store_host)
        self._context = multiprocessing.get_context("forkserver")

    def run(self, cells: list[Cell]) -> None:
        """Runs this rank's part of every cell, in the order of the file that all supervisors have
        read.

        Raises EOFError or OSError where the fork server does not start, or a record cannot be
        written.
        """
        start_fork_server(self._context, self._modules)
        store = None if self._place.agent_store else self._host_store()
        # A rank that is done early waits at the next cell for one that may need the whole deadline
        # of this cell, so that deadline is part of the patience for the next arrival.
        allowance_s = ARRIVAL_S

        for index, cell in enumerate(cells):
            self._run_cell(index, cell, arrival_s=allowance_s)
            allowance_s = ARRIVAL_S + cell.budget.timeout_s

            if self._place.rank == 0:
                which = f"[{index + 1}/{len(cells)}] {cell.label} seed {cell.seed}"
                print(which, file=sys.stderr, flush=True)

        # The store has to outlive the last rank that asks it something: it waits until all
        # supervisors have left.
        if not self._place.agent_store:
            self._call("leave", self._place.store_host, self._place.store_port)

        if store is not None:
            store.join(ARRIVAL_S)
            store.kill()

    def _run_cell(self, index: int, cell: Cell, *, arrival_s: float) -> None:
        """This rank's part in one cell: none where the cell has fewer ranks than the job."""
        place = self._place
        folder = cell_folder(self._out, index, cell)
        # Every rank makes the folder and writes the same cell: no host can rely on another's disk.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(folder / "cell.json", json.dumps(cell.to_json()).encode())

        # All supervisors come to the same answer by themselves, without a word between them: it
        # rests on the cell and the size of the job only.
        refusal = _refusal(cell, place.world_size)

        if refusal or place.rank >= cell.world_size:
            if refusal:
                self._record(folder, {"unsupported": refusal})
            return

        # The prefix keeps the keys of this cell apart from those of the others in the one store of
        # the job, and of a job that torchrun has started again: a key left behind would let a rank
        # go too early.
        job = RankJob(
            cell=cell.to_json(),
            rank=place.rank,
            world_size=cell.world_size,
            # The place among the ranks of this host picks the device.
            local_rank=place.local_rank,
            hosts=place.hosts[: cell.world_size],
            run_dir=str(folder),
            store_host=place.store_host,
            store_port=place.store_port,
            store_is_hosted=True,
            store_prefix=f"{index}-{cell.id}-s{cell.seed}-{place.attempt}",
            timeout_s=cell.budget.timeout_s,
            interface=self._interface,
            network_reason=f"started by {place.launcher} in the machine's own network",
            beat_path=str(folder / f"rank{place.rank}.beat"),
        )
        self._wait_for(job, cell, folder, arrival_s=arrival_s)

    def _wait_for(self, job: RankJob, cell: Cell, folder: Path, *, arrival_s: float) -> None:
        """Runs the rank, waits for it, records how it ended; tells the others of a bad end.

        arrival_s: how long, in seconds, the other ranks may take to arrive.
        """
        role = "worker" if job.rank < cell.num_workers else "server"
        expendable = (job.rank,) if role == "worker" and _survives(cell) else ()
        ranks = RankProcesses(self._context, self._entry, first=AWAIT_ALL_RANKS)
        started_at = now_iso()
        begin = time.monotonic()

        try:
            ranks.start(job, role=role)
            # Looked at ten times a second: the beat is a file, and nothing can wait for a change of
            # it.
            ending = Ending.DEADLINE

            # A rank begins its beat when all ranks have arrived: until then its own deadline waits.
            while (
                ending is Ending.DEADLINE
                and not ranks.pulse(job.rank).pid
                and time.monotonic() < begin + arrival_s
            ):
                ending = ranks.wait(time.monotonic() + 0.1, expendable=expendable)

            # They are all here: now the cell's own time begins.
            if ending is Ending.DEADLINE and ranks.pulse(job.rank).pid:
                begin = time.monotonic()
                ending = ranks.wait(begin + job.timeout_s, expendable=expendable)

            # What was seen comes first, then the goodbye that a lost worker owes to the servers;
            # only then may the rest be killed.
            (end,) = ranks.look()
            ranks.finish_goodbyes()
            ranks.kill()
            # The next cell needs one, and this supervisor goes on: only the cell is lost.
            if end.exit_code == SERVER_LOST:
                start_fork_server(self._context, self._modules)

            document = {
                "role": role,
                "exit_code": end.exit_code,
                "state": end.state,
                "pulse": end.pulse._asdict(),
                "error": end.error,
                "at_deadline": ending is Ending.DEADLINE,
                "started_at": started_at,
                "ended_at_s": time.time(),
                "seconds": time.monotonic() - begin,
            }
            self._record(folder, document)

            # Told after the record is written: whoever is woken by the announcement may read it.
            without_record = ending is Ending.DONE and not end.complete and not expendable
            if ending is Ending.BAD_EXIT or without_record:
                self._call("announce_bad_end", job)
        finally:
            ranks.kill()
            ranks.clean()

    def _record(self, folder: Path, fields: Mapping[str, object]) -> None:
        """Writes what this supervisor has to say of a cell, whole or not at all."""
        rank = self._place.rank
        document = {
            "schema": RECORD_SCHEMA,
            "rank": rank,
            "launcher": self._place.launcher,
            **fields,
        }
        write_atomic(folder / f"supervisor{rank}.json", json.dumps(document).encode())

    def _host_store(self) -> multiprocessing.process.BaseProcess | None:
        """Starts the store of the whole job in a process that outlives the cells.

        It listens on the given address only. None where another rank hosts it.
        """
        if self._place.rank != 0:
            return None

        # Bound here, so that a port that is taken is an error of this process with a message, not
        # of a child that nobody watches.
        with socket.create_server(
            (self._place.store_host, self._place.store_port), backlog=1024
        ) as listener:
            return _start(self._context, "host_store", listener, self._place.world_size)

    def _call(self, name: str, *arguments: object) -> None:
        """Calls a function of `arrival.py` in a process of its own, which is ended after 10 s.

        Nothing comes back: that a message did not get through costs the others their patience,
        never this rank.
        """
        process = _start(self._context, name, *arguments)
        process.join(10.0)
        process.kill()


def _start(
    context: ForkServerContext, name: str, *arguments: object
) -> multiprocessing.process.BaseProcess:
    """Forks a process that calls a function of `arrival.py`."""
    process = context.Process(target=_in_arrival, args=(name, *arguments), daemon=True)
    process.start()
    return process


def _in_arrival(name: str, *arguments: object) -> None:
    """Calls a function of `arrival.py`, which imports torch: only in a fork of the fork server."""
    from benchsuite.cluster import arrival

    getattr(arrival, name)(*arguments)


def _refusal(cell: Cell, started: int) -> str:
    """Why a cell cannot run in this job of `started` ranks; "" = it can."""
    if cell.world_size > started:
        formula = (
            f"replicas({cell.replicas}) x model_parallel({cell.model_parallel}) + "
            f"servers({cell.num_servers})"
        )
        needed = cell.world_size
        return (
            f"{formula} = {needed} ranks, but {started} were started: lower replicas or start "
            f"{needed}"
        )

    if cell.tuning != "same":
        return (
            f"tuning = {cell.tuning} needs trials, which only `benchsuite run` makes: set "
            "tuning = same, lr_factor"
        )

    try:
        faults.check(cell.faults, cell.world_size)
    except UsageError as error:
        return str(error)

    return ""


def _survives(cell: Cell) -> bool:
    """Whether the cell's strategy goes on without a lost worker."""
    return declared.strategy(cell.sync).survives == "worker"


def _supervise(arguments: Sequence[str]) -> int:
    """Reads the command line, runs the cells, and returns the exit code.

    0: done, whatever became of single cells. 1: this host cannot run ranks. 2: unusable input. 130:
    interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchsuite.worker", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--cells", type=Path, required=True, help="cells.json of `benchsuite plan PLAN --write`"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="run directory; `benchsuite collect` reads it"
    )
    parser.add_argument("--entry", default=RANK_ENTRY, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    try:
        place = launcher_environment.resolve(os.environ)
        cells = cells_file.read(options.cells)
        out = options.out.resolve()
        # Records of two jobs in one folder would be read as one job, with ranks that finished
        # before others began.
        own_record = f"supervisor{place.rank}.json"
        folders = [cell_folder(out, index, cell) for index, cell in enumerate(cells)]

        if any((folder / own_record).exists() for folder in folders):
            raise UsageError(
                f"{out} holds records of an earlier job: collect them and give another --out"
            )

        # torchrun's agent is our parent and ends with the job. Other launchers put a shell or a
        # daemon in between, which may end long before.
        if place.launcher == "torchrun":
            die_with_parent(os.getppid(), exit_code=EXIT_PARENT_GONE)

        set_one_thread()
        _Supervisor(place, out, entry=options.entry, modules=preloaded_modules()).run(cells)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EOFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or options.out}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130

    return 0


if __name__ == "__main__":
    sys.exit(_supervise(sys.argv[1:]))
