"""`benchsuite verify`: the table, the exit codes, what a user's file brings along, what a clock
cannot run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchsuite.cli import main
from benchsuite.cluster.local import Cluster
from benchsuite.laws import families, verify
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.cases import Asked
from benchsuite.laws.verify_table import table

GOLDEN = Path(__file__).parent / "golden"
SMALL = Asked(("synchronous",), ("native", "ring", "parameter_server"), ("none",), (2,))
NARROW = ("--topology", "ring", "--compression", "none", "--replicas", "2")

HASTY = '''"""A user's strategy that forgets to divide."""
from dataclasses import dataclass

from benchsuite.sync.synchronous import Strategy as Synchronous


@dataclass
class Strategy(Synchronous):
    """Sums."""

    obeys = "synchronous"
    timing_free = True

    def step(self, batch):
        loss = self._part.gradient(batch)
        self._topology.mean(self._part.grad)
        self._part.grad.mul_(self._num_workers)
        self._updater.step(self._part.grad, samples=self._step * self._recipe.global_batch)
        self._step += 1
        self.events["synchronisations"] += 1
        return loss
'''
WITH_LAWS = '''"""A user's strategy with laws of its own; it claims none of ours."""
from benchsuite.laws import Control, Figure, Law
from benchsuite.sync.synchronous import Strategy as Synchronous


class Strategy(Synchronous):
    """Does what ours does."""

    timing_free = True


def loses(make_ranks, cell):
    return Figure(1.0, 0.0, "one of 2 is gone")


def raises(make_ranks, cell):
    raise ZeroDivisionError("of this law")


def holds(make_ranks, cell):
    return Figure(0.0, 0.0)


