"""The command line: golden help, one-line errors, exit codes, one JSON document on standard
output."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchsuite import __version__
from benchsuite.cli import main
from benchsuite.errors import UsageError
from benchsuite.plan import plan
from benchsuite.plan.cell import Cell, from_json
from benchsuite.results.record import Run, Status
from benchsuite.results.store import Store, StoreError
from benchsuite.rules import plans
from benchsuite.running import api, forecast, starters
from benchsuite.running.runner import Tally

GOLDEN = Path(__file__).parent / "golden"
VERBS = (
    "list",
    "plan",
    "run",
    "report",
    "compare",
    "export",
    "collect",
    "replay",
    "doctor",
    "calibrate",
    "selfcheck",
    "verify",
)
CELL = ["--workload", "cnn", "--preset", "smoke", "--topology", "ring", "--replicas", "2"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main.main(arguments)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_is_as_committed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    pages = [said(capsys, *verb, "--help")[1] for verb in [(), *((verb,) for verb in VERBS)]]
    assert "\n".join(pages) == (GOLDEN / "help.txt").read_text()


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version") == (0, f"benchsuite {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "qick"], "did you mean 'quick'?"),
        (["run"], "give a PLAN (benchsuite list report) or a cell by flags"),
        (["run", "quick", "--workload", "cnn"], "not PLAN 'quick' and --workload"),
        (["plan", "quick", "--set", "snc=ring"], "did you mean 'sync'?"),
        (["plan", "quick", "--only", "replicas > 99"], "keeps none of"),
        (["plan", "quick", "--seeds", "one"], "give integers separated by commas, e.g. 0,1,2"),
        (["run", "quick", "--cluster", "lokal"], "unknown cluster 'lokal'; did you mean 'local'?"),
        (["run", "--workload", "cnnn"], "unknown workload 'cnnn'; did you mean 'cnn'?"),
        (
            ["run", *CELL, "--set", "options.cnn.lerning_rate=1"],
            "unknown option 'lerning_rate' of cnn",
        ),
        (
            ["run", "--workload", "mlp", "--replicas", "64"],
            "mlp/small synchronous native N=64 is refused: global batch",
        ),
        (["plan", "--workload", "mlp", "--replicas", "64", "--json"], "set replicas to a divisor"),
        (["run", *CELL, "--seeds", "0,1", "--backend", "mpi"], "without MPI"),
        (
            ["replay", "no-such-run.json"],
            "no-such-run.json: No such file or directory; give a run file",
        ),
        (["compare", "no-such-folder", "neither"], "no-such-folder: no such results folder"),
    ],
)
def test_bad_input_gets_one_line_and_exit_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "") and says in err, err
    assert err.startswith("benchsuite: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "verb",
    [["export", "csv"], ["report", "quick"], ["report", "quick", "x"], ["plan", "quick"]],
    ids=" ".join,
)
def test_an_output_that_cannot_be_written_is_one_line_and_exit_2(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "afile").write_text("kept")
    (tmp_path / "results").mkdir()
    out = tmp_path / "afile" if verb == ["report", "quick"] else tmp_path / "afile" / "x"
    flag = "--write" if verb[0] == "plan" else "--out"
    flags = [] if verb[0] == "plan" else ["--results", str(tmp_path / "results")]
    code, _, err = said(capsys, *verb[:2], *flags, flag, str(out))
    assert code == 2 and f"{out} cannot be written" in err and err.count("\n") == 1, err
    assert (tmp_path / "afile").read_text() == "kept"


@pytest.mark.parametrize(
    ("error", "code", "traceback"),
    [
        (StoreError("results folder x cannot be written: disk full"), 5, False),
        (KeyError("a defect of ours"), 5, True),
        (KeyboardInterrupt(), 130, False),
        (UsageError("no"), 2, False),
    ],
)
def test_every_ending_has_its_exit_code(
    error: BaseException,
    code: int,
    traceback: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_args: Any) -> int:
        raise error

    monkeypatch.setattr("benchsuite.cli.list.run", fails)
    ended, _, err = said(capsys, "list")
    assert ended == code and ("Traceback" in err) == traceback


def test_list_names_members_with_options_and_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "list", "sync", "--json")
    members = {member["name"]: member for member in json.loads(out)["sync"]}
    assert code == 0 and {"synchronous", "asynchronous", "k_sync", "ddp"} <= members.keys()
    lock = next(option for option in members["asynchronous"]["options"] if option["name"] == "lock")
    assert lock["default"] == "exclusive" and lock["help"]
    assert Path(members["asynchronous"]["path"]).is_file()
    text = said(capsys, "list", "sync")[1]
    assert "asynchronous" in text and "lock = 'exclusive'" in text
    assert "quick" in said(capsys, "list", "report")[1]
    assert said(capsys, "list", "report")[1].startswith("report:\n")
    assert said(capsys, "list")[1].startswith("workload\n")


def test_plan_write_makes_the_cells_of_a_torchrun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cells.json"
    code, out, err = said(capsys, "plan", *CELL, "--seeds", "0,1", "--write", str(path))
    document = json.loads(path.read_text())
    cells = [from_json(entry) for entry in document["cells"]]
    assert (code, out, document["schema"]) == (0, "", 1) and "2 ranks for 2 of them" in err
    assert [(cell.cluster, cell.seed, cell.replicas) for cell in cells] == [
        ("torchrun", 0, 2),
        ("torchrun", 1, 2),
    ]
    assert said(capsys, "plan", *CELL, "--write", str(tmp_path / "no" / "cells.json"))[0] == 2


def test_plan_prints_ranks_bytes_time_and_refusals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    traffic = SimpleNamespace(
        payload_bytes=3 * 2**20, num_messages=12, busiest_port=lambda ports: 2**20
    )
    monkeypatch.setitem(
        sys.modules,
        "benchsuite.worker.predict",
        SimpleNamespace(
            predicted=lambda cell: traffic, kept=lambda cell: {"worker": 0, "server": None}
        ),
    )
    flags = {
        "workload": "cnn",
        "preset": "smoke",
        "topology": "ring,parameter_server",
        "replicas": "2",
    }
    grid = plans.from_flags(flags, seeds=[0, 1])
    store = Store(tmp_path)
    ring, server = grid.cells
    store.write(Run(cell=ring, code_id="c", status=Status.OK, machine="m", cost={"wall_s": 7.0}))
    refused = plan.Refused(
        Cell(), (SimpleNamespace(rule="r", reason="a ring is a collective", remedy="use a server"),)
    )
    grid = dataclasses.replace(grid, refused=(refused,), question="Why?")
    document = forecast.forecast(grid, store, code_id="c")
    by_label = {cell["label"]: cell for cell in document["cells"]}
    assert (
        by_label[ring.label] | {"missing": 1, "estimated_s": 7.0, "ranks": 2}
        == by_label[ring.label]
    )
    assert (
        by_label[server.label] | {"missing": 2, "estimated_s": None, "ranks": 3}
        == by_label[server.label]
    )
    assert (document["runs"], document["missing"], document["estimated_s"]) == (4, 3, None)
    text = forecast.table(document)
    for words in (
        "Why?",
        "2+0",
        "2+1",
        "3.0 MiB",
        "7 s",
        "unknown",
        "a ring is a collective: use a server",
        "1 refused",
    ):
        assert words in text, text


NORMED = """presets = {"default": {"global_batch": 64, "budget_samples": 640}}


