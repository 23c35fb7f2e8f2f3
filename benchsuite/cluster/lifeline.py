"""A process that we start ends with the process that started it, also where that one is killed.

Two ties hold it. The kernel's: `prctl(PR_SET_PDEATHSIG)`, which also ends a process that is
stopped. And a thread that waits for the parent's end of a pipe, for a rank whose parent, the fork
server, lives on while the owner of both is gone. Linux only, no torch.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading

from benchsuite.worker.job import EXIT_PARENT_GONE

_PR_SET_PDEATHSIG = 1

# Process id of the fork server: set in that process and inherited by every rank it forks; 0 in a
# process that no fork server of ours started.
fork_server_pid = 0


def become_fork_server(parent: int) -> None:
    """Ties this process, a fork server, to process `parent`; its ranks will be tied to it.

    Called in the server before it forks anything. Exits where `parent` has ended already.
    """
    global fork_server_pid
    # A chain of two ties: the server ends with the command, and the ranks end with the server.
    die_with_parent(parent, exit_code=EXIT_PARENT_GONE)
    fork_server_pid = os.getpid()


def die_with_parent(expected_parent: int, *, exit_code: int) -> None:
    """The kernel kills this process when the thread that created it ends.

    expected_parent: process id of that thread's process. exit_code: what this process exits with
    where the parent has ended already, before the kernel was asked. Raises OSError where the kernel
    refuses.

    It is the thread that counts, not the process: started from a thread of a pool, a process would
    be killed when the pool is closed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")

    # Between the fork and prctl the parent may have ended; then no signal comes any more, and this
    # process would stay for ever.
    if os.getppid() != expected_parent:
        os._exit(exit_code)


def hold_lifeline() -> None:
    """Ties a forked process to the fork server and to the server's owner; Ctrl-C is ignored.

    The kernel forgets its tie in a fork, so every rank asks for it anew.
    """
    if fork_server_pid:
        die_with_parent(fork_server_pid, exit_code=EXIT_PARENT_GONE)
    threading.Thread(target=_await_parent, name="lifeline", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command decides what Ctrl-C means


def _await_parent() -> None:
    """Ends this process when the parent's end of multiprocessing's pipe closes."""
    parent = multiprocessing.parent_process()

    if parent is not None:
        # The owner of the fork server holds the other end of the pipe; the kernel closes it,
        # whatever the owner died of.
        parent.join()
        os._exit(EXIT_PARENT_GONE)
