"""How the repository is written: what can be counted of its sentences and of its code.

Each count is a function of text, and each is shown to see a made-up offender.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bench import ROOT

CODE = sorted([*(ROOT / "benchsuite").rglob("*.py"), *(ROOT / "workloads").rglob("*.py")])
LINE_LENGTH = 100
FUNCTION_LINES = 60
STATEMENTS_PER_100_LINES = 50.0

# A document's name stands in capitals, before its suffix or before the number of a section.
DOCUMENT = re.compile(r"(?<![./\w-])([A-Z][A-Z_]{3,})(?:\.md\b| sections? \d)")
SKIP = re.compile(r"# fmt: (?:skip|off)(.*)")
# What a checker reads at the end of a line does not count towards its length.
PRAGMA = re.compile(r"\s*# (?:type: ignore|noqa).*")


def tracked() -> list[Path]:
    """Every text file of the clone, but the frozen answers of the tests and stored runs."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git clone")
    paths = [Path(line) for line in listed.stdout.splitlines()]
    kept = (path for path in paths if path.parts[:2] != ("tests", "golden"))
    kinds = (".py", ".md", ".toml", ".html", ".css", ".js", ".txt", ".yml", ".json", "")
    return [ROOT / path for path in kept if path.suffix in kinds and (ROOT / path).is_file()]


def documents() -> set[str]:
    """The documents in capitals that the repository has."""
    inside = [*ROOT.glob("*.md"), *(ROOT / "tests").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return {path.stem for path in inside}


def foreign_documents(text: str) -> list[str]:
    """Documents that a text refers to and that the repository has not."""
    return [name for name in DOCUMENT.findall(text) if name not in documents()]


def unexplained_skips(text: str) -> list[str]:
    """Lines on which the formatter is switched off without a reason behind it."""
    return [found.group(0) for found in SKIP.finditer(text) if not found.group(1).strip(" #")]


def long_lines(text: str) -> list[str]:
    """Lines over the limit, without what a checker reads at their ends."""
    return [line for line in text.splitlines() if len(PRAGMA.sub("", line)) > LINE_LENGTH]


def long_functions(text: str) -> list[str]:
    """`name: lines` of every function that has too many, docstring included."""
    return [
        f"{node.name}: {lines_of(node)}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and lines_of(node) >= FUNCTION_LINES
    ]


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def statements_and_lines(text: str) -> tuple[int, int]:
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(text)))
    return statements, len(text.splitlines())


def per_100_lines(texts: Iterator[str]) -> float:
    counts = [statements_and_lines(text) for text in texts]
    return 100 * sum(count[0] for count in counts) / sum(count[1] for count in counts)


def offenders(paths: list[Path], count: Callable[[str], list[str]]) -> dict[str, list[str]]:
    """File -> what a count finds in it, where it finds something."""
    found = {path: count(path.read_text(encoding="utf-8")) for path in paths}
    return {str(path.relative_to(ROOT)): each for path, each in found.items() if each}


def test_no_sentence_refers_to_a_document_outside_the_repository() -> None:
    assert len(tracked()) > len(CODE)
    assert offenders(tracked(), foreign_documents) == {}


def test_the_formatter_is_switched_off_with_a_reason_only() -> None:
    assert offenders(tracked(), unexplained_skips) == {}


def test_no_line_of_the_package_is_over_100_characters() -> None:
    assert offenders(CODE, long_lines) == {}


def test_functions_of_the_package_are_under_60_lines() -> None:
    assert offenders(CODE, long_functions) == {}


def test_the_package_has_fewer_than_50_statements_in_100_lines() -> None:
    counted = per_100_lines(path.read_text(encoding="utf-8") for path in CODE)
    assert counted < STATEMENTS_PER_100_LINES, f"{counted:.1f} in 100 lines"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("as STRATEGIES" + ".md says (section 7)", ["STRATEGIES"]),
        ("within 2 %, MADE_UP" + " section 3", ["MADE_UP"]),
        ("see CONTRIBUTING.md and docs/concepts.md", []),
        ("tables/TABLE.md", []),
    ],
)
def test_a_made_up_document_is_seen(text: str, found: list[str]) -> None:
    assert foreign_documents(text) == found


def test_a_made_up_offender_of_each_count_is_seen() -> None:
    bare = "x = (1,  2)  # fmt: " + "skip\n"
    assert unexplained_skips(bare) == [bare.split("  ", 2)[2].rstrip()]
    assert unexplained_skips("x = (1,  2)  # fmt: skip  # a table\n") == []
    wide = "x = '" + "a" * 96 + "'"
    assert long_lines(wide) == [wide] and not long_lines(wide.replace("a", "", 2))
    assert not long_lines("x = 1  # type: ignore[assignment]  # " + "because " * 12)
    body = "    x = 1\n"
    assert long_functions("def f():\n" + 59 * body) == ["f: 60"]
    assert long_functions("def f():\n" + 58 * body) == []
    dense = "if a: b = 1; c = 2\n"
    assert per_100_lines(iter([dense, "\n" * 2])) == 100.0
