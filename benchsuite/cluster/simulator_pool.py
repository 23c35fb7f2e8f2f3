"""Processes that simulate cells of the virtual clock, one per core. No torch here.

Cells are handed out in groups that stay together (a trajectory is computed once and timed again in
one process). A process that dies or overstays a cell's deadline costs that cell; the rest goes on
in a new one.
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

from benchsuite.cluster.local import python_path
from benchsuite.measure.load import num_cores
from benchsuite.plan.cell import Cell, global_batch, trajectory_key
from benchsuite.results.record import Outcome, Status, now_iso

MODULE = "benchsuite.cluster.simulator_process"
SECTIONS = "sections.json"
START_S = 120.0  # a cold import of torch on a slow disk
Ended = tuple[Cell, Mapping[str, Any], Outcome]


def groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells with one trajectory together; the most gradients first, so that no core waits long at
    the end."""
    together: dict[Any, list[Cell]] = {}
    for cell in cells:
        together.setdefault(trajectory_key(cell) or (cell.id, cell.seed), []).append(cell)

    def gradients(group: Sequence[Cell]) -> float:
        cell = group[0]
        return (cell.budget.samples or 0) / max(global_batch(cell), 1) * cell.num_workers

    return sorted(together.values(), key=gradients, reverse=True)


@dataclass
class _Process:
    """One simulator and what it is at."""

    process: subprocess.Popen[bytes]
    outcomes: int  # descriptor that it writes to
    log: IO[bytes]
    group: deque[Cell] = field(default_factory=deque)
    cell: Cell | None = None
    run_dir: Path = Path()
    ready: bool = False
    started_at: str = ""
    begin: float = 0.0
    deadline: float = 0.0
    buffer: bytes = b""


