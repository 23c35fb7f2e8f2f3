"""What Ctrl-C and SIGTERM do while ranks run. Only the main thread can handle signals in Python."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Turns SIGTERM into a KeyboardInterrupt, so that it ends a command as Ctrl-C does.

    By default SIGTERM, which `kill`, `timeout` and job schedulers send, ends Python without
    `finally`: nothing would be closed, and runs that have ended might not be stored. Does nothing
    in another thread than the main one, where Python allows no handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        """The handler: raises in the main thread, wherever that is."""
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)

    try:
        yield
    finally:
        # Whoever uses the suite as a library may have a handler of its own.
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def ignoring(*numbers: signal.Signals) -> Iterator[None]:
    """Ignores these signals inside the `with`; they are lost, not kept for afterwards.

    Does nothing in another thread than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # The old handlers are kept one by one: they may differ.
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in numbers]

    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
