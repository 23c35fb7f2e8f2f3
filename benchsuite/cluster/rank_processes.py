"""The processes of a cell's ranks on this machine: start from the fork server, wait, look, kill.

Used by the cell host, which has all ranks of a cell, and by a supervisor under torchrun, which has
one. No torch is imported here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from multiprocessing import connection, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from benchsuite.cluster import fork_server_preload, rank_entry
from benchsuite.cluster.cell_outcome import RankEnd
from benchsuite.measure import beat
from benchsuite.worker import job as jobs
from benchsuite.worker.job import RankJob

GRACE_S = 1.0  # after the first bad exit the others have this long to end by themselves
GOODBYE_S = 10.0  # a goodbye connects to the store and to the servers
# Bytes of the temporary folder's path: the path of a socket has at most 107, and the names that
# multiprocessing adds take 33 of them.
LONGEST_FOLDER = 60
SHORT_FOLDER = "/tmp"


class Ending(Enum):
    """Why the waiting is over."""

    DONE = "every rank has ended, or has handed in its record"
    BAD_EXIT = "a rank ended without its record"
    DEADLINE = "the deadline has passed"
    LET_GO = "whoever asked for this cell has gone"


@dataclass
class _RankProcess:
    job: RankJob
    role: str  # "worker" or "server"
    process: ForkServerProcess
    order: int = 0  # when its end was noticed, as in `RankEnd.order`; 0 = it is still there


def start_fork_server(context: ForkServerContext, modules: Sequence[str]) -> None:
    """Starts the fork server and returns when it has imported `modules`.

    Call it from the main thread: the server ends with the thread that started it. EOFError or
    OSError where the server dies.
    """
    told = {
        fork_server_preload.PARENT_VARIABLE: str(os.getpid()),
        fork_server_preload.MODULES_VARIABLE: ",".join(modules),
    }
    os.environ.update(told)
    try:
        _choose_short_folder()
        context.set_forkserver_preload([fork_server_preload.__name__])
        probe = context.Process(target=rank_entry.warm_up, daemon=True)
        probe.start()
        probe.join()
    finally:
        for name in told:
            del os.environ[name]
    if probe.exitcode != 0:
        raise EOFError(f"the fork server does not start ranks (exit code {probe.exitcode})")


def _choose_short_folder() -> None:
    """Puts multiprocessing's own folder into /tmp where TMPDIR is too long for a socket's path.

    Nothing else goes there: `tempfile` names the user's folder again afterwards.
    """
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) <= LONGEST_FOLDER or not os.access(SHORT_FOLDER, os.W_OK | os.X_OK):
        return
    tempfile.tempdir = SHORT_FOLDER
    try:
        util.get_temp_dir()  # made now, and kept for the life of this process
    finally:
        tempfile.tempdir = before


class RankProcesses:
    """The processes of some ranks of one cell, from start to end.

    entry: what each rank calls with its job, `module:function`. first: what it calls before.
    """

    def __init__(self, context: ForkServerContext, entry: str, *, first: str = "") -> None:
        self._context = context
        self._entry = entry
        self._entries = [first, entry] if first else [entry]
        self._ranks: list[_RankProcess] = []
        self._helpers: list[ForkServerProcess] = []  # each says goodbye for a lost worker
        self._batch = 0

    def start(self, job: RankJob, *, role: str, listener: socket.socket | None = None) -> None:
        """Starts a rank.

        OSError where the file of its beat cannot be allocated, EOFError where the fork server died.
        """
        if job.beat_path:
            beat.create(job.beat_path)
        process = self._context.Process(
            target=rank_entry.main, args=(job, listener, self._entries), daemon=True
        )
        process.start()
        self._ranks.append(_RankProcess(job, role, process))

    def pulse(self, rank: int) -> beat.Pulse:
        """The phase and step that a rank is in."""
        (path,) = (each.job.beat_path for each in self._ranks if each.job.rank == rank)
        return beat.read(path)

    def wait(
        self, deadline: float, *, expendable: Collection[int] = (), lifeline: int | None = None
    ) -> Ending:
        """Waits until nothing more is to be expected.

        deadline: in seconds of time.monotonic. expendable: ranks whose death by a signal does not
        end the cell. lifeline: a descriptor; something to read there means that nobody waits for
        this cell any more.
        """
        limit = deadline
        ending = Ending.DEADLINE  # what the answer is when `limit` passes
        while alive := [rank for rank in self._ranks if not rank.order]:
            remaining = limit - time.monotonic()
            if remaining <= 0:
                return ending
            some_ended = len(alive) < len(self._ranks)
            if some_ended:
                # A rank can hand in its record without ending: look four times a second.
                remaining = min(remaining, 0.25)
            handles: list[Any] = [rank.process.sentinel for rank in alive]
            if lifeline is not None:
                handles.append(lifeline)
            ready = connection.wait(handles, remaining)
            if lifeline is not None and lifeline in ready:
                return Ending.LET_GO
            if ready:
                self._note_ends(alive, ready, expendable)
            if ending is not Ending.DEADLINE:
                continue  # the others have their last second already
            if any(self._ended_badly(rank, expendable) for rank in self._ranks):
                ending = Ending.BAD_EXIT
            elif some_ended and self._all_complete():
                ending = Ending.DONE
            if ending is not Ending.DEADLINE:
                limit = min(limit, time.monotonic() + GRACE_S)
        return Ending.DONE

    def look(self) -> list[RankEnd]:
        """What is to be seen of the ranks now; after `kill` every one of them looks guilty."""
        return [
            RankEnd(
                rank=rank.job.rank,
                role=rank.role,
                exit_code=rank.process.exitcode,
                state=_process_state(rank.process.pid) if rank.process.exitcode is None else "",
                pulse=beat.read(rank.job.beat_path),
                complete=jobs.rank_complete(rank.job.run_dir, rank.job.rank),
                order=rank.order,
                error=_last_error(rank.job),
            )
            for rank in self._ranks
        ]

    def finish_goodbyes(self) -> None:
        """Waits until the goodbyes for lost workers are said; `kill` would cut them off."""
        end = time.monotonic() + GOODBYE_S
        for helper in self._helpers:
            helper.join(max(0.0, end - time.monotonic()))

    def kill(self) -> bool:
        """Ends what is left, and waits for it. False where a process would not go within 5 s."""
        processes = [*(rank.process for rank in self._ranks), *self._helpers]
        for process in processes:
            if process.exitcode is None:
                process.kill()
        end = time.monotonic() + 5.0
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        # Where the fork server was lost nobody can wait for its children; the kernel ends them.
        while any(_exists(process.pid) for process in processes):
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)
        return True

    def clean(self) -> None:
        """Removes the files that only the waiting needed."""
        for rank in self._ranks:
            last_error = jobs.error_file(rank.job.run_dir, rank.job.rank)
            for path in (Path(rank.job.beat_path), last_error):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _note_ends(
        self, alive: Sequence[_RankProcess], ready: Sequence[Any], expendable: Collection[int]
    ) -> None:
        self._batch += 1
        for rank in alive:
            if rank.process.sentinel not in ready or rank.process.exitcode is None:
                continue
            rank.order = self._batch
            if self._spared(rank, expendable):
                self._say_goodbye(rank.job)

    def _say_goodbye(self, job: RankJob) -> None:
        """Starts a process that speaks for a lost worker: this one has no torch."""
        job = dataclasses.replace(job, store_is_hosted=True, store_listen_fd=None)
        helper = self._context.Process(
            target=rank_entry.say_goodbye, args=(job, self._entry), daemon=True
        )
        helper.start()
        self._helpers.append(helper)

    def _ended_badly(self, rank: _RankProcess, expendable: Collection[int]) -> bool:
        code = rank.process.exitcode if rank.order else None
        if code is None or jobs.rank_complete(rank.job.run_dir, rank.job.rank):
            return False
        return not self._spared(rank, expendable)

    def _spared(self, rank: _RankProcess, expendable: Collection[int]) -> bool:
        """Whether the rank was ended by a signal and the others can go on without it.

        They cannot where it had not begun: they would wait for it to join.
        """
        code = rank.process.exitcode
        if code is None or code >= 0 or rank.job.rank not in expendable:
            return False
        if not rank.job.beat_path:
            return True
        return beat.read(rank.job.beat_path).phase != beat.Phase.START

    def _all_complete(self) -> bool:
        return all(jobs.rank_complete(rank.job.run_dir, rank.job.rank) for rank in self._ranks)


def probe_disk(run_dir: Path) -> str:
    """Why the run directory takes no more: the error of a small write; "" where it worked."""
    try:
        jobs.write_atomic(run_dir / "probe", b"x" * 4096)
        (run_dir / "probe").unlink()
    except OSError as error:
        return f"{error.strerror} ({run_dir})"
    return ""


def _last_error(job: RankJob) -> str:
    try:
        return jobs.error_file(job.run_dir, job.rank).read_text(errors="replace").strip()
    except OSError:
        return ""


def _process_state(pid: int | None) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _exists(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return _process_state(pid) not in ("Z", "X", "")
