"""`benchsuite run` as a whole, disturbed: killed, two at once, a full or read-only disk, rubbish in
its folder.

Ctrl-C and SIGTERM: tests/test_run_process.py; whatever state the ranks are in:
tests/test_cluster_orphans.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from benchsuite.results.store import Store
from tests.bench import ROOT, TINY
from tests.test_run_process import started_by
from tests.test_store import SCHEMA

pytestmark = [pytest.mark.procs, pytest.mark.timeout(100)]
CELLS = ["--workload", TINY, "--topology", "ring", "--replicas", "1,2"]


def start(results: Path, marker: str, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "benchsuite",
        "run",
        *CELLS,
        *more,
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


def run_files(results: Path) -> list[Path]:
    return [path for path in results.glob("*/*/*") if path.parent.name != "env"]


def test_a_killed_suite_leaves_finished_runs_nothing_running_and_goes_on(tmp_path: Path) -> None:
    marker = f"{os.getpid()}-killed"
    suite = start(tmp_path, marker, "--set", "budget.samples=4800", "--seeds", "0,1,2,3,4,5")
    assert suite.stderr is not None
    for line in suite.stderr:
        if line.startswith("[1/12]"):
            break
    time.sleep(0.1)  # the second cell is under way
    suite.kill()
    suite.communicate()
    deadline = time.monotonic() + 5
    while (left := started_by(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == [], "running 5 s after the command was killed"
    kept = len(Store(tmp_path).runs())
    assert 1 <= kept < 12
    first = run_files(tmp_path)[0]
    (first.parent / "20260101T000000Z-00000000.json").write_text(first.read_text()[:500])
    (first.parent / "notes.json").write_text("{}")
    out, err = start(
        tmp_path, marker, "--set", "budget.samples=4800", "--seeds", "0,1"
    ).communicate(timeout=60)
    document = json.loads(out)
    assert document["stored_before"] + document["counts"]["ok"] == 4, err
    assert document["stored_before"] <= kept
    for name in ("20260101T000000Z-00000000.json", "notes.json"):
        assert any(
            name in line and "skipped, not a complete run file" in line for line in err.splitlines()
        ), err
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_suites_at_once_on_one_folder_lose_no_run(tmp_path: Path) -> None:
    suites = [start(tmp_path, f"{os.getpid()}-{name}", "--seeds", "0,1,2") for name in "ab"]
    documents = []
    for suite in suites:
        out, err = suite.communicate(timeout=80)
        assert suite.returncode == 0, err
        documents.append(json.loads(out))
    files = {str(path) for path in run_files(tmp_path)}
    written = [path for document in documents for path in document["files"]]
    assert len(written) == len(set(written)) == len(files) and set(written) == files
    for path in files:
        jsonschema.validate(json.loads(Path(path).read_text()), SCHEMA)
    for document in documents:
        assert document["stored_before"] + document["counts"]["ok"] == 6


def test_a_folder_that_is_a_file_is_one_line_and_exit_5(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    suite = start(tmp_path / "results", f"{os.getpid()}-file")
    out, err = suite.communicate(timeout=30)
    assert (suite.returncode, out) == (5, "")
    assert (
        err.count("\n") == 1 and f"results folder {tmp_path / 'results'} cannot be written: " in err
    )
    assert "choose another folder with --results DIR" in err


def on_a_small_disk(folder: Path, size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell script with a tmpfs of so many bytes on `folder`, which nobody else sees and
    which ends with it."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a small disk needs root and util-linux")
    mounted = f"mount -t tmpfs -o size={size} tmpfs {folder} || exit 99\n{script}"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", mounted],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    return done


def test_a_full_or_read_only_results_folder_is_one_clear_line_and_keeps_what_is_whole(
    tmp_path: Path,
) -> None:
    (tmp_path / "disk").mkdir()
    run = f"{sys.executable} -m benchsuite.cli.main run {' '.join(CELLS)} --seeds 0,1,2,3,4,5 --results {tmp_path}/disk/results"
    done = on_a_small_disk(
        tmp_path / "disk",
        "24k",
        f"{run}; echo full $?; cp -a {tmp_path}/disk/results {tmp_path}/copy\n"
        f"mount -o remount,ro {tmp_path}/disk; {run} --fresh; echo read-only $?",
    )
    assert done.stdout.splitlines()[-2:] == ["full 5", "read-only 5"], done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("benchsuite: error: ")]
    start_of = f"benchsuite: error: results folder {tmp_path}/disk/results cannot be written: "
    assert len(errors) == 2 and "Traceback" not in done.stderr
    assert errors[0].startswith(start_of + "No space left on device")
    assert errors[1].startswith(start_of + "Read-only file system")
    kept = run_files(tmp_path / "copy")
    assert 1 <= len(kept) < 12
    for path in kept:
        jsonschema.validate(json.loads(path.read_text()), SCHEMA)


@pytest.mark.slow
def test_a_rank_that_cannot_write_its_record_fails_its_cell_only(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    run = f"TMPDIR={tmp_path}/disk {sys.executable} -m benchsuite.cli.main run {' '.join(CELLS)} --results {tmp_path}/results"
    done = on_a_small_disk(
        tmp_path / "disk", "16k", f"{run}; echo $?; find {tmp_path}/disk -type f"
    )
    assert done.stdout.splitlines()[-1] == "4", "exit code, and no file is left"
    runs = {run.cell.replicas: run for run in Store(tmp_path / "results").runs()}
    assert (
        runs[2].status == "failed"
        and runs[2].culprit is not None
        and runs[2].culprit["how"] == "cannot write"
    )
    assert "could not write its record: No space left on device" in str(runs[2].reason)
