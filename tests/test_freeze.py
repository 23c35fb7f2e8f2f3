"""What the suite answers is what was frozen, and the comparison sees a changed byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchsuite.laws import families
from tests import freeze
from tests.freezing import PARTS, golden, pages
from tests.freezing.doors import internal, surroundings
from tests.freezing.golden import Part

CHEAP = [part for part in PARTS.values() if part.cheap]
PART = Part("made-up", "made_up.txt", lambda: "one\ntwo\n")


@pytest.mark.parametrize("part", CHEAP, ids=lambda part: part.name)
def test_what_was_frozen_is_still_answered(part: Part) -> None:
    with surroundings():
        answer = part.make()
    finding = golden.check(part, answer)
    assert not finding.fails, f"{finding.told}\n{finding.diff}"


@pytest.mark.parametrize("part", PARTS.values(), ids=lambda part: part.name)
def test_a_changed_byte_in_a_frozen_file_is_reported(part: Part, tmp_path: Path) -> None:
    frozen = golden.HOUSE / part.file
    accepted = golden.HOUSE / f"{part.file}{golden.ACCEPTED}"
    answer = (accepted if accepted.is_file() else frozen).read_text(encoding="utf-8")
    where = len(answer) // 2
    changed = answer[:where] + ("x" if answer[where] != "x" else "y") + answer[where + 1 :]
    finding = golden.check(part, changed)
    assert finding.fails and finding.diff.count("\n+") == 2, (
        finding
    )  # the head of the diff, and one line


def test_nothing_lies_beside_the_frozen_files_that_no_part_makes() -> None:
    assert golden.leftovers(PARTS.values()) == []


def test_a_part_that_was_never_frozen_is_no_equal_one(tmp_path: Path) -> None:
    assert golden.check(PART, "one\n", tmp_path).fails


def test_freezing_again_never_overwrites_but_puts_the_other_answer_beside(tmp_path: Path) -> None:
    golden.write(PART, "one\ntwo\n", tmp_path)
    golden.write(PART, "one\n2\n", tmp_path)
    assert (tmp_path / "made_up.txt").read_text() == "one\ntwo\n"
    assert (tmp_path / "made_up.txt.after").read_text() == "one\n2\n"
    golden.write(PART, "one\ntwo\n", tmp_path)
    assert not (tmp_path / "made_up.txt.after").exists(), "equal again"


def test_another_answer_is_accepted_with_a_reason_only(tmp_path: Path) -> None:
    golden.write(PART, "one\ntwo\n", tmp_path)
    golden.write(PART, "one\n2\n", tmp_path)
    assert golden.check(PART, "one\n2\n", tmp_path).fails, "no list of differences"
    listed = tmp_path / golden.DIFFERENCES
    listed.write_text("# Accepted\n\n## made_up.txt\n\n")
    assert golden.check(PART, "one\n2\n", tmp_path).fails, "a heading without a reason"
    listed.write_text("# Accepted\n\n## made_up.txt\n\nNumbers are digits now.\n")
    assert golden.check(PART, "one\n2\n", tmp_path) == golden.Finding(
        "made-up", "differs as listed"
    )
    assert golden.check(PART, "one\n3\n", tmp_path).fails, "a third answer"
    assert golden.check(PART, "one\ntwo\n", tmp_path).fails, "the old answer again"
    assert golden.leftovers([PART], tmp_path) == []


def test_a_reason_for_no_difference_and_a_file_of_no_part_are_reported(tmp_path: Path) -> None:
    (tmp_path / golden.DIFFERENCES).write_text("## gone.txt\n\nA reason.\n")
    (tmp_path / "stray.txt").write_text("")
    assert [finding.part for finding in golden.leftovers([PART], tmp_path)] == [
        "stray.txt",
        "gone.txt",
    ]


def test_lines_counted_without_training_are_those_that_verify_shows() -> None:
    counted, shown = (
        (golden.HOUSE / PARTS[name].file).read_text() for name in ("laws-virtual", "verify-virtual")
    )
    assert [line.partition(" cells")[0] for line in shown.splitlines()] == [
        line.partition(" cells")[0] for line in counted.splitlines()
    ]


def test_a_law_that_is_gone_is_a_line_less(monkeypatch: pytest.MonkeyPatch) -> None:
    real = families()
    fewer = real | {"hogwild": real["hogwild"][1:]}
    monkeypatch.setattr("tests.freezing.laws.families", lambda: fewer)
    finding = golden.check(PARTS["laws-virtual"], PARTS["laws-virtual"].make())
    assert finding.fails and f"-hogwild: {real['hogwild'][0].name} (" in finding.diff


def test_a_moved_point_a_wider_axis_and_another_colour_are_seen_in_a_picture(
    tmp_path: Path,
) -> None:
    def drawn(*, y: float = 2.0, color: str = "red", limit: float = 9.0) -> list[str]:
        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([1.0, 2.0], [1.0, y], color=color)
        axes.set_ylim(0, limit)
        with pages._pictures() as shown:
            figure.savefig(tmp_path / "one.pdf", format="pdf")
        return shown["one"]

    assert drawn() == drawn()
    assert (
        len(
            {
                tuple(shown)
                for shown in (drawn(), drawn(y=2.5), drawn(color="blue"), drawn(limit=8.0))
            }
        )
        == 4
    )


def test_a_part_that_cannot_be_made_fails_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = dataclasses.replace(PARTS["cells"], make=lambda: internal("plan.load"))
    monkeypatch.setattr(freeze, "PARTS", {"cells": moved, "schema": PARTS["schema"]})
    monkeypatch.setattr(
        "tests.freezing.doors.INTERNALS", {"plan.load": ("benchsuite.no_such:load",)}
    )
    monkeypatch.setattr(golden, "leftovers", lambda parts: [])
    assert freeze.main(["check"]) == 1
    said = capsys.readouterr().out
    assert (
        "cells: gives no answer: LookupError: plan.load stands in none of benchsuite.no_such:load"
        in said
    )
    assert "schema: equal" in said
