"""Processes that simulate cells of the virtual clock, one per core. No torch is imported here.

Cells are handed out in groups that stay together, because one process computes a trajectory once
and times it again for the other cells. A process that dies or overstays a cell's deadline costs
that cell, and the rest of its group goes on in a new one.
"""

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
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from benchsuite.cluster.rank_imports import python_path
from benchsuite.measure.load import num_cores
from benchsuite.plan.cell import Cell, global_batch, trajectory_key
from benchsuite.results.record import Outcome, Status, now_iso

SIMULATOR = "benchsuite.cluster.simulator_process"
# The file in which a simulator leaves its sections, in the cell's run directory.
SECTIONS = "sections.json"
START_S = 120.0  # a cold import of torch on a slow disk
Ended = tuple[Cell, Mapping[str, Any], Outcome]  # the sections of a run file in the middle


def groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of one trajectory in one group; the groups with the most gradients come first.

    Long groups at the end would leave one core working while the others wait. A cell whose
    trajectory nobody shares is a group of its own.
    """
    together: dict[Any, list[Cell]] = {}

    for cell in cells:
        # Without a key nothing can be shared: id and seed make one that no other cell has.
        together.setdefault(trajectory_key(cell) or (cell.id, cell.seed), []).append(cell)

    def gradients(group: Sequence[Cell]) -> float:
        """Gradients to compute for a group, which is what its first cell costs; the others are only
        timed again.
        """
        cell = group[0]
        return (cell.budget.samples or 0) / max(global_batch(cell), 1) * cell.num_workers

    return sorted(together.values(), key=gradients, reverse=True)


@dataclass
class _Simulator:
    """One simulator process and what it works on."""

    popen: subprocess.Popen[bytes]
    outcomes: int  # descriptor that it writes to
    log: IO[bytes]
    group: deque[Cell] = field(default_factory=deque)  # what it will be handed next
    cell: Cell | None = None  # what it simulates now
    run_dir: Path = Path()  # of that cell
    ready: bool = False  # it has said that it has imported everything
    started_at: str = ""  # of that cell, as a date
    begin: float = 0.0  # the same in seconds of time.monotonic
    deadline: float = 0.0  # until then it must have answered, or must be ready
    buffer: bytes = b""  # an answer whose end has not come yet

    @property
    def is_busy(self) -> bool:
        """It simulates a cell, or cells of its group are left."""
        return self.cell is not None or bool(self.group)


class SimulatorPool:
    """Runs groups of resolved cells. Use it as a context manager; leaving it ends every process.

    num_processes: how many simulate at once; None = one per core.

    Everything happens in the caller's thread: it hands out cells, waits on all pipes together, and
    yields what has ended. A slow consumer holds back new orders but no simulation that is running.
    """

    def __init__(self, num_processes: int | None = None) -> None:
        """Starts no process yet: they are started as `run` has groups for them."""
        self._most = num_processes or num_cores()  # so many simulate at once
        self._simulators: list[_Simulator] = []
        self._folder = tempfile.TemporaryDirectory(prefix="benchsuite-")
        self._number = 0  # of the next cell: names its run directory

    def run(self, groups: Sequence[Sequence[Cell]]) -> Iterator[Ended]:
        """Yields (cell, sections of its run file, outcome) as the simulations end, in no order.

        groups: cells that stay together in one process, e.g. of `groups`. sections: `{"result",
        "cost", "raw"}`, empty where the outcome is not ok. Never raises for what a simulation does.
        """
        # Copies, because cells are taken out as they are handed on.
        waiting = deque(deque(group) for group in groups if group)
        failures: deque[Ended] = deque()

        while waiting or failures or any(each.is_busy for each in self._simulators):
            # Failures are noticed in places that cannot yield, and are handed out here.
            while failures:
                yield failures.popleft()

            self._start_missing(num_groups=len(waiting))

            # One cell at a time each: a second order in the pipe would be lost with the process
            # that dies over the first.
            for simulator in self._simulators:
                if simulator.ready and simulator.cell is None:
                    if not simulator.group and waiting:
                        simulator.group = waiting.popleft()
                    if simulator.group:
                        self._hand(simulator)

            yield from self._wait(failures, waiting)

    def close(self) -> None:
        """Ends every process, busy or not, and removes the run directories."""
        for simulator in self._simulators:
            self._end(simulator, wait_s=0.0)
        self._simulators.clear()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        """The pool itself; processes start with the first `run`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends every process, also where the caller stops in the middle of `run`."""
        self.close()

    def _start_missing(self, *, num_groups: int) -> None:
        """Starts simulators for the waiting groups that no idle one takes, at most one per core."""
        num_idle = sum(not each.is_busy for each in self._simulators)
        num_free_cores = self._most - len(self._simulators)
        for _ in range(min(num_groups - num_idle, num_free_cores)):
            self._simulators.append(self._spawn())

    def _wait(self, failures: deque[Ended], waiting: deque[deque[Cell]]) -> Iterator[Ended]:
        """Waits until a simulator says something or a deadline passes; yields what has ended."""
        # A simulator that is idle and ready has no deadline: nothing is expected of it.
        now = time.monotonic()
        deadlines = [each.deadline for each in self._simulators if each.cell or not each.ready]
        # Without any deadline it only looks, and does not block on pipes that will say nothing.
        longest_s = max(0.0, min(deadlines, default=now) - now)
        ready, _, _ = select.select([each.outcomes for each in self._simulators], [], [], longest_s)

        # A copy, because a lost simulator is taken out of the list on the way.
        for simulator in list(self._simulators):
            if simulator.outcomes in ready:
                yield from self._listen(simulator, failures, waiting)
            elif (simulator.cell or not simulator.ready) and time.monotonic() >= simulator.deadline:
                self._lose(simulator, failures, waiting, at_deadline=True)

    def _listen(
        self, simulator: _Simulator, failures: deque[Ended], waiting: deque[deque[Cell]]
    ) -> Iterator[Ended]:
        """Reads what a simulator has written and yields the cells whose answers are whole.

        The end of the pipe means that the process is gone, and costs the cell that it had.
        """
        # At most what a pipe holds; `select` has said that this read does not block.
        data = os.read(simulator.outcomes, 1 << 16)

        if not data:
            self._lose(simulator, failures, waiting, at_deadline=False)
            return

        simulator.buffer += data

        # A pipe knows no messages: one read may hold half an answer, or two of them.
        while b"\n" in simulator.buffer:
            line, _, simulator.buffer = simulator.buffer.partition(b"\n")
            document = json.loads(line)

            if document.pop("ready", False):
                simulator.ready = True
                continue

            cell = simulator.cell
            simulator.cell = None
            assert cell is not None
            seconds = time.monotonic() - simulator.begin
            document["status"] = Status(document["status"])
            yield (
                cell,
                _sections(simulator.run_dir),
                Outcome(**document, started_at=simulator.started_at, seconds=seconds),
            )

    def _hand(self, simulator: _Simulator) -> None:
        """Hands a simulator the next cell of its group, and starts that cell's clock."""
        simulator.cell = cell = simulator.group.popleft()
        # Numbered, not named after the cell: two seeds of one cell would share a folder.
        simulator.run_dir = Path(self._folder.name) / str(self._number)
        self._number += 1
        simulator.run_dir.mkdir(mode=0o700)

        simulator.started_at = now_iso()
        simulator.begin = time.monotonic()
        simulator.deadline = simulator.begin + cell.budget.timeout_s

        assert simulator.popen.stdin is not None

        with contextlib.suppress(OSError):  # its end is heard of on the other pipe
            order = {"cell": cell.to_json(), "run_dir": str(simulator.run_dir)}
            simulator.popen.stdin.write(json.dumps(order).encode() + b"\n")
            simulator.popen.stdin.flush()

    def _lose(
        self,
        simulator: _Simulator,
        failures: deque[Ended],
        waiting: deque[deque[Cell]],
        *,
        at_deadline: bool,
    ) -> None:
        """Takes a simulator away: its cell fails, what is left of its group goes to another one.

        at_deadline: it overstayed its cell's time, rather than ended by itself. One that never got
        ready costs a whole waiting group: another one would not start either, and the pool would
        start processes without end.
        """
        self._simulators.remove(simulator)
        # At a deadline it is alive and is killed at once. Where its pipe has closed it is about to
        # end, and its exit code names the reason.
        reason = self._end(simulator, wait_s=0.0 if at_deadline else 2.0)

        lost = [simulator.cell] if simulator.cell else []

        if not simulator.ready:
            if not waiting:
                return

            lost += waiting.popleft()
            reason = f"the simulator does not start: {reason}"

        timed_out = at_deadline and simulator.ready

        for cell in lost:
            outcome = Outcome(
                Status.TIMEOUT if timed_out else Status.FAILED,
                f"deadline of {cell.budget.timeout_s:g} s" if timed_out else reason,
                started_at=simulator.started_at or now_iso(),
                seconds=time.monotonic() - simulator.begin,
            )
            failures.append((cell, {}, outcome))

        # To the front: the group is the oldest one, and its trajectory is computed anew in any
        # case.
        if simulator.group:
            waiting.appendleft(simulator.group)

    def _spawn(self) -> _Simulator:
        """Starts a simulator, which will say `ready` on its pipe when torch is imported.

        Its standard input carries orders, a pipe of its own carries answers, and both of its output
        streams go to a log, so that a library that prints cannot be taken for an answer.
        """
        main_thread = threading.current_thread() is threading.main_thread()
        outcomes, outcomes_w = os.pipe()
        # It lives as long as the process, and has no name, so that nothing is left of it.
        log = tempfile.TemporaryFile()  # noqa: SIM115
        # 0 = not tied to this process: started by another thread, it would end with that thread.
        parent = os.getpid() if main_thread else 0

        try:
            popen = subprocess.Popen(
                # -P and cwd=/: a `random.py` in the user's folder must not stand in for the
                # library's. A session of its own keeps the terminal's Ctrl-C away, which the
                # command decides about.
                [sys.executable, "-P", "-m", SIMULATOR, str(outcomes_w), str(parent)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(outcomes_w,),
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
            )
        finally:
            # Held open here, the pipe would not end when the simulator does, and the wait for it
            # never.
            os.close(outcomes_w)

        return _Simulator(popen, outcomes, log, deadline=time.monotonic() + START_S)

    def _end(self, simulator: _Simulator, *, wait_s: float) -> str:
        """Kills a simulator; returns how it had ended, in words.

        wait_s: seconds that it may take to end by itself, so that its own exit code is seen and not
        the one of our kill.
        """
        code: int | None = None

        with contextlib.suppress(subprocess.TimeoutExpired):
            code = simulator.popen.wait(wait_s)

        # Harmless where it has ended. The second wait reaps it; a zombie would stay for as long as
        # the command runs.
        simulator.popen.kill()
        simulator.popen.wait()

        # Closing flushes an order that was never read, which a broken pipe refuses.
        with contextlib.suppress(OSError):
            assert simulator.popen.stdin is not None
            simulator.popen.stdin.close()

        os.close(simulator.outcomes)

        simulator.log.seek(0)
        lines = simulator.log.read().decode(errors="replace").strip().splitlines()
        simulator.log.close()

        if code is not None and code < 0:
            return f"the simulator was ended by {signal.Signals(-code).name}"
        if lines:
            return f"the simulator ended: {lines[-1]}"
        return f"the simulator ended with code {code}"


def _sections(run_dir: Path) -> dict[str, Any]:
    """What the simulator left in the cell's run directory, which is removed.

    Empty where it left nothing, as a cell that failed does.
    """
    path = run_dir / SECTIONS
    if not path.is_file():
        return {}
    sections: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    shutil.rmtree(run_dir, ignore_errors=True)
    return sections
