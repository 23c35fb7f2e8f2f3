"""The ranks of one cell on this machine: start them from the fork server, wait, look, kill. No
torch.

Used by the cell host (all ranks of a cell) and by a supervisor under torchrun (its one rank).
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
# bytes of the temporary folder's path; a socket's has at most 107, of which its own name takes 33
LONGEST_FOLDER = 60
SHORT_FOLDER = "/tmp"


class Ending(Enum):
    """Why the waiting is over."""

    DONE = "every rank has ended, or has handed in its record"
    BAD_EXIT = "a rank ended without its record"
    DEADLINE = "the deadline has passed"
    LET_GO = "whoever asked for this cell has gone"


@dataclass
class _Member:
    job: RankJob
    role: str
    process: ForkServerProcess
    order: int = 0


def start_fork_server(context: ForkServerContext, modules: Sequence[str]) -> None:
    """Starts the fork server and returns when it has imported `modules`. EOFError or OSError where
    it dies.

    Call it from the main thread: the server ends with the thread that started it.
    """
    os.environ[fork_server_preload.PARENT_VARIABLE] = str(os.getpid())
    os.environ[fork_server_preload.MODULES_VARIABLE] = ",".join(modules)
    try:
        _choose_short_folder()
        context.set_forkserver_preload([fork_server_preload.__name__])
        probe = context.Process(target=rank_entry.warm_up, daemon=True)
        probe.start()
        probe.join()
    finally:
        del (
            os.environ[fork_server_preload.PARENT_VARIABLE],
            os.environ[fork_server_preload.MODULES_VARIABLE],
        )
    if probe.exitcode != 0:
        raise EOFError(f"the fork server does not start ranks (exit code {probe.exitcode})")


def _choose_short_folder() -> None:
    """Where TMPDIR is too long for a socket, multiprocessing's own folder goes to /tmp; nothing
    else does."""
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) <= LONGEST_FOLDER or not os.access(SHORT_FOLDER, os.W_OK | os.X_OK):
        return
    tempfile.tempdir = SHORT_FOLDER
    try:
        util.get_temp_dir()  # made now, and kept for the life of this process
    finally:
        tempfile.tempdir = before


class Crew:
    """The processes of some ranks of one cell, from start to end."""

    def __init__(self, context: ForkServerContext, entry: str) -> None:
        self._context = context
        self._entry = entry
        self._members: list[_Member] = []
        self._helpers: list[ForkServerProcess] = []  # each says goodbye for a lost worker
        self._batch = 0

    def start(self, job: RankJob, *, role: str, listener: socket.socket | None = None) -> None:
        """Starts a rank. OSError where its beat cannot be allocated; EOFError where the fork server
        died."""
        if job.beat_path:
            beat.create(job.beat_path)
        process = self._context.Process(
            target=rank_entry.main, args=(job, listener, self._entry), daemon=True
        )
        process.start()
        self._members.append(_Member(job, role, process))

    def pulse(self, rank: int) -> beat.Pulse:
        """Where a rank is."""
        return beat.read(
            next(member.job.beat_path for member in self._members if member.job.rank == rank)
        )

    def wait(
        self, deadline: float, *, expendable: Collection[int] = (), lifeline: int | None = None
    ) -> Ending:
        """Waits until nothing more is to be expected.

        deadline: in seconds of time.monotonic. expendable: ranks whose death by a signal does not
        end the cell. lifeline: a descriptor; something to read there means that nobody waits for
        this cell any more.
        """
        limit = deadline
        ending = Ending.DEADLINE
        while alive := [member for member in self._members if not member.order]:
            remaining = limit - time.monotonic()
            if remaining <= 0:
                return ending
            if len(alive) < len(self._members):
                remaining = min(remaining, 0.25)  # a record can be handed in while nobody ends
            handles: list[Any] = [member.process.sentinel for member in alive]
            ready = connection.wait(
                handles if lifeline is None else [*handles, lifeline], remaining
            )
            if lifeline is not None and lifeline in ready:
                return Ending.LET_GO
            if ready:
                self._note(alive, ready, expendable)
            if ending is Ending.DEADLINE and any(
                self._bad(member, expendable) for member in self._members
            ):
                limit = min(limit, time.monotonic() + GRACE_S)
                ending = Ending.BAD_EXIT
            elif (
                ending is Ending.DEADLINE
                and len(alive) < len(self._members)
                and self._all_complete()
            ):
                limit = min(limit, time.monotonic() + GRACE_S)
                ending = Ending.DONE
        return Ending.DONE

    def look(self) -> list[RankEnd]:
        """What is to be seen of the ranks now. Call it before `kill`."""
        return [
            RankEnd(
                rank=member.job.rank,
                role=member.role,
                exit_code=member.process.exitcode,
                state=_state(member.process.pid) if member.process.exitcode is None else "",
                pulse=beat.read(member.job.beat_path),
                complete=jobs.rank_complete(member.job.run_dir, member.job.rank),
                order=member.order,
                error=_error(member.job),
            )
            for member in self._members
        ]

    def finish_goodbyes(self) -> None:
        """Waits until the goodbyes for lost workers are said; `kill` would cut them off."""
        end = time.monotonic() + GOODBYE_S
        for helper in self._helpers:
            helper.join(max(0.0, end - time.monotonic()))

    def kill(self) -> bool:
        """Ends what is left, and waits for it. False where a process would not go within 5 s."""
        processes = [*(member.process for member in self._members), *self._helpers]
        for process in processes:
            if process.exitcode is None:
                process.kill()
        end = time.monotonic() + 5.0
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        while (
            left := any(_exists(process.pid) for process in processes)
        ) and time.monotonic() < end:
            time.sleep(0.005)  # where the fork server was lost, the kernel is ending its children
        return not left

    def clean(self) -> None:
        """Removes what only the waiting needed."""
        for member in self._members:
            for path in (
                Path(member.job.beat_path),
                jobs.error_file(member.job.run_dir, member.job.rank),
            ):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _note(
        self, alive: Sequence[_Member], ready: Sequence[Any], expendable: Collection[int]
    ) -> None:
        self._batch += 1
        for member in alive:
            if member.process.sentinel not in ready or member.process.exitcode is None:
                continue
            member.order = self._batch
            if self._spared(member, expendable):
                self._say_goodbye(member.job)

    def _say_goodbye(self, job: RankJob) -> None:
        """A process that speaks for a lost worker: this one has no torch."""
        job = dataclasses.replace(job, store_is_hosted=True, store_listen_fd=None)
        helper = self._context.Process(
            target=rank_entry.farewell, args=(job, self._entry), daemon=True
        )
        helper.start()
        self._helpers.append(helper)

    def _bad(self, member: _Member, expendable: Collection[int]) -> bool:
        code = member.process.exitcode if member.order else None
        if code is None or jobs.rank_complete(member.job.run_dir, member.job.rank):
            return False
        return not self._spared(member, expendable)

    def _spared(self, member: _Member, expendable: Collection[int]) -> bool:
        """Ended by a signal, and the others can go on; not before it had begun: they would wait for
        it to join."""
        code = member.process.exitcode
        if code is None or code >= 0 or member.job.rank not in expendable:
            return False
        return not member.job.beat_path or beat.read(member.job.beat_path).phase != beat.Phase.START

    def _all_complete(self) -> bool:
        return all(
            jobs.rank_complete(member.job.run_dir, member.job.rank) for member in self._members
        )


def probe_disk(run_dir: Path) -> str:
    """What the run directory says to a small write: "" or the reason."""
    try:
        jobs.write_atomic(run_dir / "probe", b"x" * 4096)
        (run_dir / "probe").unlink()
    except OSError as error:
        return f"{error.strerror} ({run_dir})"
    return ""


def _error(job: RankJob) -> str:
    try:
        return jobs.error_file(job.run_dir, job.rank).read_text(errors="replace").strip()
    except OSError:
        return ""


def _state(pid: int | None) -> str:
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
    return _state(pid) not in ("Z", "X", "")
