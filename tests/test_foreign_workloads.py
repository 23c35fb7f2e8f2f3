"""A user's own package called `workloads` is left alone, installed or not, and harms nothing.

In a clone a folder of that name lies beside the package. Once the clone is on a process's path, it
may hide the user's package; that happened to ranks and simulators, to which the clone came first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchsuite.cluster import rank_imports
from benchsuite.cluster.rank_imports import python_path
from tests.bench import ROOT
from tests.user_files import user_file

SCRIPT = """
import json
import sys

import workloads

import benchsuite
from benchsuite import Cell
from benchsuite.plan import plugins

TIMES = {"kind": "fixed", "mean_s": 0.01}

if __name__ == "__main__":
    cells = [
        Cell(workload="cnn", preset="smoke", replicas=2, clock="virtual", compute_time=TIMES),
        Cell(workload="my_net.py", replicas=2, clock="virtual", compute_time=TIMES),
        Cell(workload="my_net.py", replicas=2, topology="ring"),
    ]
    tally = benchsuite.run(cells, results="results")
    loaded = {name: plugins.load("workload", name).__module__ for name in plugins.names("workload")}
    finders = [str(finder) for finder in sys.meta_path]
    print(json.dumps({"failures": tally.failures, "loaded": loaded, "finders": finders}))
    assert sys.modules["workloads"] is workloads and workloads.SCALE == 3.0
"""
# Put at the top of the user's workload: it needs the user's package wherever it is loaded.
NEEDS_MINE = "import workloads\n\nassert workloads.SCALE == 3.0, workloads.__file__\n"
# Run by every Python that starts: no finder of an editable installation is left.
NOT_INSTALLED = """
import sys
sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in str(each)]
sys.path[:] = [each for each in sys.path if "__editable__" not in each]
"""


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A script, a workload file and a package `workloads` with a module that we have too."""
    (tmp_path / "workloads").mkdir()
    (tmp_path / "workloads" / "__init__.py").write_text("SCALE = 3.0\n")
    (tmp_path / "workloads" / "cnn.py").write_text("raise RuntimeError('not asked for')\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    docstring, _, rest = user_file("my_net").partition("\n")
    (tmp_path / "my_net.py").write_text(f"{docstring}\n{NEEDS_MINE}{rest}")
    return tmp_path


def check(user: Path, *path: Path) -> None:
    """The script runs with this PYTHONPATH: all cells end well, all our members are loaded."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=user,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["failures"] == []
    members = ("cnn", "mlp", "rl_agent", "transformer")
    assert said["loaded"] == {name: f"benchsuite.workloads.{name}" for name in members}
    not_installed = (user / "sitecustomize.py").exists()
    assert not (not_installed and "editable" in "".join(said["finders"]))


@pytest.mark.procs
@pytest.mark.timeout(100)
def test_a_package_called_workloads_does_no_harm_where_the_suite_is_installed(user: Path) -> None:
    check(user, user)


@pytest.mark.procs
@pytest.mark.timeout(100)
def test_a_package_called_workloads_does_no_harm_beside_a_clone_on_the_path(user: Path) -> None:
    (user / "sitecustomize.py").write_text(NOT_INSTALLED)
    check(user, user, ROOT)


@pytest.mark.parametrize(
    ("installed", "given", "expected"),
    [
        (False, ["/mine"], ["/mine", str(ROOT)]),
        (False, [], [str(ROOT)]),
        (True, ["/mine"], ["/mine"]),
        (False, ["/mine", "OTHER"], [str(ROOT), "/mine", "OTHER"]),
        (True, ["OTHER"], [str(ROOT), "OTHER"]),
    ],
)
def test_the_clone_comes_last_on_the_path_unless_another_benchsuite_is_there(
    installed: bool,
    given: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "benchsuite").mkdir()
    (tmp_path / "benchsuite" / "__init__.py").write_text("")
    other = {"OTHER": str(tmp_path)}
    path = [other.get(each, each) for each in given]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    place = str(ROOT / "benchsuite" / "__init__.py") if installed else "/elsewhere/__init__.py"
    finder = SimpleNamespace(find_spec=lambda name, path, target: SimpleNamespace(origin=place))
    monkeypatch.setattr(
        rank_imports, "sys", SimpleNamespace(meta_path=[rank_imports.PathFinder, finder])
    )
    wanted = ["/first", *(other.get(each, each) for each in expected)]
    assert python_path(["/first"]).split(os.pathsep) == wanted
