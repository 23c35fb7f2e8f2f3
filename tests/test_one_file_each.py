"""Whatever a user adds is one file: one of each kind, written into one folder, works together.

A workload, a strategy, a topology, a compression, a cluster engine, a rule and a kind of figure are
listed, planned, refused by what they say themselves, run in both worlds, and drawn under the label
and the colour that they declare. Nothing of the package is touched.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchsuite import rules
from benchsuite.cli import main
from benchsuite.plan import plugins
from benchsuite.report import kinds
from benchsuite.results.record import Run, Status
from benchsuite.results.store import Store
from tests.user_files import FOLDER

PLAN = """
question = "Do seven files of my own work together?"

[cells]
workload = ["./my_net.py"]
sync = ["./my_sync.py"]
topology = ["./my_star.py"]
replicas = [2]
cluster = "./my_engine.py"

[[cells.also]]
cluster = "local"
clock = "virtual"
compute_time = {kind = "fixed", mean_s = 0.01}
replicas = [2, 3, 16]
compression = ["none", "./my_half.py"]
options = {my_sync = {every = [2, 8]}, my_half = {limit = [1000.0, 60000.0]}}

[[figures]]
kind = "./my_ends.py"

[[figures]]
kind = "metric_against"
x = ["bytes"]
"""
LISTED = {
    "workload": ("my_net", "Two layers that learn the sign of a sum."),
    "sync": ("my_sync", "Agrees every second step only: the mean of the parameters."),
    "topology": (
        "my_star",
        "A star: rank 0 adds up everybody's vector, divides once and sends the mean back.",
    ),
    "compression": (
        "my_half",
        "Half precision of values that are cut off first, so that no sum is infinite.",
    ),
    "cluster": ("my_engine", "Each rank is a program of its own, started without a fork server."),
}
REFUSED = {
    "threes": ("replicas = 3: a crowd", "set replicas = 2 or 4"),
    "size of a star": (
        "16 workers around one rank: my_star serves 8",
        "set replicas = 8, or topology = ring",
    ),
    "steps apart": (
        "every = 8 of my_sync: replicas drift apart after 4 steps",
        "set every = 2",
    ),
    "cut off": ("2 values of 60000 may add up to infinity in my_half", "set limit = 1000"),
}
PARAMETERS = 12 * 4 + 12 + 12 + 1


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder: seven files and a plan; rules are looked for there too."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in FOLDER.glob("[!_]*.py"):
        shutil.copy(path, folder)
    (folder / "plan.toml").write_text(PLAN)
    monkeypatch.setattr(rules, "FOLDERS", (rules.HERE, folder))
    monkeypatch.chdir(tmp_path)
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON document that a command prints."""
    code = main.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def listed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[tuple[str, str]]]:
    """What `list` says of each kind where the folder is that of the kind, and kinds of figures."""
    with monkeypatch.context() as patch:
        found = {kind: (folder, prefix, name) for kind, (_, prefix, name) in plugins.KINDS.items()}
        patch.setattr(plugins, "KINDS", found)
        document = answer(capsys, "list")
    members = {kind: document[kind] for kind in LISTED}
    return {
        kind: [(member["name"], member["summary"]) for member in each]
        for kind, each in members.items()
    }


@pytest.mark.procs
@pytest.mark.timeout(100)
def test_one_file_of_each_kind_is_listed_planned_refused_run_and_drawn(
    mine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert listed(mine, capsys, monkeypatch) == {kind: [each] for kind, each in LISTED.items()}
    assert kinds.find(str(mine / "my_ends.py")).kind.title == "How does every run end?"

    planned = answer(capsys, "plan", "mine/plan.toml")
    labels = [cell["label"] for cell in planned["cells"]]
    assert len(labels) == 3 and all("my_net" in label for label in labels), labels
    problems = [each for cell in planned["refused"] for each in cell["problems"]]
    said = {(each["rule"], each["reason"], each["remedy"]) for each in problems}
    assert {(rule, *words) for rule, words in REFUSED.items()} <= said
    assert len(planned["cells"]) + len(planned["refused"]) == 2 * 3 * 3 + 1

    answer(capsys, "run", "mine/plan.toml")
    ok = [run for run in Store(Path("results")).runs() if run.status != Status.UNSUPPORTED]
    check_runs(ok)

    assert main.main(["report", "mine/plan.toml", "--out", "page"]) == 0
    check_page(Path("page"))


def check_runs(runs: list[Run]) -> None:
    """Every run sends what its own files predict; both worlds train alike."""
    assert [run.status for run in runs] == [Status.OK] * 3, [run.reason for run in runs]
    by_kind = {(run.cell.clock, plugins.stem(run.cell.compression)): run for run in runs}
    real = by_kind["wall", "none"]
    assert plugins.stem(real.cell.cluster) == "my_engine"
    means = 5  # in ten steps
    for (_, compression), run in by_kind.items():
        itemsize = 2 if compression == "my_half" else 4
        sent = means * 2 * PARAMETERS * itemsize  # to the middle and back
        assert run.result["events"]["means"] == [means, means]
        assert run.result["payload_bytes"] == run.result["predicted_bytes"] == sent
    assert by_kind["virtual", "none"].result["loss"] == pytest.approx(real.result["loss"], rel=1e-5)


def check_page(page: Path) -> None:
    """The figure of one's own, and the strategy's label and colour in a figure of the suite's."""
    html = (page / "index.html").read_text(encoding="utf-8")
    assert ">How does every run end?</h2>" in html and "Figure 1. 1 runs." in html
    assert "my dots" in (page / "figures" / "my_ends.svg").read_text(encoding="utf-8")
    drawn = (page / "figures" / "metric_against_bytes.svg").read_text(encoding="utf-8")
    assert "My rare mean, My star" in drawn and "#123456" in drawn
    assert "#123456" not in (page / "figures" / "my_ends.svg").read_text(encoding="utf-8")
    for reason, _ in REFUSED.values():
        assert reason in html
