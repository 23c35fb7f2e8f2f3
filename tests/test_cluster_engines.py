"""A cluster engine is one file: listed, planned and used by path, with flags and refusals of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchsuite import cluster
from benchsuite.cli import main
from benchsuite.errors import UsageError
from benchsuite.plan import declared, plugins
from benchsuite.results.code_id import Tree
from benchsuite.results.record import Status
from benchsuite.results.store import Store
from tests.bench import TINY
from tests.user_files import user_file

ENGINE = user_file("my_engine")
REFUSES = '''"""An engine that lacks something."""

from benchsuite.cluster import Engine


class Cluster(Engine):
    @classmethod
    def refusal(cls):
        return "no allocation is open here: open one with salloc"
'''
BY_HAND = '''"""An engine that the user starts."""

from benchsuite.cluster import Engine


class Cluster(Engine):
    started_by = "bsub < job.sh"
'''
NO_ENGINE = '''"""A class with the right name and nothing else."""


class Cluster:
    pass
'''
FLAG_LIST = BY_HAND.replace('started_by = "bsub < job.sh"', 'flags = ["hosts"]')
CELL = ("--workload", TINY, "--topology", "ring", "--replicas", "2", "--set", "budget.steps=3")


def engine(folder: Path, text: str = ENGINE, name: str = "my_engine") -> str:
    path = folder / f"{name}.py"
    path.write_text(text)
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.procs
def test_an_engine_given_by_path_is_planned_and_runs_a_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = engine(tmp_path)
    results = ("--results", str(tmp_path / "results"))
    code, out, err = said(capsys, "plan", *CELL, "--cluster", path, *results, "--json")
    assert code == 0 and [cell["missing"] for cell in json.loads(out)["cells"]] == [1], err
    mark = tmp_path / "mark.txt"
    code, _, err = said(capsys, "run", *CELL, "--cluster", path, "--mark-file", str(mark), *results)
    assert code == 0, err
    (run,) = Store(tmp_path / "results").runs()
    assert (run.status, run.cell.cluster) == (Status.OK, path), run.reason
    assert run.result["predicted_bytes"] == run.result["payload_bytes"] > 0
    assert mark.read_text().splitlines() == [run.cell.label]
    assert "1 stored before" in said(capsys, "run", *CELL, "--cluster", path, *results)[1]
    assert Tree().code_id(run.cell) == run.code_id
    Path(path).write_text(ENGINE + "# edited\n")
    assert Tree().code_id(run.cell) != run.code_id, "runs of another engine would stay current"


def test_an_engine_in_the_folder_is_listed_with_its_first_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(tmp_path)
    engine(tmp_path, '"""Machinery that is no engine."""\n', "machinery")
    folder = (tmp_path, "benchsuite.cluster", "Cluster")
    monkeypatch.setattr(plugins, "KINDS", {**plugins.KINDS, "cluster": folder})
    _, out, _ = said(capsys, "list", "cluster")
    assert out.splitlines()[1:] == [
        "  my_engine  Each rank is a program of its own, started without a fork server.  "
        f"[{tmp_path / 'my_engine.py'}]"
    ]


def test_the_suites_engines_are_two_files() -> None:
    assert plugins.names("cluster") == ["local", "torchrun"]
    assert not declared.cluster("local").started_by
    assert declared.cluster("torchrun").started_by and declared.cluster("torchrun").several_hosts
    for name in plugins.names("cluster"):
        assert issubclass(plugins.load("cluster", name), cluster.Engine)


def test_a_flag_is_there_only_with_the_engine_that_declares_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = engine(tmp_path)
    other = engine(tmp_path, BY_HAND, "other")
    assert "--mark-file X" in said(capsys, "run", "--cluster", path, "--help")[1]
    for named in ((), ("--cluster", "local"), ("--cluster", other)):
        assert "--mark-file" not in said(capsys, "run", *named, "--help")[1]
        code, _, err = said(capsys, "run", *CELL, *named, "--mark-file", "x")
        assert code == 2 and "unrecognized arguments: --mark-file" in err
    for gone in ("--hosts", "--link"):
        assert f"unrecognized arguments: {gone}" in said(capsys, "run", "quick", gone, "2")[2]


def test_a_flag_that_is_no_dict_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(capsys, "run", *CELL, "--cluster", engine(tmp_path, FLAG_LIST))
    assert code == 2 and "flags = ['hosts']: a table, e.g. flags = " in err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (REFUSES, "no allocation is open here: open one with salloc"),
        (BY_HAND, "is started by your own command: bsub < job.sh"),
        (NO_ENGINE, "its Cluster is no engine: derive it from benchsuite.cluster.Engine"),
    ],
)
def test_what_an_engine_cannot_do_is_said_before_anything_is_stored(
    tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = engine(tmp_path, text)
    results = tmp_path / "results"
    code, _, err = said(capsys, "run", *CELL, "--cluster", path, "--results", str(results))
    assert code == 2 and says in err and not results.exists(), err


def test_the_engine_of_this_machine_needs_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    local = plugins.load("cluster", "local")
    assert local.refusal() == ""
    monkeypatch.setattr("sys.platform", "darwin")
    assert "needs Linux, this is darwin" in local.refusal()


def test_only_an_engine_that_the_user_starts_has_runs_to_collect(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no cells"):
        plugins.load("cluster", "torchrun")().collect(tmp_path)
    with pytest.raises(UsageError, match="are stored as they end"):
        plugins.load("cluster", "local")().collect(tmp_path)
