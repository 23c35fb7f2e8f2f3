"""The cell host: one process per command, alone in a private network, that runs cell after cell.

`python -P -m benchsuite.cluster.cell_host OUTCOME_FD SETTINGS` reads one JSON line per cell from
its standard input and writes one JSON line per outcome to the descriptor. The end of its input is
its end. It imports no torch, has one thread, and keeps a fork server with everything imported, so
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
from benchsuite.cluster.lifeline import die_with_parent
from benchsuite.cluster.private_network import NoNamespace, enter_private_network
from benchsuite.cluster.rank_imports import set_one_thread
from benchsuite.cluster.rank_processes import (
    Ending,
    RankProcesses,
    probe_disk,
    start_fork_server,
)
from benchsuite.plan.cell import Cell, from_json
from benchsuite.results.record import Outcome, Status, now_iso, outcome_json
from benchsuite.worker import job as jobs
from benchsuite.worker.job import RankJob

STDIN = 0


class _Host:
    """Reads orders, runs one cell at a time, says how each ended."""

    def __init__(self, outcome_fd: int, settings: dict[str, Any]) -> None:
        """Starts nothing yet.

        outcome_fd: descriptor for outcomes. settings: as the command wrote them, `network_reason`
        already as it turned out here.
        """
        self._outcome_fd = outcome_fd
        self._network_reason: str = settings["network_reason"]
        self._context = multiprocessing.get_context("forkserver")
        self._buffer = b""

    def serve(self, modules: list[str]) -> int:
        """Runs cells until the input ends; returns the exit code.

        modules: what the fork server imports before the first cell. Raises EOFError or OSError
        where the fork server does not start.
        """
        start_fork_server(self._context, modules)
        # The first line says that the fork server is up, and where its files are: whoever kills
        # this host has to remove them.
        self._say({"network_reason": self._network_reason, "scratch": util.get_temp_dir()})

        while (line := self._next_line()) is not None:
            outcome, usable = self._run(json.loads(line))

            # The command has gone while the cell ran; a line to nobody would only break the pipe.
            if outcome is None:
                return 0

            # `last` tells the command in the same line that this host ends, so that it does not
            # hand it another cell and wait for a deadline.
            self._say({**outcome_json(outcome), "last": not usable})
            if not usable:
                return 1

        return 0

    def _run(self, order: dict[str, Any]) -> tuple[Outcome | None, bool]:
        """Runs one cell: its outcome, and whether this host can run another one.

        The outcome is None where nobody waits for it any more.
        """
        cell = from_json(order["cell"])
        run_dir = Path(order["run_dir"])
        begin = time.monotonic()
        started_at = now_iso()

        ranks = RankProcesses(self._context, order["entry"])

        try:
            # The cell's time begins before its ranks are started: starting them is part of what a
            # user waits for.
            self._start(ranks, cell, run_dir)
            deadline = begin + cell.budget.timeout_s
            survives = order["survives"] == "worker"
            outcome, usable = _wait(ranks, cell, run_dir, deadline=deadline, survives=survives)

        except EOFError:
            outcome = Outcome(Status.FAILED, "the fork server was lost while it started the ranks")
            usable = False

        except OSError as error:
            outcome = Outcome(
                Status.FAILED, f"cannot start the ranks: {error.strerror or error} ({run_dir})"
            )
            # A full disk or a missing folder costs the cell alone. A ConnectionError comes from the
            # socket of the fork server, and the next cell would meet it too.
            usable = not isinstance(error, ConnectionError)
        finally:
            # Also after an error half-way: the ranks that did start wait for those that did not.
            ranks.kill()
            ranks.clean()

        if outcome is not None:
            seconds = time.monotonic() - begin
            outcome = dataclasses.replace(outcome, started_at=started_at, seconds=seconds)

        return outcome, usable

    def _start(self, ranks: RankProcesses, cell: Cell, run_dir: Path) -> None:
        """Starts all ranks; rank 0 is handed a bound socket, so that no port is lost to another."""
        document = cell.to_json()

        # Bound and not only chosen: between choosing a free port and binding it another process
        # could take it. The system chooses the number. The ranks start below, inside the `with`,
        # because the rank that gets the socket duplicates it while it is open here.
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

                # The servers are the last ranks, in every cell.
                role = "worker" if rank < cell.num_workers else "server"
                ranks.start(job, role=role, listener=listener if rank == 0 else None)

    def _next_line(self) -> bytes | None:
        """The next order; None where nobody will give one any more."""
        while b"\n" not in self._buffer:
            # Waits without a time limit: the next cell may be asked for in hours, or the command
            # may end, which is readable too.
            select.select([STDIN], [], [])
            # Unbuffered, so that nothing waits in a buffer of Python that `select` knows nothing
            # of.
            data = os.read(STDIN, 1 << 16)
            if not data:
                return None

            self._buffer += data

        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _say(self, document: dict[str, Any]) -> None:
        """Writes one JSON line; a write to a blocking pipe returns when all of it is in."""
        os.write(self._outcome_fd, json.dumps(document).encode() + b"\n")


def _wait(
    ranks: RankProcesses, cell: Cell, run_dir: Path, *, deadline: float, survives: bool
) -> tuple[Outcome | None, bool]:
    """Waits for the ranks of a cell and judges how it ended; as `_Host._run` returns it.

    deadline: in seconds of time.monotonic. survives: the cell goes on without a lost worker.
    """
    ending = ranks.wait(
        deadline,
        expendable=range(cell.num_workers) if survives else (),
        lifeline=STDIN,
    )

    ends = ranks.look()  # before the kill: afterwards every rank looks guilty
    server_lost = any(end.exit_code == SERVER_LOST for end in ends)
    cannot_write = any(end.exit_code == jobs.EXIT_CANNOT_WRITE for end in ends)
    usable = ranks.kill() and not server_lost

    if ending is Ending.LET_GO:
        return None, False

    # The disk is probed only where a rank could not write, and after the ranks are gone: one of
    # them might still fill it, or make room.
    outcome = classify(
        ends,
        timeout_s=cell.budget.timeout_s,
        at_deadline=ending is Ending.DEADLINE,
        survives=survives,
        disk=probe_disk(run_dir) if cannot_write else "",
    )
    return outcome, usable


def main(arguments: list[str]) -> int:
    """Serves until the input ends.

    arguments: the descriptor for outcomes, and the settings as JSON. Exit codes: 0 the input has
    ended, 1 the fork server was lost, 70 no private network and no way back, 99 the parent is gone.
    """

    settings = json.loads(arguments[1])
    parent = settings["parent"]
    if parent:
        die_with_parent(parent, exit_code=jobs.EXIT_PARENT_GONE)

    # Before any thread and any child exists: a user namespace needs a process of one thread, and
    # children inherit the network that they are born in.
    if settings["private_network"]:
        try:
            enter_private_network()
        except NoNamespace as error:
            # It has left the machine's network and reached no other. The command starts a new host,
            # which is told not to try.
            if error.half_way:
                print(error, file=sys.stderr, flush=True)
                return jobs.EXIT_NO_NAMESPACE

            settings["network_reason"] = str(error)

    if parent:  # once more: the new credentials of a user namespace may have cleared it
        die_with_parent(parent, exit_code=jobs.EXIT_PARENT_GONE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command decides what Ctrl-C means
    # An outcome that nobody reads is then an OSError here, and not the silent end of this host.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    set_one_thread()
    return _Host(int(arguments[0]), settings).serve(settings["modules"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
