"""From what was seen of each rank, before anything was killed, to the outcome of the cell.

`classify` is a pure function that says who is to blame. It looks, in this order, for: all records
complete; a rank that cannot write; the fork server lost; a rank killed by a signal; exit code 0
without a record; an error of a rank's own; the deadline; errors that only follow from a lost peer.
A record proves success, an exit code proves nothing.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchsuite.measure.beat import WAITING, Pulse
from benchsuite.results.record import LOST_WORKER, Outcome, Status
from benchsuite.worker.job import EXIT_ABORTED, EXIT_CANNOT_WRITE, EXIT_PARENT_GONE

SERVER_LOST = 255  # what multiprocessing reports for a child whose fork server is gone
# A rank that is ended by one of these may well be a victim: gloo aborts, a pipe breaks, a launcher
# ends the rest. SIGKILL and SIGSEGV point at a cause.
_FOLLOW_UP_SIGNALS = frozenset({-signal.SIGABRT, -signal.SIGPIPE, -signal.SIGTERM})
# What torch and gloo raise in a rank because ANOTHER one is gone.
_FOLLOW_UP_ERRORS = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|socket closed|connection "
    r"closed|timed? ?out"
    r"|DistNetworkError|DistStoreError|recvValue|failed to (recv|send)|EOFError",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """What was seen of one rank at the end of its cell, before the rest was killed."""

    rank: int
    role: str  # "worker" or "server"
    exit_code: int | None  # negative: the signal; None: it was still there
    state: str = ""  # of /proc/PID/stat while it was there: R, S, D, T ..
    pulse: Pulse = field(default_factory=Pulse)
    complete: bool = False  # its record is there, whole
    # 1 = the first whose end was noticed; equal where noticed at once; 0 = it was still there
    order: int = 0
    error: str = ""  # last line of its traceback


def classify(
    ends: Sequence[RankEnd],
    *,
    timeout_s: float,
    at_deadline: bool,
    survives: bool = False,
    disk: str = "",
) -> Outcome:
    """The outcome of a cell.

    ends: one per rank. timeout_s: the cell's deadline in seconds. at_deadline: it has passed.
    survives: the strategy goes on without a lost worker. disk: why the run directory takes no more,
    "" = it does.

    Pure: the same ends give the same outcome, whenever and wherever they are read.
    """
    missing = [end for end in ends if not end.complete]
    if not missing:
        return Outcome(Status.OK)

    # A strategy that survives has done its work where all that is missing are workers that a signal
    # ended, and one other worker at least has come to the end of the budget.
    lost = [end for end in missing if _died(end) and end.role == "worker"]
    only_workers_lost = bool(lost) and len(lost) == len(missing)
    some_worker_finished = any(end.complete and end.role == "worker" for end in ends)

    if survives and only_workers_lost and some_worker_finished:
        first = min(lost, key=_died_first)
        return Outcome(
            Status.OK, culprit=_culprit(first, _signal_name(first)), flags=(LOST_WORKER,)
        )

    return _blame(missing, timeout_s=timeout_s, at_deadline=at_deadline, disk=disk)


def _blame(missing: list[RankEnd], *, timeout_s: float, at_deadline: bool, disk: str) -> Outcome:
    """The outcome of a cell with missing records: each step looks for a better known cause than the
    next.

    missing: the ranks without a record.
    """
    for end in missing:
        if end.exit_code == EXIT_CANNOT_WRITE:
            why = end.error or disk or "the run directory takes no more"
            return _failed(
                end,
                "cannot write",
                f"rank {end.rank} ({end.role}) could not write its record: {why}",
            )

    ended = [end for end in missing if end.exit_code is not None]

    # Every child of a lost fork server is reported with this code, whatever it did. It is the cause
    # only where no other rank says something of its own.
    if any(end.exit_code == SERVER_LOST for end in ended) and all(_follows(end) for end in ended):
        return Outcome(
            Status.FAILED, "the fork server of the ranks was lost; the next cell gets a new one"
        )

    if died := [end for end in missing if _died(end)]:
        first = min(died, key=_died_first)
        name = _signal_name(first)
        return _failed(
            first, name, f"rank {first.rank} ({first.role}) was ended by {name} {_where(first)}"
        )

    # The user's code has called `os._exit` or `sys.exit`: it looks like success to everyone but us.
    if silent := [end for end in missing if end.exit_code == 0]:
        first = min(silent, key=lambda end: (end.order, *_progress(end)))
        reason = (
            f"rank {first.rank} ({first.role}) ended with exit code 0 and no result {_where(first)}"
        )
        return _failed(first, "exit 0 without a result", reason)

    # Errors of their own come before the deadline, and errors that follow from a lost peer after
    # it: a rank that hangs makes its peers raise in the end, and they are not to blame.
    own = [end for end in ended if not _follows(end)]
    if at_deadline and not own:
        return _timeout(missing, timeout_s)

    if ended:
        return _raised(min(own or ended, key=lambda end: (*_progress(end)[:2], end.order)))
    return Outcome(Status.FAILED, "the ranks were ended before they were done")


def _raised(end: RankEnd) -> Outcome:
    """The outcome where a rank raised: its own words, or its exit code where it left none."""
    what = end.error or f"exit code {end.exit_code}"
    return _failed(
        end, f"error: {what}", f"rank {end.rank} ({end.role}) failed {_where(end)}: {what}"
    )


def _timeout(missing: list[RankEnd], timeout_s: float) -> Outcome:
    """The outcome at the deadline, with the rank that most probably held up the others.

    A rank that is stopped holds up the others for sure, so one is looked for first.
    """
    # Where all have ended the last looks decide, so that a culprit is always named.
    alive = [end for end in missing if end.exit_code is None] or missing
    stopped = [end for end in alive if end.state in ("T", "t")]
    first = min(stopped or alive, key=_least_advanced)

    # The short form is for tables, the verb for the sentence.
    how, verb = ("stopped", "was stopped") if stopped else ("no progress", "made no progress")
    rule = f"not finished after {timeout_s:g} s (budget.timeout_s)"
    reason = f"{rule}: rank {first.rank} ({first.role}) {verb} {_where(first)}"
    return Outcome(Status.TIMEOUT, reason, _culprit(first, how))


def _least_advanced(end: RankEnd) -> tuple[bool, bool, int, int, int]:
    """A key by which the rank that holds up the others is the smallest.

    One that runs or works holds up those that sleep in communication; among equals it is the one
    furthest behind.
    """
    return (end.state != "R", end.pulse.phase in WAITING, *_progress(end))


def _progress(end: RankEnd) -> tuple[int, int, int]:
    """How far a rank had come, by its beat: communication calls, phase, time of the last word."""
    return (end.pulse.seq, end.pulse.phase, end.pulse.time_ns)


def _died(end: RankEnd) -> bool:
    """Whether a signal ended the rank."""
    return end.exit_code is not None and end.exit_code < 0


def _died_first(end: RankEnd) -> tuple[bool, int, int, int, int]:
    """A key by which the signal that caused the others is the smallest.

    Signals that follow from another rank's end come last; then what was noticed first, then who was
    behind.
    """
    return (end.exit_code in _FOLLOW_UP_SIGNALS, end.order, *_progress(end))


def _follows(end: RankEnd) -> bool:
    """Whether a rank's end only says that another one is gone."""
    if end.exit_code in (EXIT_ABORTED, EXIT_PARENT_GONE, SERVER_LOST):
        return True
    return bool(_FOLLOW_UP_ERRORS.search(end.error))


def _signal_name(end: RankEnd) -> str:
    """`SIGKILL` and the like; a real-time signal has a number only."""
    number = -(end.exit_code or 0)

    try:
        # Real-time signals have no names of their own.
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _where(end: RankEnd) -> str:
    """Phase and step in which a rank was last seen, in words."""
    if not end.pulse.pid:
        return "before it had begun"
    return f"in {end.pulse.phase_name} of step {end.pulse.step}"


def _failed(end: RankEnd, how: str, reason: str) -> Outcome:
    """A failed outcome with the rank to blame; `how` is the short form that tables show."""
    return Outcome(Status.FAILED, reason, _culprit(end, how))


def _culprit(end: RankEnd, how: str) -> dict[str, Any]:
    """What a run file says of the rank to blame."""
    return {
        "rank": end.rank,
        "role": end.role,
        "how": how,
        "phase": end.pulse.phase_name,
        "step": end.pulse.step,
    }
