"""A private network for this process, and an end with its parent: unshare, lo up, prctl. Linux, no
torch.

In a private network namespace nobody else on the machine can reach the ranks (torch's store and
gloo know no authentication), and the counters of `lo` are the run's own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1


class NoNamespace(RuntimeError):
    """Why there is no private network; `half_way`: this process already left the machine's."""

    def __init__(self, reason: str, *, half_way: bool) -> None:
        super().__init__(reason)
        self.half_way = half_way


def die_with_parent(expected_parent: int, *, exit_code: int) -> None:
    """SIGKILL for this process when the thread that created it ends; exits at once where that
    already happened."""
    if _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != expected_parent:
        os._exit(exit_code)


def enter_private_network() -> None:
    """Moves this process, which must have one thread, into a network namespace of its own with `lo`
    up."""
    uid = os.getuid()
    gid = os.getgid()
    try:
        try:
            _unshare(CLONE_NEWNET)
        except PermissionError:
            _unshare(CLONE_NEWUSER | CLONE_NEWNET)
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{uid} {uid} 1")
            _write("/proc/self/gid_map", f"{gid} {gid} 1")
    except OSError as error:
        half_way = error.filename is not None  # a map was refused, so unshare had worked
        raise NoNamespace(f"no private network: {_words(error)}", half_way=half_way) from error
    try:
        _loopback_up()
        _check_loopback()
    except OSError as error:
        raise NoNamespace(f"no loopback in the private network: {error}", half_way=True) from error


def _unshare(flags: int) -> None:
    if _libc().unshare(flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"unshare: {os.strerror(code)}")


def _words(error: OSError) -> str:
    if error.errno == errno.ENOSPC:  # not a full disk
        return "user namespaces are switched off (their limit is 0)"
    if error.errno in (errno.EPERM, errno.EACCES):
        return "this machine does not let us create network namespaces"
    return str(error)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def _check_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=2.0).close()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
