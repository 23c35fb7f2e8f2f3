"""asv is a front end: what our benchmarks return is what asv 0.6 makes intervals of, and its
configuration is complete."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchsuite.programs.asv_benchmarks.cells import CELLS, Cells, samples

ROOT = Path(__file__).parent.parent
KEYS = ("step_time_s", "seconds_per_sample", "payload_bytes", "final_loss")
FIGURES = {name: {key: [1.0, 2.0, 4.0] for key in KEYS} for name in CELLS}


def test_every_track_has_a_unit_and_returns_plain_floats() -> None:
    tracks = [name for name in vars(Cells) if name.startswith("track_")]
    assert sorted(tracks) == [
        "track_final_loss",
        "track_payload_bytes",
        "track_seconds_per_sample",
        "track_step_time",
    ]
    for name in tracks:
        assert getattr(Cells, name).unit in ("seconds", "bytes", "loss")
        for cell in CELLS:
            value = getattr(Cells(), name)(FIGURES, cell)
            assert value == {"samples": [1.0, 2.0, 4.0], "number": 1}
            assert all(type(sample) is float for sample in value["samples"])
            assert (
                json.loads(json.dumps(value)) == value
                and pickle.loads(pickle.dumps(value)) == value
            )


def test_one_launch_is_one_number() -> None:
    assert samples([2.5]) == 2.5


def test_a_cell_that_did_not_run_is_not_available_rather_than_failed() -> None:
    figures = FIGURES | {"synchronous/ring": {"payload_bytes": []}}
    with pytest.raises(NotImplementedError, match="synchronous/ring has no ok run"):
        Cells().setup(figures, "synchronous/ring")
    Cells().setup(figures, "synchronous/native")


def test_asv_turns_our_samples_into_a_median_with_an_interval() -> None:
    """Guards an undocumented door: asv reads a dict with `samples` and `number` from a track_
    benchmark too."""
    runner = pytest.importorskip("asv.runner")
    results = pytest.importorskip("asv.results")

    class Spawner:
        def run(self, *, result_file_name: str, **_: object) -> tuple[str, int]:
            Path(result_file_name).write_text(json.dumps(samples([1.0, 2.0, 4.0])))
            return "", 0

    benchmark = {
        "name": "cells.Cells.track_step_time",
        "params": [],
        "timeout": 1,
        "version": "1",
        "type": "track",
    }
    result = runner._run_benchmark_single_param(benchmark, Spawner(), None, False, {}, None)
    stored = results.Results.unnamed()
    stored.add_result(benchmark, result, record_samples=True)
    assert stored.get_result_value(benchmark["name"], []) == [2.0]
    (stats,) = stored.get_result_stats(benchmark["name"], [])
    assert stats["repeat"] == 3 and stats["ci_99_a"] < 2.0 < stats["ci_99_b"]
    assert stored.get_result_samples(benchmark["name"], []) == [[1.0, 2.0, 4.0]]


def test_the_matrix_of_asv_lists_every_run_time_dependency() -> None:
    """It installs our wheel with --no-deps: what it does not list is missing in its
    environments."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    assert json.loads((ROOT / "asv.conf.json").read_text())["matrix"]["req"].keys() == dependencies


@pytest.mark.slow
@pytest.mark.procs
@pytest.mark.timeout(400)
def test_asv_run_and_publish_show_the_three_cells(tmp_path: Path) -> None:
    pytest.importorskip("asv")
    configuration = json.loads((ROOT / "asv.conf.json").read_text())
    places = {name: str(tmp_path / name) for name in ("env_dir", "results_dir", "html_dir")}
    places |= {
        "repo": str(ROOT),
        "benchmark_dir": str(ROOT / "benchsuite" / "programs" / "asv_benchmarks"),
    }
    path = tmp_path / "asv.conf.json"
    path.write_text(json.dumps(configuration | places))

    def asv(*arguments: str) -> str:
        command = [sys.executable, "-m", "asv", arguments[0], "--config", str(path), *arguments[1:]]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=390,
            env=os.environ | {"HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not a git clone: asv stores results by commit")
    asv("machine", "--yes")
    out = asv(
        "run",
        "-E",
        "existing",
        "--set-commit-hash",
        head.stdout.strip(),
        "--record-samples",
        "--show-stderr",
    )
    assert "failed" not in out, out
    for cell in CELLS:
        assert cell in out
    asv("publish")
    found = (tmp_path / "html_dir" / "graphs").rglob("cells.Cells.track_payload_bytes.json")
    graphs = [path for path in found if "summary" not in path.parts]
    assert graphs, "asv publish drew nothing"
    ((_, values),) = json.loads(graphs[0].read_text())
    assert len(values) == len(CELLS) and all(value > 0 for value in values)