class Workload:
    norm: str = "batch"
"""


def test_plan_and_run_say_what_the_numbers_of_a_cell_do_not_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    traffic = SimpleNamespace(payload_bytes=0, num_messages=0, busiest_port=lambda ports: 0)
    costs = SimpleNamespace(
        predicted=lambda cell: traffic, kept=lambda cell: {"worker": None, "server": None}
    )
    monkeypatch.setitem(sys.modules, "benchsuite.worker.predict", costs)
    monkeypatch.setattr(api, "run_plan", lambda *_, **__: Tally())
    (tmp_path / "net.py").write_text(NORMED)
    cells = [
        "--workload",
        str(tmp_path / "net.py"),
        "--results",
        str(tmp_path / "results"),
        "--replicas",
    ]
    reason = "BatchNorm over 2 shards is not one large batch"
    of = "net/default synchronous native N=2"
    code, out, _ = said(capsys, "plan", *cells, "1,2")
    assert code == 0 and f"notice   {of}\n         {reason}" in out, out
    (notice,) = json.loads(said(capsys, "plan", *cells, "1,2", "--json")[1])["notices"]
    assert (notice["rule"], notice["concerns"], len(notice["cell_ids"])) == ("batch norm", of, 1)
    code, _, err = said(capsys, "run", *cells, "1,2")
    (line,) = err.splitlines()
    assert (
        code == 0 and line.startswith(f"benchsuite: notice: {reason}") and line.endswith(f"({of})")
    )
    assert json.loads(said(capsys, "plan", *cells, "1", "--json")[1])["notices"] == []
    assert said(capsys, "run", *cells, "1")[2] == ""


@pytest.mark.parametrize("failed", [0, 1])
def test_run_says_what_became_of_the_cells(
    failed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = Tally(stored=2)
    tally.counts[Status.OK] = 3
    tally.counts[Status.FAILED] = failed
    tally.failures += ["cnn ring N=2 seed 0: failed: rank 1 was killed"] * failed
    monkeypatch.setattr(api, "run_plan", lambda *_, **__: tally)
    code, out, err = said(capsys, "run", *CELL, "--json")
    assert code == (4 if failed else 0)
    document = json.loads(out)
    assert (document["counts"]["ok"], document["stored_before"]) == (3, 2)
    assert ("rank 1 was killed" in err) == bool(failed)


def test_another_cluster_is_pointed_to_torchrun(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = said(capsys, "run", *CELL, "--cluster", "torchrun", "--results", str(tmp_path))
    assert code == 2 and "benchsuite plan PLAN --write cells.json" in err


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_refused_cells_beside_others_leave_the_exit_code_0(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launched: list[Cell] = []

    def launch(_engine: Any, cell: Cell, _here: Any) -> Run:
        launched.append(cell)
        return Run(cell=cell, code_id="c", status=Status.OK, machine="m")

    monkeypatch.setattr(starters, "launch", launch)
    flags = ["--workload", "mlp", "--preset", "small", "--results", str(tmp_path)]
    code, out, err = said(capsys, verb, *flags, "--replicas", "1,64")
    assert (
        code == 0
        and "global batch" in out + err
        and [cell.replicas for cell in launched] == [1] * (verb == "run")
    )
    assert (
        said(capsys, verb, *flags, "--replicas", "64,128")[0] == 0
    )  # two cells of flags are a plan, too
    before = sorted(tmp_path.rglob("*.json"))
    assert said(capsys, verb, *flags, "--replicas", "256")[0] == 2
    assert sorted(tmp_path.rglob("*.json")) == before  # the refusal is said, not stored


def test_compare_judges_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"workload": "cnn", "preset": "smoke", "topology": "ring", "replicas": "2"}
    (cell,) = plans.from_flags(flags).cells
    result = {
        "loss": [2.0, 1.0],
        "final_loss": 1.0,
        "payload_bytes": 480,
        "predicted_bytes": 480,
        "messages": 4,
    }
    for name, change in (
        ("base", {}),
        ("same", {}),
        ("bytes", {"payload_bytes": 484}),
        ("loss", {"loss": [2.0, 1.5]}),
    ):
        store = Store(tmp_path / name)
        environment_id = store.write_environment("m", {"versions": {"torch": "2.13.0"}})
        run = Run(
            cell=cell,
            code_id="c",
            status=Status.OK,
            machine="m",
            environment_id=environment_id,
            result=result | change,
        )
        store.write(run)
    base = str(tmp_path / "base")
    assert said(capsys, "compare", base, base)[0] == 0
    assert said(capsys, "compare", base, str(tmp_path / "same"))[0] == 0
    for name, metric, numbers in (
        ("bytes", "payload_bytes", ("480", "484")),
        ("loss", "loss at step 1", ("1.0", "1.5")),
    ):
        code, out, _ = said(capsys, "compare", base, str(tmp_path / name))
        (line,) = [line for line in out.splitlines() if "differs (" in line]
        assert code == 1 and all(words in line for words in (cell.id, metric, *numbers)), out
    code, out, _ = said(capsys, "compare", base, str(tmp_path / "bytes"), "--json")
    assert code == 1 and json.loads(out)["verdict"] == "regression"
    (tmp_path / "empty").mkdir()
    code, _, err = said(capsys, "compare", base, str(tmp_path / "empty"))
    assert code == 2 and "holds no run" in err


def test_a_foreign_file_is_a_warning_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "m" / "0123456789ab"
    folder.mkdir(parents=True)
    (folder / "foreign.json").write_text("{}")
    code, _, err = said(capsys, "export", "csv", "--results", str(tmp_path))
    assert (
        code == 0
        and err.startswith("benchsuite: warning: ")
        and "foreign.json" in err
        and err.count("\n") == 1
    )
    assert said(capsys, "export", "csv", "--results", str(tmp_path))[2] == ""
