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

# Ranks that lost a peer raise an error of their own within a few milliseconds. Without the grace
# they would be killed before they could say what they saw, and every failed cell would look like a
# timeout of all ranks but one.
GRACE_S = 1.0  # after the first bad exit the others have this long to end by themselves
# Bounded, because the servers that hear the goodbye may be what has failed.
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
    """One rank: what it was told, and the process that carries it out."""

    job: RankJob
    role: str  # "worker" or "server"
    process: ForkServerProcess
    order: int = 0  # when its end was noticed, as in `RankEnd.order`; 0 = it is still there


def start_fork_server(context: ForkServerContext, modules: Sequence[str]) -> None:
    """Starts the fork server and returns when it has imported `modules`.

    modules: import names, each shared by all ranks that are forked later. Call it from the main
    thread: the server ends with the thread that started it. Raises EOFError or OSError where the
    server dies.
    """

    # The server is an interpreter of its own that the standard library starts; the environment is
    # the only thing of ours that it receives before it imports the preload module.
    told = {
        fork_server_preload.PARENT_VARIABLE: str(os.getpid()),
        fork_server_preload.MODULES_VARIABLE: ",".join(modules),
    }
    os.environ.update(told)

    try:
        _choose_short_folder()
        # One module, which imports the others: the standard library passes over an ImportError
        # without a word, and any other error of a plug-in would end the server.
        context.set_forkserver_preload([fork_server_preload.__name__])
        # The server starts with the first process that is asked of it, so a process that does
        # nothing is asked for. When it has ended, the imports are known to be done.
        probe = context.Process(target=rank_entry.warm_up, daemon=True)
        probe.start()
        probe.join()
    finally:
        # Out of the environment again: a command that the user starts from here would otherwise
        # take itself for a fork server.
        for name in told:
            del os.environ[name]

    # The server closed the connection without a fork: it died while it imported.
    if probe.exitcode != 0:
        raise EOFError(f"the fork server does not start ranks (exit code {probe.exitcode})")


