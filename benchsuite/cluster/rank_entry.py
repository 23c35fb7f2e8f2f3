"""The first and the last steps of a rank's process: lifeline, log file, entry point, exit code.

Runs in a fresh fork of the fork server. The exit codes are those of `worker/job.py`; the last line
of a traceback goes into `rank<k>.error`, so that whoever waits for the rank can name the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import faulthandler
import importlib
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchsuite.cluster.lifeline import hold_lifeline
from benchsuite.measure.memory import keep_freed_memory
from benchsuite.worker import job as jobs
from benchsuite.worker.job import RankJob

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def warm_up() -> None:
    """Does nothing: that this ran means that the fork server has imported everything.

    It is a function of this module, so that a rank finds the module imported as well.
    """


def main(job: RankJob, listener: socket.socket | None, entries: Sequence[str]) -> None:
    """The life of a rank's process; never returns.

    listener: the bound socket where rank 0 hosts the store, None in the other ranks. entries:
    `module:function`, called with the job one after the other.
    """
    # Before everything else: a rank that hangs in its first import must end with the command as
    # well.
    hold_lifeline()
    # What is reported where the steps before the entry fail, e.g. no log can be written.
    code = jobs.EXIT_ERROR

    try:
        _redirect_output(Path(job.run_dir) / f"rank{job.rank}.log")

        if listener is not None:
            # `detach`, because torch closes the descriptor itself; Python's object would close it a
            # second time, and by then the number may be another file's.
            job = dataclasses.replace(job, store_listen_fd=listener.detach())

        _prepare(job)

        code = _call(job, entries)
    finally:
        # `os._exit` flushes nothing. A full disk must not turn a complete run into a failed one.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()

        os._exit(code)  # no teardown of process groups: a peer may be gone


def say_goodbye(job: RankJob, entry: str) -> None:
    """Tells the servers that the rank of `job` is gone, in a process that speaks for it.

    entry: the lost rank's own entry, `module:function`. Does nothing where the entry's module has
    no `goodbye(job)`. Ends this process.
    """
    hold_lifeline()
    # Optional: an entry that is a test's own function has no servers to tell.
    goodbye = getattr(importlib.import_module(entry.partition(":")[0]), "goodbye", None)
    if goodbye is not None:
        goodbye(job)

    os._exit(jobs.EXIT_OK)


def _redirect_output(path: Path) -> None:
    """Sends everything that this process prints to its log, also what C libraries print.

    Descriptors 1 and 2 themselves are replaced, because C++ code writes past `sys.stdout`.
    """
    # O_APPEND, so that both streams and every child add at the end and do not overwrite each other.
    # Readable by the owner only: a log may hold what the user's plug-in prints.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)

    # A crash in a library's code leaves the Python line at which it happened, which no exception
    # will tell.
    faulthandler.enable(2)


def _prepare(job: RankJob) -> None:
    """Sets what has to be set in the rank itself: network interface, memory, threads."""
    if job.interface:  # read by each process; a thread count set here would do nothing
        os.environ["GLOO_SOCKET_IFNAME"] = job.interface
        # `=`: exactly this interface, not all whose names begin so
        os.environ["NCCL_SOCKET_IFNAME"] = f"={job.interface}"

    keep_freed_memory()

    # The fork server has imported it. `import torch` here would hide that it did not, and cost
    # seconds of the cell's time without a word.
    torch = sys.modules.get("torch")

    if torch is None:
        print("torch was not preloaded: this rank imports it itself", file=sys.stderr)
        return

    # Every rank has the cores that the cell says, not all of the machine: N ranks with N threads
    # each would measure how they get in each other's way.
    torch.set_num_threads(int(job.cell.get("threads", 1)))


def _call(job: RankJob, entries: Sequence[str]) -> int:
    """Calls each `module:function` with the job and turns what comes out into an exit code.

    The codes tell apart what the outcome has to tell apart: done, cannot write, anything else.
    """
    try:
        for entry in entries:
            module, _, function = entry.partition(":")
            getattr(importlib.import_module(module), function)(job)

    except SystemExit as stop:
        return _exit_code(stop)

    except BaseException as error:  # noqa: BLE001  the outermost frame: recorded, then the end
        _record(job, error)

        # A full disk is the machine's fault: it is reported as such, not as an error of the
        # strategy.
        if isinstance(error, jobs.CannotWrite):
            return jobs.EXIT_CANNOT_WRITE

        disk_is_full = isinstance(error, OSError) and error.errno in _DISK
        return jobs.EXIT_CANNOT_WRITE if disk_is_full else jobs.EXIT_ERROR

    return jobs.EXIT_OK


def _exit_code(stop: SystemExit) -> int:
    """What Python itself makes of the argument of `sys.exit`."""
    if stop.code is None:
        return jobs.EXIT_OK
    return stop.code if isinstance(stop.code, int) else jobs.EXIT_ERROR


def _record(job: RankJob, error: BaseException) -> None:
    """Leaves the error in two places: the whole traceback in the log, its last line in a file of
    its own.

    Neither may raise: an error while the error is written would hide the first one.
    """
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(error)

    # The first line of the last part: the messages of some libraries go on for pages of C++ frames.
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    text = lines[0] if lines else repr(error)
    if isinstance(error, jobs.CannotWrite):
        text = f"{error.strerror}: {error.filename}"

    # An error's text may hold bytes that are no UTF-8, e.g. of a file's name.
    with contextlib.suppress(OSError):
        jobs.write_atomic(jobs.error_file(job.run_dir, job.rank), text.encode(errors="replace"))
