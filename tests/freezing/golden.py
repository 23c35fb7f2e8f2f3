"""Frozen files: how they are written, and how today's answer is compared with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.freezing.doors import ROOT

HOUSE = ROOT / "tests" / "golden" / "house"
DIFFERENCES = "DIFFERENCES.md"
# `help.txt.after` beside `help.txt` is what the answer became; its reason stands in DIFFERENCES.md.
ACCEPTED = ".after"


@dataclass(frozen=True)
class Part:
    """One frozen answer."""

    name: str
    file: str  # under `HOUSE`
    make: Callable[[], str]
    cheap: bool = False  # a test makes it at every run
    slow: bool = False  # minutes: only made when it is asked for by name or by --all


@dataclass(frozen=True)
class Finding:
    """What became of one part."""

    part: str
    told: str  # one line
    diff: str = ""
    fails: bool = False


def check(part: Part, answer: str, folder: Path = HOUSE) -> Finding:
    """Compares an answer with what is frozen, or with what was accepted in its place."""
    frozen, accepted = folder / part.file, folder / f"{part.file}{ACCEPTED}"
    if not frozen.is_file():
        return Finding(
            part.name, f"{part.file} is not frozen: freeze.py write --only {part.name}", fails=True
        )
    wanted = accepted if accepted.is_file() else frozen
    diff = _diff(wanted.read_text(encoding="utf-8"), answer, wanted.name)
    if diff:
        return Finding(part.name, f"differs from {wanted.name}", diff, fails=True)
    if wanted is frozen:
        return Finding(part.name, "equal")
    if frozen.read_text(encoding="utf-8") == answer:
        return Finding(part.name, f"equal to {part.file} again: remove {accepted.name}", fails=True)
    if not reasons(folder).get(part.file):
        told = f"differs, and {DIFFERENCES} has no heading '## {part.file}' with a reason under it"
        return Finding(part.name, told, fails=True)
    return Finding(part.name, "differs as listed")


def write(part: Part, answer: str, folder: Path = HOUSE) -> str:
    """Freezes an answer; returns what was done.

    What is frozen is never overwritten: another answer is put beside it.
    """
    frozen, accepted = folder / part.file, folder / f"{part.file}{ACCEPTED}"
    frozen.parent.mkdir(parents=True, exist_ok=True)
    if not frozen.is_file():
        frozen.write_text(answer, encoding="utf-8")
        return f"{part.file} written"
    if frozen.read_text(encoding="utf-8") == answer:
        if accepted.is_file():
            accepted.unlink()
            return f"{accepted.name} removed: equal again"
        return f"{part.file} is equal"
    accepted.write_text(answer, encoding="utf-8")
    return f"{accepted.name} written: give its reason in {DIFFERENCES} under '## {part.file}'"


def reasons(folder: Path = HOUSE) -> dict[str, str]:
    """File of a part -> the text under its heading in the list of accepted differences."""
    path = folder / DIFFERENCES
    if not path.is_file():
        return {}
    sections = re.split(r"^## +", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    split = [section.partition("\n") for section in sections]
    return {title.strip(): text.strip() for title, _, text in split}


def leftovers(parts: Iterable[Part], folder: Path = HOUSE) -> list[Finding]:
    """Files that no part makes, and reasons for differences that are none."""
    files = {part.file for part in parts}
    known = files | {f"{name}{ACCEPTED}" for name in files} | {DIFFERENCES}
    found = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    odd = [
        Finding(name, "belongs to no part: remove it", fails=True)
        for name in found
        if name not in known
    ]
    for title in reasons(folder):
        if not (folder / f"{title}{ACCEPTED}").is_file():
            told = f"{DIFFERENCES} has a reason, but no {title}{ACCEPTED} is there: remove it"
            odd.append(Finding(title, told, fails=True))
    return odd


def _diff(wanted: str, answer: str, name: str) -> str:
    if wanted == answer:
        return ""
    lines = difflib.unified_diff(
        wanted.splitlines(keepends=True),
        answer.splitlines(keepends=True),
        f"frozen/{name}",
        "now",
        n=1,
    )
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