LAWS = (
    Law("mine loses nothing", loses, lambda cell: True, (Control("a part is missing", loses),)),
    Law("mine raises", raises, lambda cell: True, (Control("a part is missing", loses),)),
    Law("mine holds", holds, lambda cell: True, (Control("a part is missing", holds),)),
)
'''


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.main(["verify", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_table_is_as_committed() -> None:
    document = verify.run(SMALL)
    assert document["exit_code"] == 0
    for line in document["laws"]:
        assert 0 <= line["value"] <= line["bound"], line
        line["value"] = 0.5
    assert table({**document, "seconds": 12.3}) + "\n" == (GOLDEN / "verify.txt").read_text()


def test_a_users_strategy_that_breaks_a_law_is_named_with_both_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "hasty.py", HASTY)
    code, out, err = said(capsys, "--sync", "./hasty.py", *NARROW)
    assert code == 1
    law = "synchronous training equals one process on the whole batch"
    found = re.search(
        rf"^FAILS: {law}, hasty ring: (\S+) is not <= 1e-10: .*hasty ring N=2$", out, re.MULTILINE
    )
    assert found and float(found[1]) > 1e-3, out
    assert re.search(
        r"^replicas hold the same bits after every step +hasty ring .* holds$", out, re.MULTILINE
    )
    assert "verify: [1/1] hasty ring: 6 cells\nverify: broken twins of " in err


def test_a_users_laws_are_run_and_one_that_raises_fails_its_line_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(
        capsys, "--json", "--sync", written(tmp_path, "own.py", WITH_LAWS), *NARROW
    )
    document = json.loads(out)
    lines = {line["law"]: line for line in document["laws"]}
    assert code == 1 == document["exit_code"]
    assert lines["mine loses nothing"]["value"] == 1 and not lines["mine loses nothing"]["holds"]
    assert (
        lines["mine raises"]["error"] == "ZeroDivisionError: of this law"
        and lines["mine raises"]["value"] is None
    )
    assert lines["mine holds"]["holds"] and lines["mine holds"]["cells"] > 0
    assert lines["counted traffic of a run is the predicted"]["holds"]
    assert "synchronous training equals one process on the whole batch" not in lines
    twins = {each["law"]: each for each in document["twins"]}
    assert (
        twins["mine holds"]["missed"] == ["a part is missing: 0 <= 0"]
        and twins["mine loses nothing"]["caught"] == 1
    )
    assert 'obeys = "synchronous" in its class would claim the laws' in err
    text = table(document)
    assert "\nFAILS: mine raises, own ring: ZeroDivisionError: of this law\n" in text
    assert "\nNOT CAUGHT: mine holds: a part is missing: 0 <= 0\n" in text


def test_a_strategy_that_hangs_is_waited_for_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "HANGS_S", -1.0)  # whatever raises, hung
    _, out, _ = said(capsys, "--json", "--sync", written(tmp_path, "own.py", WITH_LAWS), *NARROW)
    lines = {line["law"]: line for line in json.loads(out)["laws"]}
    assert lines["mine raises"]["error"] == "ZeroDivisionError: of this law"
    assert (
        lines["mine holds"]["error"] == "not run: ZeroDivisionError: of this law"
        and lines["mine holds"]["cells"] == 0
    )
    assert "the number of servers changes no bit" not in lines, "it does not speak about a ring"


def test_what_the_clock_cannot_run_is_unsupported_and_no_failure() -> None:
    document = verify.run(
        Asked(("synchronous", "ddp", "k_sync"), ("native",), ("none",), (2,), "virtual")
    )
    assert document["exit_code"] == 0
    unsupported = {told["strategy"]: told["reason"] for told in document["unsupported"]}
    assert (
        unsupported["ddp native"]
        == "sync = ddp with clock = virtual: the library runs by the wall clock"
    )
    assert all(strategy.startswith("ddp native") for strategy in unsupported), (
        "k_sync over native is no strategy"
    )
    assert re.search(
        r"\n\nunsupported\nddp native  +sync = ddp with clock = virtual: ", table(document)
    )
    assert {line["strategy"] for line in document["laws"]} == {"synchronous native"}


def test_without_processes_their_strategies_are_unsupported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(_cluster: Cluster) -> None:
        raise RuntimeError("the cell host does not start: no memory")

    monkeypatch.setattr(Cluster, "start", refuses)
    document = verify.run(Asked(("synchronous", "ddp"), ("native",), ("none",), (2,)))
    assert document["exit_code"] == 0 and document["laws"]
    assert [(told["strategy"], told["reason"]) for told in document["unsupported"]] == [
        (
            "ddp native",
            "its ranks are processes of their own: the cell host does not start: no memory",
        )
    ]
    assert not any("ddp" in line["strategy"] for line in document["laws"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--replicas", "5"],
            "--replicas 5: a step of the laws has 24 samples; give some of 1, 2, 3, 4, 6, 8, 12, 24",
        ),
        (["--replicas", "two"], "--replicas 'two': give integers"),
        (["--sync", "synchronus"], "unknown sync 'synchronus'; did you mean 'synchronous'?"),
        (["--sync", "./no_such.py"], "no such file"),
        (["--sync", "gossip", "--topology", "ring"], "no such combination is a strategy"),
        (["--sync", "ddp", "--clock", "virtual"], "the library runs by the wall clock"),
    ],
)
def test_bad_input_gets_one_line_and_exit_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "") and says in err and err.startswith("benchsuite: error: "), err


def test_every_law_is_shown_by_some_verify_without_arguments() -> None:
    shown: set[tuple[str, str]] = set()
    for clock in ("wall", "virtual"):
        asked = Asked(clock=clock)
        for family, laws in families().items():
            cells: Any = cases.cells_of(family).of(asked)
            shown |= {(family, law.name) for law, _ in cases.cases(laws, cells)}
    missing = {(family, law.name) for family, laws in families().items() for law in laws} - shown
    assert not missing


def test_every_strategy_topology_and_compression_is_in_the_grid() -> None:
    cells = cases.training(Asked())
    elsewhere = {"actor_learner"}  # actors act: shown on the agent, by its own laws
    for kind in ("sync", "topology", "compression"):
        assert {getattr(cell, kind) for cell in cells} == set(Asked().members(kind)) - elsewhere, (
            kind
        )
    assert elsewhere == {cell.sync for cell in cases.cells_of("actor_learner").of(Asked())}
