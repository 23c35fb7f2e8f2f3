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
    """Does nothing: that this ran means that the fork server has imported everything."""


def main(job: RankJob, listener: socket.socket | None, entries: Sequence[str]) -> None:
    """The life of a rank's process; never returns.

    listener: the bound socket where rank 0 hosts the store, None in the other ranks. entries:
    `module:function`, called with the job one after the other.
    """
    hold_lifeline()
    code = jobs.EXIT_ERROR
    try:
        _redirect_output(Path(job.run_dir) / f"rank{job.rank}.log")
        if listener is not None:
            job = dataclasses.replace(job, store_listen_fd=listener.detach())
        _prepare(job)
        code = _call(job, entries)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # no teardown of process groups: a peer may be gone


def say_goodbye(job: RankJob, entry: str) -> None:
    """Tells the servers that the rank of `job` is gone, in a process that speaks for it.

    Does nothing where the entry's module has no `goodbye(job)`.
    """
    hold_lifeline()
    goodbye = getattr(importlib.import_module(entry.partition(":")[0]), "goodbye", None)
    if goodbye is not None:
        goodbye(job)
    os._exit(jobs.EXIT_OK)


def _redirect_output(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(2)


def _prepare(job: RankJob) -> None:
    if job.interface:  # read by each process; a thread count set here would do nothing
        os.environ["GLOO_SOCKET_IFNAME"] = job.interface
        # `=`: exactly this interface, not all whose names begin so
        os.environ["NCCL_SOCKET_IFNAME"] = f"={job.interface}"
    keep_freed_memory()
    torch = sys.modules.get("torch")
    if torch is None:
        print("torch was not preloaded: this rank imports it itself", file=sys.stderr)
        return
    torch.set_num_threads(int(job.cell.get("threads", 1)))


def _call(job: RankJob, entries: Sequence[str]) -> int:
    """Calls each `module:function` with the job and turns what comes out into an exit code."""
    try:
        for entry in entries:
            module, _, function = entry.partition(":")
            getattr(importlib.import_module(module), function)(job)
    except SystemExit as stop:
        return _exit_code(stop)
    except BaseException as error:  # noqa: BLE001  the outermost frame: recorded, then the end
        _record(job, error)
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
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(error)
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    text = lines[0] if lines else repr(error)
    if isinstance(error, jobs.CannotWrite):
        text = f"{error.strerror}: {error.filename}"
    with contextlib.suppress(OSError):
        jobs.write_atomic(jobs.error_file(job.run_dir, job.rank), text.encode(errors="replace"))
