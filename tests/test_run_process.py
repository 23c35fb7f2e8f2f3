"""`benchsuite run` as a process: Ctrl-C keeps finished runs, leaves nothing running, and the same
command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from benchsuite.results.store import Store
from tests.test_store import SCHEMA

ROOT = Path(__file__).parent.parent
CELLS = [
    "--workload",
    "cnn",
    "--preset",
    "smoke",
    "--topology",
    "ring",
    "--replicas",
    "1,2",
    "--seeds",
    "0,1",
]


def start(results: Path, marker: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "benchsuite",
        "run",
        *CELLS,
        "--results",
        str(results),
        "--json",
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"BENCHSUITE_TEST": marker},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def started_by(marker: str) -> list[str]:
    """Command lines of living processes that carry the marker in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and f"BENCHSUITE_TEST={marker}".encode() in (entry / "environ").read_bytes()
            ):
                found.append((entry / "cmdline").read_bytes().decode().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_suite_goes_on_where_it_was_stopped(
    number: signal.Signals, tmp_path: Path
) -> None:
    marker = f"{os.getpid()}-{number}"
    suite = start(tmp_path, marker)
    assert suite.stderr is not None
    for line in suite.stderr:
        if line.startswith("[1/4]"):
            break
    if number == signal.SIGINT:
        os.killpg(suite.pid, number)  # as a terminal does it
    else:
        suite.send_signal(number)
    out, err = suite.communicate(timeout=60)
    kept = len(Store(tmp_path).runs())
    assert (suite.returncode, json.loads(out)["interrupted"]) == (130, True), err
    assert 1 <= kept < 4 and "the same command continues" in err
    deadline = time.monotonic() + 5
    while started_by(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert started_by(marker) == []

    suite = start(tmp_path, marker)
    out, err = suite.communicate(timeout=100)
    document = json.loads(out)
    assert suite.returncode == 0, err
    assert (document["stored_before"], document["counts"]["ok"]) == (kept, 4 - kept)
    for path in tmp_path.glob("*/*/*.json"):
        if path.parent.name != "env":
            jsonschema.validate(json.loads(path.read_text()), SCHEMA)