class Simulators:
    """Runs groups of resolved cells. Use it as a context manager; leaving it ends every process."""

    def __init__(self, num_processes: int | None = None) -> None:
        self._most = num_processes or num_cores()
        self._processes: list[_Process] = []
        self._folder = tempfile.TemporaryDirectory(prefix="benchsuite-")
        self._number = 0

    def run(self, groups: Sequence[Sequence[Cell]]) -> Iterator[Ended]:
        """(cell, sections of its run file, outcome) as they end. Never raises for what a simulation
        does.

        sections: `{"result", "cost", "raw"}`, empty where the outcome is not ok.
        """
        waiting = deque(deque(group) for group in groups if group)
        failures: deque[Ended] = deque()
        while (
            waiting or any(process.group or process.cell for process in self._processes) or failures
        ):
            while failures:
                yield failures.popleft()
            idle = sum(process.cell is None and not process.group for process in self._processes)
            for _ in range(min(len(waiting) - idle, self._most - len(self._processes))):
                self._processes.append(self._spawn())
            for process in self._processes:
                if process.ready and process.cell is None:
                    if not process.group and waiting:
                        process.group = waiting.popleft()
                    if process.group:
                        self._hand(process)
            yield from self._wait(failures, waiting)

    def close(self) -> None:
        """Ends every process."""
        for process in self._processes:
            self._end(process, wait_s=0.0)
        self._processes.clear()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------

    def _wait(self, failures: deque[Ended], waiting: deque[deque[Cell]]) -> Iterator[Ended]:
        """Until somebody says something, or a deadline passes."""
        now = time.monotonic()
        until = min((p.deadline for p in self._processes if p.cell or not p.ready), default=now)
        ready, _, _ = select.select(
            [p.outcomes for p in self._processes], [], [], max(0.0, until - now)
        )
        for process in list(self._processes):
            if process.outcomes in ready:
                yield from self._listen(process, failures, waiting)
            elif (process.cell or not process.ready) and time.monotonic() >= process.deadline:
                self._lose(process, failures, waiting, at_deadline=True)

    def _listen(
        self, process: _Process, failures: deque[Ended], waiting: deque[deque[Cell]]
    ) -> Iterator[Ended]:
        data = os.read(process.outcomes, 1 << 16)
        if not data:
            self._lose(process, failures, waiting, at_deadline=False)
            return
        process.buffer += data
        while b"\n" in process.buffer:
            line, _, process.buffer = process.buffer.partition(b"\n")
            document = json.loads(line)
            if document.pop("ready", False):
                process.ready = True
                continue
            cell = process.cell
            process.cell = None
            assert cell is not None
            seconds = time.monotonic() - process.begin
            document["status"] = Status(document["status"])
            yield (
                cell,
                _sections(process.run_dir),
                Outcome(**document, started_at=process.started_at, seconds=seconds),
            )

    def _hand(self, process: _Process) -> None:
        process.cell = cell = process.group.popleft()
        process.run_dir = Path(self._folder.name) / str(self._number)
        self._number += 1
        process.run_dir.mkdir(mode=0o700)
        process.started_at = now_iso()
        process.begin = time.monotonic()
        process.deadline = process.begin + cell.budget.timeout_s
        assert process.process.stdin is not None
        with contextlib.suppress(OSError):  # its end is heard of on the other pipe
            order = {"cell": cell.to_json(), "run_dir": str(process.run_dir)}
            process.process.stdin.write(json.dumps(order).encode() + b"\n")
            process.process.stdin.flush()

    def _lose(
        self,
        process: _Process,
        failures: deque[Ended],
        waiting: deque[deque[Cell]],
        *,
        at_deadline: bool,
    ) -> None:
        """Its cell fails, what is left of its group goes to another. One that never got ready costs
        its whole group."""
        self._processes.remove(process)
        reason = self._end(process, wait_s=0.0 if at_deadline else 2.0)
        lost = [process.cell] if process.cell else []
        if not process.ready:
            if not waiting:
                return
            lost += waiting.popleft()
            reason = f"the simulator does not start: {reason}"
        for cell in lost:
            status = Status.TIMEOUT if at_deadline and process.ready else Status.FAILED
            said = (
                f"deadline of {cell.budget.timeout_s:g} s" if status is Status.TIMEOUT else reason
            )
            seconds = time.monotonic() - process.begin
            outcome = Outcome(
                status, said, started_at=process.started_at or now_iso(), seconds=seconds
            )
            failures.append((cell, {}, outcome))
        if process.group:
            waiting.appendleft(process.group)

    def _spawn(self) -> _Process:
        main_thread = threading.current_thread() is threading.main_thread()
        outcomes, outcomes_w = os.pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process; no name, so nothing is left
        parent = (
            os.getpid() if main_thread else 0
        )  # it would end with a thread, not with the process
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(outcomes_w), str(parent)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(outcomes_w,),
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
            )
        finally:
            os.close(outcomes_w)
        return _Process(process, outcomes, log, deadline=time.monotonic() + START_S)

    def _end(self, process: _Process, *, wait_s: float) -> str:
        """Kills it; returns how it had ended, in words. wait_s: how long it may take to end by
        itself."""
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.process.wait(wait_s)
        process.process.kill()
        process.process.wait()
        with contextlib.suppress(OSError):
            assert process.process.stdin is not None
            process.process.stdin.close()
        os.close(process.outcomes)
        process.log.seek(0)
        lines = process.log.read().decode(errors="replace").strip().splitlines()
        process.log.close()
        if code is not None and code < 0:
            return f"the simulator was ended by {signal.Signals(-code).name}"
        return (
            f"the simulator ended: {lines[-1]}"
            if lines
            else f"the simulator ended with code {code}"
        )


def _sections(run_dir: Path) -> dict[str, Any]:
    """What the simulator left, taken away from the disk."""
    path = run_dir / SECTIONS
    if not path.is_file():
        return {}
    sections: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    shutil.rmtree(run_dir, ignore_errors=True)
    return sections
