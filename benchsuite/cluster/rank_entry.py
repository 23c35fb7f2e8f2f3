"""The first and the last steps of a rank's process: lifeline, log file, the entry point, the exit
code.

Runs in a fresh fork of the fork server. The exit codes are those of `job.py`; the traceback's last
line goes into `rank<k>.error`, so that whoever waits can name the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import faulthandler
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

from benchsuite.cluster import fork_server_preload
from benchsuite.cluster.private_network import die_with_parent
from benchsuite.measure.memory import keep_freed_memory
from benchsuite.worker import job as jobs
from benchsuite.worker.job import RankJob

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def warm_up() -> None:
    """Nothing: that this ran means that the fork server has imported everything."""


def main(job: RankJob, listener: socket.socket | None, entry: str) -> None:
    """Life of a rank's process; never returns. `listener`: where rank 0 hosts the store."""
    hold_lifeline()
    code = jobs.EXIT_ERROR
    try:
        _redirect_output(Path(job.run_dir) / f"rank{job.rank}.log")
        if listener is not None:
            job = dataclasses.replace(job, store_listen_fd=listener.detach())
        _prepare(job)
        code = _call(job, entry)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # no teardown of process groups: a peer may be gone


def farewell(job: RankJob, entry: str) -> None:
    """Tells the servers that the rank of `job` is gone, where the entry's module has a
    `goodbye(job)`."""
    hold_lifeline()
    goodbye = getattr(importlib.import_module(entry.partition(":")[0]), "goodbye", None)
    if goodbye is not None:
        goodbye(job)
    os._exit(jobs.EXIT_OK)


def hold_lifeline() -> None:
    """This process ends when the fork server or its owner ends, also while it is stopped."""
    if fork_server_preload.server_pid:
        die_with_parent(fork_server_preload.server_pid, exit_code=jobs.EXIT_PARENT_GONE)
    threading.Thread(target=_await_parent, name="lifeline", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command decides what Ctrl-C means


def _await_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(jobs.EXIT_PARENT_GONE)


def _redirect_output(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(2)


def _prepare(job: RankJob) -> None:
    if job.interface:  # read by each process; a thread count set here would do nothing
        os.environ["GLOO_SOCKET_IFNAME"] = job.interface
        os.environ["NCCL_SOCKET_IFNAME"] = (
            f"={job.interface}"  # exactly this one, not those that begin so
        )
    keep_freed_memory()
    torch = sys.modules.get("torch")
    if torch is None:
        print("torch was not preloaded: this rank imports it itself", file=sys.stderr)
        return
    torch.set_num_threads(int(job.cell.get("threads", 1)))


def _call(job: RankJob, entry: str) -> int:
    """Calls `module:function` with the job and turns what comes out into an exit code."""
    module, _, function = entry.partition(":")
    try:
        if job.store_is_hosted:  # under a supervisor: the ranks come one by one
            importlib.import_module("benchsuite.cluster.arrival").meet(job)
        getattr(importlib.import_module(module), function)(job)
    except SystemExit as stop:
        return (
            stop.code
            if isinstance(stop.code, int)
            else jobs.EXIT_OK
            if stop.code is None
            else jobs.EXIT_ERROR
        )
    except BaseException as error:  # noqa: BLE001  the outermost frame: recorded, then the end
        cannot_write = isinstance(error, jobs.CannotWrite) or (
            isinstance(error, OSError) and error.errno in _DISK
        )
        _record(job, error)
        return jobs.EXIT_CANNOT_WRITE if cannot_write else jobs.EXIT_ERROR
    return jobs.EXIT_OK


def _record(job: RankJob, error: BaseException) -> None:
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(error)
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    text = lines[0] if lines else repr(error)
    if isinstance(error, jobs.CannotWrite):
        text = f"{error.strerror}: {error.filename}"
    with contextlib.suppress(OSError):
        jobs.write_atomic(jobs.error_file(job.run_dir, job.rank), text.encode(errors="replace"))
