"""The checks of `benchsuite selfcheck` that start no ranks: commands, the store, the page."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchsuite.measure.load import CpuMeter
from benchsuite.plan.cell import Cell
from benchsuite.programs.bars import Figure
from benchsuite.results.record import Run, Status, dumps
from benchsuite.results.store import Store
from benchsuite.rules import plans

COMMAND_BAR_S = 0.2
STORE_BAR_S = 5.0
PAGE_BAR_S = 15.0
PLAN = "quick"


def commands(launches: int) -> Iterator[Figure]:
    """Times commands in fresh processes, as a user's second call would be.

    A first one leaves Python's compiled files behind and is not counted.
    """
    for verb in ("--help", "list"):
        with tempfile.TemporaryDirectory(prefix="benchsuite-") as compiled:
            environment = {
                name: value
                for name, value in os.environ.items()
                if name != "PYTHONDONTWRITEBYTECODE"
            }
            environment["PYTHONPYCACHEPREFIX"] = compiled
            command = [
                sys.executable,
                "-c",
                "import sys; from benchsuite.cli.main import main; sys.exit(main())",
                verb,
            ]
            _started(command, environment)
            meter = CpuMeter()
            seconds = [_started(command, environment) for _ in range(launches)]
        yield Figure(
            item="commands",
            quantity=f"benchsuite {verb}",
            unit="s",
            bar=COMMAND_BAR_S,
            points=seconds,
            foreign=meter.read().foreign_share,
        )


def _started(command: list[str], environment: dict[str, str]) -> float:
    return _timed(
        lambda: subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
    )


def store(num_runs: int) -> Iterator[Figure]:
    """Times the table of a folder of made-up runs, the first time and with its index."""
    with tempfile.TemporaryDirectory(prefix="benchsuite-") as folder:
        _write_runs(Path(folder), num_runs)
        meter = CpuMeter()
        first = [_timed(Store(folder).frame)]
        later = [_timed(Store(folder).frame) for _ in range(3)]

    foreign = meter.read().foreign_share
    what = f"table of {num_runs:,} stored runs"
    yield Figure(
        item="store", quantity=f"{what}, first time", unit="s", points=first, foreign=foreign
    )
    yield Figure(
        item="store",
        quantity=f"{what}, later",
        unit="s",
        bar=STORE_BAR_S,
        points=later,
        foreign=foreign,
    )


def _write_runs(folder: Path, num_runs: int) -> None:
    loss = [1.0 / (step + 1) for step in range(240)]
    for number in range(num_runs):
        cell = Cell(replicas=1 + number % 40, seed=number // 40)
        result = {
            "samples": 15360,
            "steps": 240,
            "loss": loss,
            "payload_bytes": 1,
            "predicted_bytes": 1,
        }
        run = Run(
            cell=cell,
            code_id="c",
            status=Status.OK,
            machine="m",
            result=result,
            raw={"step_s": [loss]},
        )
        path = folder / "m" / cell.id / f"{run.run_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(run.to_json()), encoding="utf-8")


def page(results: str | Path) -> Iterator[Figure]:
    """Times the page of the plan `quick` from stored runs, imports included.

    Nothing is measured where no runs are stored.
    """
    from benchsuite.results import code_id

    quantity = f"benchsuite report {PLAN}, from stored runs"
    wanted = plans.load(PLAN)
    missing = len(wanted.runs())
    if Path(results).is_dir():
        missing = len(Store(results).missing(wanted.runs(), None, code_id.code_id))

    if missing:
        note = (
            f"{missing} of its {len(wanted.runs())} runs are not in {results}: benchsuite run "
            f"{PLAN}"
        )
        yield Figure(item="report", quantity=quantity, unit="s", bar=PAGE_BAR_S, note=note)
        return

    with tempfile.TemporaryDirectory(prefix="benchsuite-") as out:
        command = [
            sys.executable,
            "-m",
            "benchsuite",
            "report",
            PLAN,
            "--results",
            str(results),
            "--out",
            out,
        ]
        meter = CpuMeter()
        seconds = [_started(command, dict(os.environ)) for _ in range(3)]

    foreign = meter.read().foreign_share
    yield Figure(
        item="report", quantity=quantity, unit="s", bar=PAGE_BAR_S, points=seconds, foreign=foreign
    )


def _timed(what: Callable[[], object]) -> float:
    begin = time.perf_counter()
    what()
    return time.perf_counter() - begin
