"""The cell host: one process per suite, alone in a private network, that runs cells one after the
other.

`python -P -m benchsuite.cluster.cell_host OUTCOME_FD` reads one JSON line per cell from its
standard input and writes one JSON line per outcome to the descriptor. The end of its input is the end of the
suite. It imports no torch, has one thread, and keeps a fork server with everything imported, so
that a fresh process per rank costs 0.02 s.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import select
import signal
import socket
import sys
import time
from multiprocessing import util
from pathlib import Path
from typing import Any

from benchsuite.cluster.cell_outcome import SERVER_LOST, classify
from benchsuite.cluster.private_network import NoNamespace, die_with_parent, enter_private_network
from benchsuite.cluster.rank_processes import Crew, Ending, probe_disk, start_fork_server
from benchsuite.plan.cell import Cell, from_json
from benchsuite.results.record import Outcome, Status, now_iso, outcome_json
from benchsuite.worker import job as jobs
from benchsuite.worker.job import RankJob

STDIN = 0


class _Host:
    def __init__(self, outcome_fd: int, settings: dict[str, Any]) -> None:
        self._outcome_fd = outcome_fd
        self._network_reason: str = settings["network_reason"]
        self._context = multiprocessing.get_context("forkserver")
        self._buffer = b""

    def serve(self, modules: list[str]) -> int:
        start_fork_server(self._context, modules)
        self._say({"network_reason": self._network_reason, "scratch": util.get_temp_dir()})
        while (line := self._next_line()) is not None:
            outcome, usable = self._run(json.loads(line))
            if outcome is None:
                return 0
            self._say({**outcome_json(outcome), "last": not usable})
            if not usable:
                return 1
        return 0

    def _run(self, order: dict[str, Any]) -> tuple[Outcome | None, bool]:
        """One cell: its outcome (None: nobody waits for it) and whether this host can run another
        one."""
        cell = from_json(order["cell"])
        run_dir = Path(order["run_dir"])
        survives = order["survives"] == "worker"
        begin = time.monotonic()
        started_at = now_iso()
        crew = Crew(self._context, order["entry"])
        usable = True
        try:
            self._start(crew, cell, run_dir)
            ending = crew.wait(
                begin + cell.budget.timeout_s,
                expendable=range(cell.num_workers) if survives else (),
                lifeline=STDIN,
            )
            ends = crew.look()  # before the kill: afterwards every rank looks guilty
            usable = crew.kill() and not any(end.exit_code == SERVER_LOST for end in ends)
            outcome = classify(
                ends,
                timeout_s=cell.budget.timeout_s,
                at_deadline=ending is Ending.DEADLINE,
                survives=survives,
                disk=probe_disk(run_dir)
                if any(end.exit_code == jobs.EXIT_CANNOT_WRITE for end in ends)
                else "",
            )
            if ending is Ending.LET_GO:
                return None, False
        except EOFError:
            outcome = Outcome(Status.FAILED, "the fork server was lost while it started the ranks")
            usable = False
        except OSError as error:
            outcome = Outcome(
                Status.FAILED, f"cannot start the ranks: {error.strerror or error} ({run_dir})"
            )
            usable = not isinstance(error, ConnectionError)
        finally:
            crew.kill()
            crew.clean()
        return dataclasses.replace(
            outcome, started_at=started_at, seconds=time.monotonic() - begin
        ), usable

    def _start(self, crew: Crew, cell: Cell, run_dir: Path) -> None:
        document = cell.to_json()
        with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
            for rank in range(cell.world_size):
                job = RankJob(
                    cell=document,
                    rank=rank,
                    world_size=cell.world_size,
                    local_rank=rank,
                    run_dir=str(run_dir),
                    store_port=listener.getsockname()[1],
                    timeout_s=cell.budget.timeout_s,
                    private_network=not self._network_reason,
                    network_reason=self._network_reason,
                    beat_path=str(run_dir / f"rank{rank}.beat"),
                )
                role = "worker" if rank < cell.num_workers else "server"
                crew.start(job, role=role, listener=listener if rank == 0 else None)

    def _next_line(self) -> bytes | None:
        while b"\n" not in self._buffer:
            select.select([STDIN], [], [])
            data = os.read(STDIN, 1 << 16)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _say(self, document: dict[str, Any]) -> None:
        os.write(self._outcome_fd, json.dumps(document).encode() + b"\n")


def main(arguments: list[str]) -> int:
    """Exit codes: 0 the end of the input, 1 the fork server was lost, 70 no private network, 99 the
    parent is gone."""
    settings = json.loads(arguments[1])
    if settings["parent"]:
        die_with_parent(settings["parent"], exit_code=jobs.EXIT_PARENT_GONE)
    if settings["private_network"]:
        try:
            enter_private_network()
        except NoNamespace as error:
            if error.half_way:
                print(error, file=sys.stderr, flush=True)
                return jobs.EXIT_NO_NAMESPACE
            settings["network_reason"] = str(error)
    if settings["parent"]:
        die_with_parent(
            settings["parent"], exit_code=jobs.EXIT_PARENT_GONE
        )  # new credentials may have cleared it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = (
            "1"  # read when the libraries are loaded: in the fork server, not in the rank
        )
    return _Host(int(arguments[0]), settings).serve(settings["modules"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
