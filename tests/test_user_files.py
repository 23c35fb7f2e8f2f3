"""A user's own workload and strategy, given by path from outside the clone, run without touching
the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchsuite import rules
from benchsuite.cli import main
from benchsuite.compression import fp16
from benchsuite.laws.harness.cases import tiny
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.traffic import counted_is_predicted
from benchsuite.plan.cell import Cell, resolve
from benchsuite.results.record import Status
from benchsuite.results.store import Store
from benchsuite.rules import Machine
from tests.bench import ROOT
from tests.user_files import user_file

PLAN = """
question = "Does my net train with my strategy?"
[cells]
workload = ["../elsewhere/my_net.py"]
replicas = [2]
sync = ["../elsewhere/my_sync.py", "asynchronous"]
topology = ["ring"]
"""


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A folder with a plan, beside one with the user's two files."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "my_net.py").write_text(user_file("my_net"))
    (tmp_path / "elsewhere" / "my_sync.py").write_text(user_file("my_sync"))
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "mine.toml").write_text(PLAN)
    return tmp_path


def command(user: Path, *arguments: str, python: str = sys.executable, **environment: str) -> Any:
    """The command's JSON document, run in the user's folder."""
    done = subprocess.run(
        [python, "-m", "benchsuite", *arguments, "--results", str(user / "results"), "--json"],
        cwd=user,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_runs(user: Path, python: str = sys.executable, **environment: str) -> None:
    """Both files run; what means nothing is a row with its reason; an edited file makes its run
    missing again."""
    first = command(user, "run", "plans/mine.toml", python=python, **environment)
    assert {name: n for name, n in first["counts"].items() if n} == {"ok": 1, "unsupported": 1}, (
        first
    )
    runs = {run.status: run for run in Store(user / "results").runs()}
    mine = runs[Status.OK]
    refused = runs[Status.UNSUPPORTED]
    assert mine.cell.label == "my_net/default my_sync ring N=2"
    assert mine.result["steps"] == 10 and mine.result["events"]["means"] == [5, 5]
    parameters = 12 * 4 + 12 + 12 + 1
    assert mine.result["predicted_bytes"] == mine.result["payload_bytes"] == 5 * 2 * 4 * parameters
    assert mine.result["final_metric"] > 50.0
    assert refused.reason is not None
    assert "a ring is a collective: every rank must enter the same step" in refused.reason
    assert "set topology to parameter_server" in refused.reason
    plans = [command(user, "plan", "plans/mine.toml", python=python, **environment)]
    for name in ("my_net.py", "my_sync.py"):
        path = user / "elsewhere" / name
        path.write_text(path.read_text() + "# edited\n")
        plans.append(command(user, "plan", "plans/mine.toml", python=python, **environment))
    assert [plan["missing"] for plan in plans] == [0, 1, 1], "stored; then edited, so missing again"
    assert len({plan["cells"][0]["cell_id"] for plan in plans}) == 3, (
        "an edited file is another cell"
    )


@pytest.mark.procs
@pytest.mark.timeout(100)
def test_both_files_run_by_path_and_an_edit_makes_their_run_missing_again(user: Path) -> None:
    check_runs(user, PYTHONPATH=str(ROOT))


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_both_files_run_with_the_package_installed_from_its_wheel(user: Path) -> None:
    """In an environment that knows this clone's dependencies, but not the clone."""
    source = user / "source"  # a copy: building leaves files behind
    for name in ("benchsuite", "workloads", "reports"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "build")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    wheel_of = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(user / "wheel"),
        str(source),
    ]
    built = subprocess.run(
        [sys.executable, "-m", "pip", *wheel_of], capture_output=True, text=True, timeout=200
    )
    if built.returncode != 0 and "setuptools" in built.stderr:
        pytest.skip(f"the wheel cannot be built here: {built.stderr.strip().splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    (wheel,) = (user / "wheel").glob("*.whl")
    site = user / "installed"
    unpacked = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert unpacked.returncode == 0, unpacked.stderr
    where = subprocess.run(
        [sys.executable, "-c", "import benchsuite; print(benchsuite.__file__)"],
        cwd=user,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(site)), where.stdout
    check_runs(user, PYTHONPATH=str(site))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says on stderr; it ends with 2."""
    assert main.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            "options.my_net.widht=3",
            "unknown option 'widht' of my_net; did you mean 'width'? known: width, ",
        ),
        (
            "options.my_sync.evry=3",
            "unknown option 'evry' of my_sync; did you mean 'every'? known: every",
        ),
        ("options.my_net.width=wide", "width"),
        (
            "replics=2",
            "unknown key 'replics' of a cell; did you mean 'replicas'? known: replicas, ",
        ),
        ("workload=cn", "unknown workload 'cn'"),
        ("workload=elsewhere/nothing.py", "elsewhere/nothing.py"),
    ],
)
def test_a_wrong_name_gets_the_known_ones_nearest_first_and_exit_2(
    user: Path,
    wrong: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(user)
    assert says in said(capsys, "run", "plans/mine.toml", "--set", wrong)


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("[budgt]\nsamples = 16\n", "unknown key 'budgt' of a plan; did you mean 'budget'?"),
        ('[[figures]]\nkind = "trafic"\n', "unknown figure kind 'trafic'; did you mean 'traffic'?"),
        (
            '[[figures]]\nkind = "traffic"\nwher = {}\n',
            "unknown key 'wher' of figure traffic; did you mean 'where'?",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_wrong_key_of_the_plan_is_said_before_anything_runs(
    user: Path, verb: str, added: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = user / "plans" / "mine.toml"
    path.write_text(path.read_text() + added)
    assert says in said(capsys, verb, str(path), "--results", str(user / "results"))
    assert not (user / "results").exists()


def test_what_this_machine_lacks_is_refused_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "benchsuite.measure.torch_build.examine_torch",
        lambda: Machine(torch="2.13.0", gloo=True, nccl=False, mpi=False),
    )
    grid = ["--workload", "cnn", "--backend", "mpi", "--results", str(tmp_path)]
    several = [*grid, "--replicas", "1,2"]
    assert main.main(["plan", *several, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cells"] == []
    for refused in document["refused"]:
        (problem,) = refused["problems"]
        assert "torch 2.13.0 is built without MPI" in problem["reason"]
        assert problem["remedy"].startswith("set backend = gloo")
    assert main.main(["run", *several]) == 0
    assert [run.status for run in Store(tmp_path).runs()] == [Status.UNSUPPORTED] * 2
    capsys.readouterr()
    assert main.main(["run", *grid]) == 2, "one cell that was asked for alone"
    assert "torch 2.13.0 is built without MPI" in capsys.readouterr().err


def test_a_compression_of_ones_own_is_refused_where_it_would_be_ignored_and_else_used(
    tmp_path: Path,
) -> None:
    """The suite's own fp16, as a file of the user's."""
    path = tmp_path / "half.py"
    path.write_text(Path(fp16.__file__).read_text())

    def reasons(**fields: Any) -> str:
        return " ".join(
            problem.reason
            for problem in rules.validate(resolve(Cell(compression=str(path), **fields)))
        )

    for sync in ("synchronous", "asynchronous", "k_sync"):
        served: dict[str, Any] = {"sync": sync, "topology": "parameter_server", "replicas": 2}
        assert reasons(**served) == ""
        figure = counted_is_predicted(thread_ranks, tiny(compression=str(path), **served))
        assert figure.holds, figure
    assert "it has no communication hook for it" in reasons(
        sync="ddp", topology="native", replicas=2
    )
    assert reasons(sync="synchronous", topology="ring", replicas=2) == ""