def _choose_short_folder() -> None:
    """Puts multiprocessing's own folder into /tmp where TMPDIR is too long for a socket's path.

    Nothing else goes there: `tempfile` names the user's folder again afterwards.
    """

    # `bind` refuses a longer path with "AF_UNIX path too long", which says nothing about TMPDIR;
    # job schedulers set long ones.
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

    entry: what each rank calls with its job, `module:function`. first: what it calls before that,
    "" = nothing.

    The order of use is `start` for each rank, `wait`, `look`, `kill`, `clean`. A look comes before
    the kill, because a killed rank cannot be told from one that died.
    """

    def __init__(self, context: ForkServerContext, entry: str, *, first: str = "") -> None:
        """Prepares an empty set of ranks; `context` is the one whose fork server was started."""
        self._context = context
        self._entry = entry
        self._entries = [first, entry] if first else [entry]
        self._ranks: list[_RankProcess] = []
        self._helpers: list[ForkServerProcess] = []  # each says goodbye for a lost worker
        self._batch = 0

    def start(self, job: RankJob, *, role: str, listener: socket.socket | None = None) -> None:
        """Starts a rank.

        role: "worker" or "server", for messages. listener: the bound socket of the store, for the
        rank that hosts it.

        Raises OSError where the file of its beat cannot be allocated, EOFError where the fork
        server died.
        """
        # The file is allocated before the rank exists: written through a mapping, a page that the
        # disk has no room for would end the rank by SIGBUS in the middle of a step.
        if job.beat_path:
            beat.create(job.beat_path)

        # A daemon, so that an interpreter that exits early does not wait for a rank for ever.
        process = self._context.Process(
            target=rank_entry.main, args=(job, listener, self._entries), daemon=True
        )
        process.start()
        self._ranks.append(_RankProcess(job, role, process))

    def pulse(self, rank: int) -> beat.Pulse:
        """The phase and step of a rank, as it last wrote them; zeros before it has begun."""
        (path,) = (each.job.beat_path for each in self._ranks if each.job.rank == rank)
        return beat.read(path)

    def wait(
        self, deadline: float, *, expendable: Collection[int] = (), lifeline: int | None = None
    ) -> Ending:
        """Waits until nothing more is to be expected.

        deadline: in seconds of time.monotonic. expendable: ranks whose death by a signal does not
        end the cell. lifeline: a descriptor; something to read there means that nobody waits for
        this cell any more.

        Returns at once when the deadline has passed, and `GRACE_S` after the first bad end or after
        the last record. Kills nothing.
        """
        limit = deadline
        ending = Ending.DEADLINE  # what the answer is when `limit` passes

        # `order` is set when an end was noticed: 0 marks a rank that is still there.
        while alive := [rank for rank in self._ranks if not rank.order]:
            remaining = limit - time.monotonic()
            if remaining <= 0:
                return ending

            some_ended = len(alive) < len(self._ranks)

            if some_ended:
                # A rank can hand in its record without ending: look four times a second.
                remaining = min(remaining, 0.25)

            # One wait for all of them: a sentinel is readable when its process has ended, so no
            # rank's end is noticed late because another one was waited for first.
            handles: list[Any] = [rank.process.sentinel for rank in alive]
            if lifeline is not None:
                handles.append(lifeline)

            ready = connection.wait(handles, remaining)

            # Asked first: where the command is gone there is nobody to tell of a bad end.
            if lifeline is not None and lifeline in ready:
                return Ending.LET_GO
            if ready:
                self._note_ends(alive, ready, expendable)

            # The limit was set by the first bad end. A second one must not move it, or ranks that
            # fail one after the other would stretch the last second without bound.
            if ending is not Ending.DEADLINE:
                continue  # the others have their last second already

            # Either answer is kept back for a second in which the other ranks may still end by
            # themselves.
            if any(self._ended_badly(rank, expendable) for rank in self._ranks):
                ending = Ending.BAD_EXIT
            elif some_ended and self._all_complete():
                ending = Ending.DONE

            if ending is not Ending.DEADLINE:
                limit = min(limit, time.monotonic() + GRACE_S)

        return Ending.DONE

    def look(self) -> list[RankEnd]:
        """What is to be seen of the ranks now, in the order in which they were started.

        Call it before `kill`: afterwards every one of them looks guilty.
        """
        return [
            # The kernel's state is asked of living ranks only; of a dead one it would always be a
            # zombie.
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
        """Waits until the goodbyes for lost workers are said, 10 s at most; `kill` would cut them
        off.
        """
        # One end for all of them: a second helper gets what the first one has left.
        end = time.monotonic() + GOODBYE_S
        for helper in self._helpers:
            helper.join(max(0.0, end - time.monotonic()))

    def kill(self) -> bool:
        """Ends what is left, and waits for it.

        Returns False where a process would not go within 5 s: it hangs in the kernel, and what it
        holds (a port, a device) is not free for the next cell.
        """
        processes = [*(rank.process for rank in self._ranks), *self._helpers]

        for process in processes:
            if process.exitcode is None:
                # SIGKILL and not SIGTERM: a rank in a collective does not return to Python to
                # handle a signal, and one that is stopped would not wake up for it.
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
        """Removes the files that only the waiting needed: beats and last errors.

        The records stay. A file that cannot be removed is left where it is, because nobody reads it
        again.
        """
        for rank in self._ranks:
            last_error = jobs.error_file(rank.job.run_dir, rank.job.rank)
            for path in (Path(rank.job.beat_path), last_error):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _note_ends(
        self, alive: Sequence[_RankProcess], ready: Sequence[Any], expendable: Collection[int]
    ) -> None:
        """Numbers the ends that one look has found, and has a goodbye said for an expendable
        worker.

        Ranks whose ends came in one look share a number: which of them was first is not known, and
        a guess would name a culprit.
        """
        self._batch += 1

        for rank in alive:
            # A sentinel without an exit code means that the process is not yet reaped: the next
            # look will find it.
            if rank.process.sentinel not in ready or rank.process.exitcode is None:
                continue

            rank.order = self._batch
            if self._spared(rank, expendable):
                self._say_goodbye(rank.job)

    def _say_goodbye(self, job: RankJob) -> None:
        """Starts a process that speaks for a lost worker: this one has no torch."""
        # The helper takes part in the store as a client only. The descriptor belonged to the lost
        # rank, and a second host would take over its port.
        job = dataclasses.replace(job, store_is_hosted=True, store_listen_fd=None)
        helper = self._context.Process(
            target=rank_entry.say_goodbye, args=(job, self._entry), daemon=True
        )
        helper.start()
        self._helpers.append(helper)

    def _ended_badly(self, rank: _RankProcess, expendable: Collection[int]) -> bool:
        """Whether a rank has ended without its record and the cell cannot go on without it.

        The exit code is not asked: a rank may have written its record and crashed afterwards, which
        costs nothing, or end with 0 and no record, which costs the cell.
        """
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

        # Without a beat nothing is known of its start; such a cell is taken to have begun.
        if not rank.job.beat_path:
            return True
        return beat.read(rank.job.beat_path).phase != beat.Phase.START

    def _all_complete(self) -> bool:
        """Whether every rank has handed in its record: this proves that the cell is done."""
        return all(jobs.rank_complete(rank.job.run_dir, rank.job.rank) for rank in self._ranks)


def probe_disk(run_dir: Path) -> str:
    """Why the run directory takes no more: the error of a small write; "" where it worked.

    A full disk and an exhausted quota show only when something is written. 4096 bytes are one
    block, which an empty file would not ask for.
    """
    try:
        jobs.write_atomic(run_dir / "probe", b"x" * 4096)
        (run_dir / "probe").unlink()
    except OSError as error:
        return f"{error.strerror} ({run_dir})"

    return ""


def _last_error(job: RankJob) -> str:
    """The last line of the rank's traceback as it recorded it; "" where it wrote none."""
    try:
        return jobs.error_file(job.run_dir, job.rank).read_text(errors="replace").strip()
    except OSError:
        return ""


def _process_state(pid: int | None) -> str:
    """The kernel's letter for a process: R runs, S sleeps, D waits for a device, T is stopped, Z is
    dead and not yet reaped. "" where there is no such process.
    """
    try:
        # The second field is the program's name in parentheses, which may hold spaces and
        # parentheses itself, so the state is looked for after the last one.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _exists(pid: int | None) -> bool:
    """Whether a process is still there; one that is dead and only waits to be reaped is not."""
    if pid is None:
        return False

    try:
        # Signal 0 is delivered to nobody: the kernel only says whether it could be.
        os.kill(pid, 0)
    except OSError as error:
        # EPERM means that the process exists and belongs to somebody else.
        return error.errno != errno.ESRCH

    return _process_state(pid) not in ("Z", "X", "")
