"""A private network for this process: a network namespace of its own with the loopback up.

In a private network nobody else on the machine can reach the ranks (torch's store and gloo know no
authentication), and the byte counters of `lo` are the run's own. Linux only (unshare), no torch.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct

# From linux/sched.h, linux/sockios.h and net/if.h: Python 3.11 has no names for them.
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1


class NoNamespace(RuntimeError):
    """Why there is no private network.

    half_way: this process has left the machine's network already and is of no use any more.
    """

    def __init__(self, reason: str, *, half_way: bool) -> None:
        """The reason is the exception's text, and goes into every run file."""
        super().__init__(reason)
        self.half_way = half_way


def enter_private_network() -> None:
    """Moves this process, which must have one thread, into a network of its own with `lo` up.

    NoNamespace where the kernel does not allow it. There is no way back: neither namespace can be
    left by a process without rights.
    """
    # Asked before the move: in a user namespace without a map both become 65534 (nobody).
    uid = os.getuid()
    gid = os.getgid()

    try:
        try:
            _unshare(_CLONE_NEWNET)

        except PermissionError:
            # Not root: as the root of a user namespace of its own a process may make a network.
            _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
            # The kernel's order: without giving up `setgroups` first, a process without rights may
            # not write its group map. Each id is mapped to itself, so files keep their owners.
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{uid} {uid} 1")
            _write("/proc/self/gid_map", f"{gid} {gid} 1")
    except OSError as error:
        # The library call has no file name, a map has one.
        half_way = error.filename is not None  # a map was refused, so unshare had worked
        raise NoNamespace(f"no private network: {_words(error)}", half_way=half_way) from error

    try:
        # A new network has a loopback, but it is down: "Network is unreachable", even for
        # 127.0.0.1.
        _loopback_up()
        _check_loopback()
    except OSError as error:
        raise NoNamespace(f"no loopback in the private network: {error}", half_way=True) from error


def _unshare(flags: int) -> None:
    """unshare(2), which Python 3.11 does not offer. Raises OSError with the kernel's reason."""
    # `use_errno`: without it errno may have changed by the time that Python asks.
    libc = ctypes.CDLL(None, use_errno=True)

    if libc.unshare(flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"unshare: {os.strerror(code)}")


def _words(error: OSError) -> str:
    """Why the kernel refused, in words that a user can act on."""
    if error.errno == errno.ENOSPC:  # not a full disk
        return "user namespaces are switched off (their limit is 0)"
    if error.errno in (errno.EPERM, errno.EACCES):
        return "this machine does not let us create network namespaces"
    return str(error)


def _write(path: str, text: str) -> None:
    """Writes one of the files of /proc that set up a user namespace. They take one write."""
    with open(path, "w") as file:
        file.write(text)


def _loopback_up() -> None:
    """Sets the flag UP on `lo`, as `ip link set lo up` does; that program may not be installed."""
    # Any socket will do: the kernel takes requests about interfaces through it. 16 bytes of name, 2
    # of flags, and 14 that pad `struct ifreq`.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def _check_loopback() -> None:
    """Connects once from end to end: a flag that was set proves nothing yet. Raises OSError."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=2.0).close()
