"""This machine: fresh processes per cell from a preloaded fork server, alone in a private network
where allowed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchsuite.cluster import Engine
from benchsuite.cluster.rank_imports import RANK_ENTRY, preloaded_modules, python_path
from benchsuite.cluster.signals import ignoring
from benchsuite.errors import UsageError
from benchsuite.measure import faults
from benchsuite.plan import declared
from benchsuite.plan.cell import Cell
from benchsuite.results.record import Outcome, Status, now_iso
from benchsuite.worker.job import EXIT_NO_NAMESPACE

# Longer than the host needs to kill its ranks and to probe the disk: a shorter one would report a
# lost host for a cell that merely timed out.
GRACE_S = 15.0  # the host is the judge of a cell's deadline; this much later it is lost itself
START_S = 120.0  # a cold import of torch on a slow disk
# In seconds: what the host gets to end by itself when its input is closed.
CLOSE_S = 10.0


class _HostLost(Exception):
    """The host said nothing, or is gone."""


class Cluster(Engine):
    """Runs cells on this machine. Use it as a context manager, from the main thread.

    entry: what a rank calls with its job, `module:function`. modules: what the fork server imports
    before the first cell; None = torch, the worker and the built-in plug-ins. path: folders to
    import from besides the usual ones.
    """

    processes = ("benchsuite.cluster.cell_host",)

    def __init__(
        self,
        *,
        entry: str = RANK_ENTRY,
        modules: Sequence[str] | None = None,
        path: Sequence[str] = (),
    ) -> None:
        """Starts nothing: the host starts with `start`, or with the first cell."""
        self._entry = entry
        self._modules = preloaded_modules() if modules is None else list(modules)
        self._path = path
        self._host: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._outcomes = -1
        self._buffer = b""
        # The host's folder for its fork server's socket; "" = it cannot start ranks yet.
        self._scratch = ""
        self.network_reason = ""  # why the ranks have no private network; known after `start`

    @classmethod
    def refusal(cls) -> str:
        """Why this machine cannot run ranks, with a remedy; "" = it can."""
        if sys.platform == "linux":
            return ""
        return (
            f"cluster = local needs Linux, this is {sys.platform}: its ranks are tied to the "
            "command by prctl and watched through /proc; use a Linux machine or a Linux container"
        )

    def start(self) -> None:
        """Starts the host and waits until it can start ranks, which takes about 3.5 s.

        Does nothing where it has started. Raises RuntimeError where it cannot, with the last line
        that the host wrote.
        """
        if self._host is not None:
            return

        reason = self.network_reason
        # The second time without a private network: the first host had left the machine's network
        # and could not go on.

        for attempt in range(2):
            try:
                self._spawn(network_reason=reason)
                hello = self._read(START_S)
            except OSError as error:
                raise RuntimeError(f"the cell host does not start: {error}") from error
            except _HostLost as lost:
                if self._kill() == EXIT_NO_NAMESPACE and attempt == 0:
                    reason = str(lost)
                    continue

                raise RuntimeError(f"the cell host does not start: {lost}") from lost

            # The host says where its fork server's socket is, because a host that is killed leaves
            # the folder behind for us to remove.
            self.network_reason = hello["network_reason"]
            self._scratch = hello["scratch"]
            return

    def run(self, cell: Cell, run_dir: Path, *, entry: str = "") -> Outcome:
        """Runs a resolved cell; its ranks leave their records in `run_dir`, which is created.

        entry: what the ranks of this cell call; "" = what those of the other cells call.

        Never raises for what a cell does: the outcome says it, with the seconds that it took.
        KeyboardInterrupt passes through after the host has ended.
        """
        begin = time.monotonic()
        started_at = now_iso()

        try:
            # What a user can put right is refused before the host is started for it.
            faults.check(cell.faults, cell.world_size)
            survives = declared.strategy(cell.sync).survives
        except UsageError as error:
            return Outcome(Status.UNSUPPORTED, str(error), started_at=started_at)

        try:
            # The ranks stand in another folder, so the path has to be absolute.
            run_dir = run_dir.resolve()
            run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            return Outcome(
                Status.FAILED, f"cannot write to {run_dir}: {error.strerror}", started_at=started_at
            )

        try:
            self.start()
            # Measured anew: the first cell does not pay for the start of the host.
            begin = time.monotonic()
            started_at = now_iso()

            order = {"cell": cell.to_json(), "run_dir": str(run_dir), "survives": survives}
            self._write(order | {"entry": entry or self._entry})
            answer = self._read(cell.budget.timeout_s + GRACE_S)
        except KeyboardInterrupt:
            self.close()  # the next cell, if any, must not read this one's outcome
            raise
        # Whatever is left of the host is ended; the next cell starts a new one.
        except (_HostLost, RuntimeError) as error:
            self._kill()
            seconds = time.monotonic() - begin
            return Outcome(
                Status.FAILED, f"host lost: {error}", started_at=started_at, seconds=seconds
            )

        if answer.pop("last"):
            self._kill()  # the host has no fork server any more; the next cell gets a new one

        answer["status"] = Status(answer["status"])

        # JSON has neither the enum nor the tuple of `Outcome`.
        answer["flags"] = tuple(answer["flags"])
        return Outcome(**answer)

    def close(self) -> None:
        """Ends the host and its ranks; a Ctrl-C in the milliseconds that this takes is ignored.

        Interrupted half-way it would leave ranks behind that nobody knows of any more.
        """
        if self._host is None:
            return

        with ignoring(signal.SIGINT, signal.SIGTERM):
            # The end of its input asks the host to end by itself, and to remove its files. It is
            # asked only where it is up; one that still imports would not hear it for seconds.
            if self._scratch and self._host.stdin is not None:
                with contextlib.suppress(OSError):
                    self._host.stdin.close()

                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._host.wait(CLOSE_S)

            self._kill()

    def _spawn(self, *, network_reason: str) -> None:
        """Starts the host's process, without waiting for its first word.

        network_reason: why the ranks get no private network; "" = the host is to try for one.
        Raises OSError.
        """
        main_thread = threading.current_thread() is threading.main_thread()
        settings = {
            # 0 = not tied to this process: started by another thread, the host would end with it
            "parent": os.getpid() if main_thread else 0,
            "private_network": not network_reason,
            "network_reason": network_reason,
            "modules": self._modules,
        }

        # Answers have a pipe of their own: anything may be printed on standard output by a library.
        outcomes, outcomes_w = os.pipe()
        # It lives as long as the host, and has no name, so that nothing is left of it.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._buffer = b""

        try:
            told = [str(outcomes_w), json.dumps(settings)]
            self._host = subprocess.Popen(
                # -P and cwd=/: a file in the user's folder must not stand in for a module of the
                # library. A session of its own keeps the terminal's Ctrl-C away from the ranks.
                [sys.executable, "-P", "-m", *self.processes, *told],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(outcomes_w,),
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": python_path(self._path)},
            )
        finally:
            # Kept open here, the pipe would never end, and a host that died would look like a
            # silent one.
            os.close(outcomes_w)

        self._outcomes = outcomes

    def _write(self, document: dict[str, Any]) -> None:
        """Sends the host one JSON line. Raises _HostLost where it is gone."""
        assert self._host is not None and self._host.stdin is not None

        try:
            self._host.stdin.write(json.dumps(document).encode() + b"\n")
            self._host.stdin.flush()
        except OSError as error:
            raise _HostLost(self._last_words()) from error

    def _read(self, timeout_s: float) -> dict[str, Any]:
        """The host's next JSON line.

        timeout_s: seconds to wait for it. Raises _HostLost where it says nothing for so long or is
        gone.
        """
        end = time.monotonic() + timeout_s

        # A pipe knows no lines: a read may end in the middle of one, and the rest is kept.
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._outcomes], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._outcomes, 1 << 16) if ready else b""

            # Ready with nothing to read is the end of the pipe: its last holder has ended.
            if not data:
                silence = f"no word from it for {timeout_s:g} s"
                raise _HostLost(self._last_words() if ready else silence)

            self._buffer += data

        line, _, self._buffer = self._buffer.partition(b"\n")
        document: dict[str, Any] = json.loads(line)
        return document

    def _last_words(self) -> str:
        """How the host ended: its signal, or the last line that it or its fork server wrote."""
        assert self._host is not None and self._log is not None

        with contextlib.suppress(subprocess.TimeoutExpired):
            # The pipe closes a moment before the exit code is there to be read.
            self._host.wait(1.0)

        code = self._host.returncode
        if code is not None and code < 0:
            return f"it was ended by {signal.Signals(-code).name}"

        # An ordinary end: the last line of a traceback names the error.
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with code {code}"

    def _kill(self) -> int | None:
        """Ends the host, and with it its fork server and ranks; returns its exit code.

        Only the host is killed: the others are tied to it by the kernel, and end when it does.
        """
        if self._host is None:
            return None

        self._host.kill()
        code = self._host.wait()

        if self._host.stdin is not None:
            with contextlib.suppress(OSError):
                self._host.stdin.close()

        # Closed after the host is reaped, so that nothing is written to a number that another file
        # may have got since.
        os.close(self._outcomes)
        if self._scratch:  # the folder is still there if the host had no time to remove it
            shutil.rmtree(self._scratch, ignore_errors=True)

        self._host = None
        self._outcomes = -1
        self._scratch = ""
        return code
