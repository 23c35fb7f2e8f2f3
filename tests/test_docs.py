"""README.md and docs/: what they take from the project is up to date, and what they name exists."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import test_imports
from tests.bench import ROOT

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "results/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
)
ARTICLE = "《AI人工智能深度学习算法：智能深度学习代理的分布式与同步》"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is no package."""
    found = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# -- what is generated -----------------------------------------------------------------------------


def test_the_generated_parts_of_all_pages_are_up_to_date(generate: ModuleType) -> None:
    """Where this fails: `python docs/generate.py`, and look at the difference."""
    stale = generate.out_of_date(ROOT)
    differences = {
        page: generate.first_difference(text_of(page), text) for page, text in stale.items()
    }
    assert not stale, differences


def test_a_changed_number_of_the_results_is_reported(generate: ModuleType, tmp_path: Path) -> None:
    """Negative control, in both directions: the README's number, and the stored one."""
    page = {"README.md": {"results": generate.results_table}}
    (tmp_path / generate.RESULTS).parent.mkdir(parents=True)
    shutil.copy(ROOT / generate.RESULTS, tmp_path / generate.RESULTS)
    shutil.copy(ROOT / "README.md", tmp_path)

    def reported() -> str | None:
        text = (tmp_path / "README.md").read_text()
        new = generate.replaced(
            text, "README.md", "results", page["README.md"]["results"](tmp_path)
        )
        return None if new == text else generate.first_difference(text, new)

    assert reported() is None
    text = text_of("README.md")
    (tmp_path / "README.md").write_text(text.replace("| 9,514 |", "| 9,515 |", 1))
    found = reported()
    assert found is not None and "9,515" in found and "9,514" in found
    shutil.copy(ROOT / "README.md", tmp_path)
    rows = (ROOT / generate.RESULTS).read_text().replace(",15360,", ",15361,")
    (tmp_path / generate.RESULTS).write_text(rows)
    found = reported()
    assert found is not None and "15,361" in found


@pytest.mark.parametrize(("column", "value"), [("status", "failed"), ("dirty", "true")])
def test_runs_that_failed_or_of_a_changed_clone_make_no_table(
    column: str, value: str, generate: ModuleType, tmp_path: Path
) -> None:
    with open(ROOT / generate.RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0][column] = value
    (tmp_path / generate.RESULTS).parent.mkdir(parents=True)
    with open(tmp_path / generate.RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match=rows[0]["run_id"]):
        generate.results_table(tmp_path)


def test_a_seed_that_missed_stays_in_the_median(generate: ModuleType) -> None:
    def shown(*values: float) -> str:
        text: str = generate.censored(values, lambda value: f"{value:g}", "> 9")
        return text

    inf = float("inf")
    assert shown(3, 1, 2) == "2 [1 to 3]"
    assert shown(3, 1, inf) == "3 [1 to > 9 (1 of 3)]"
    assert shown(3, inf, inf) == "> 9 (2 of 3)"


def test_the_stored_runs_of_the_readme_are_those_of_its_plan_and_their_bytes_are_predicted(
    generate: ModuleType,
) -> None:
    """No cell has got another identity or other bytes since the table was made: else `make readme`."""
    with open(ROOT / generate.RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    document = generate.answer("plan", "readme")
    predicted = {cell["cell_id"]: cell["predicted_bytes"] for cell in document["cells"]}
    assert {row["cell_id"] for row in rows} == predicted.keys()
    assert {(row["cell_id"], int(row["seed"])) for row in rows} == {
        (cell_id, seed) for cell_id in predicted for seed in document["seeds"]
    }
    for row in rows:
        sent = (int(row["payload_bytes"]), int(row["predicted_bytes"]))
        # A worker of k_sync whose gradient comes late is answered once more: known only afterwards.
        if row["sync"] != "k_sync":
            assert sent == (predicted[row["cell_id"]],) * 2, row["cell_id"]


# -- what is written by hand -----------------------------------------------------------------------


def test_the_readme_fits_its_screen() -> None:
    assert len(text_of("README.md").splitlines()) <= 120


def test_the_article_is_named_once() -> None:
    assert {page: text_of(page).count(ARTICLE) for page in PAGES if ARTICLE in text_of(page)} == {
        "docs/concepts.md": 1
    }


def members(kind: str, generate: ModuleType) -> list[str]:
    return [member["name"] for member in generate.answer("list", kind)[kind]]


def rows_of(page: str) -> list[list[str]]:
    """The cells of every table row of a page."""
    lines = [line for line in text_of(page).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_rooms_are_listed_in_the_order_in_which_they_may_import() -> None:
    named = [
        Path(path).stem
        for row in rows_of("CONTRIBUTING.md")
        for path in re.findall(r"`((?:benchsuite/)?\w+(?:/|\.py))`", row[0])
    ]
    assert named == list(test_imports.ROOMS)


@pytest.mark.parametrize("kind", ["sync", "topology", "compression", "parallel"])
def test_every_member_has_a_row_among_the_strategies(kind: str, generate: ModuleType) -> None:
    named = [row[0].strip("`") for row in rows_of("docs/strategies.md") if len(row) >= 5]
    missing = [name for name in members(kind, generate) if name not in named]
    assert not missing, f"docs/strategies.md has no row for {missing}"


def test_every_workload_and_every_preset_is_described(generate: ModuleType) -> None:
    described = {
        word for row in rows_of("docs/workloads.md") for word in re.findall(r"`(\w+)`", row[0])
    }
    listed = generate.answer("list", "workload")["workload"]
    asked = {member["name"] for member in listed} | {p for m in listed for p in m["presets"]}
    assert asked <= described, asked - described


def test_every_column_is_defined_with_its_type(tmp_path: Path) -> None:
    from benchsuite import load_results

    frame = load_results(ROOT / "results" / "reference")
    defined = [
        row for row in rows_of("docs/results.md") if row[1] in ("str", "int", "float", "bool")
    ]
    assert [row[0].strip("`") for row in defined] == list(frame.columns)
    types = {"string": "str", "Int64": "int", "Float64": "float", "boolean": "bool"}
    assert [row[1] for row in defined] == [types[str(kind)] for kind in frame.dtypes]
    assert all(row[2].endswith((".", ".)")) for row in defined)


def test_every_plan_is_listed_with_its_question(generate: ModuleType) -> None:
    listed = {row[0].strip("`"): row[1] for row in rows_of("docs/results.md") if len(row) == 2}
    for plan in generate.answer("list", "report")["report"]:
        assert listed.get(f"reports/{plan['name']}.toml") == plan["summary"], plan["name"]


# -- links, paths, commands ------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links that lead nowhere: to no file, or to a heading that the page has not."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        path = folder / name if name else None
        if path is not None and not path.exists():
            broken.append(link)
            continue
        if anchor and anchor not in anchors(path.read_text() if path else text):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_resolves(page: str) -> None:
    assert not broken_links(text_of(page), (ROOT / page).parent)


def test_a_broken_link_or_anchor_is_seen() -> None:
    text = "# One\n[a](README.md) [b](missing.md) [c](#one) [d](#two) [e](https://x.y/z.md)"
    assert broken_links(text, ROOT) == ["missing.md", "#two"]


# Files that exist only after a command, or on somebody's disk.
MADE_LATER = ("results/gpu/", "reports/build/", "results/.frame-cache.json")


def missing_paths(text: str) -> list[str]:
    """Paths in backticks that start in a folder of the clone, and are not there."""
    folders = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "build")
    starts = tuple(f"{folder}/" for folder in folders)
    named = re.findall(r"`([^`\s]+)`", text)
    paths = [
        name for name in named if name.startswith(starts) and not re.search(r"[<>*{]|NAME", name)
    ]
    return [
        path for path in paths if not path.startswith(MADE_LATER) and not (ROOT / path).exists()
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_in_backticks_exists(page: str) -> None:
    assert not missing_paths(text_of(page))


def test_a_path_that_does_not_exist_is_seen() -> None:
    assert missing_paths(
        "`benchsuite/sync/ring.py` `benchsuite/sync/NAME.py` `docs/` `a/b.py`"
    ) == ["benchsuite/sync/ring.py"]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of a page's shell blocks."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def wrong_commands(text: str, parser: argparse.ArgumentParser, targets: set[str]) -> list[str]:
    """Commands of ours that the parser or the Makefile does not know."""
    wrong = []
    for words in commands(text):
        name, arguments = Path(words[0]).name, words[1:]
        if name == "make":
            asked = [word for word in arguments if "=" not in word and not word.startswith("-")]
            if not set(asked) <= targets:
                wrong.append(" ".join(words))
        if name == "benchsuite":
            try:
                parser.parse_args(arguments)
            except SystemExit:
                wrong.append(" ".join(words))
    return wrong


@pytest.fixture(scope="module")
def targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_known(page: str, generate: ModuleType, targets: set[str]) -> None:
    assert not wrong_commands(text_of(page), generate.parser_of_the_command_line(), targets)


def test_an_unknown_flag_verb_or_target_is_seen(generate: ModuleType, targets: set[str]) -> None:
    text = "```sh\nmake report\nmake nothing\nbenchsuite run quick --fast \\\n  1\nbenchsuite go # x\n```\n"
    wrong = wrong_commands(text, generate.parser_of_the_command_line(), targets)
    assert wrong == ["make nothing", "benchsuite run quick --fast 1", "benchsuite go"]


@pytest.mark.parametrize("page", ["README.md", "docs/virtual-clock.md", "docs/asv-and-ci.md"])
def test_no_run_that_a_page_asks_for_is_refused(page: str, generate: ModuleType) -> None:
    """Files of the reader's own are run by the tests below."""
    asked = [
        words[2:]
        for words in commands(text_of(page))
        if words[:2] == ["benchsuite", "run"] and not any("./" in word for word in words)
    ]
    assert asked
    for arguments in asked:
        flags = [word for word in arguments if word not in ("--results", "fresh")]
        document = generate.answer("plan", *flags)
        assert document["cells"] and not document["refused"], arguments


def test_a_refused_run_is_seen(generate: ModuleType) -> None:
    refused = ["--workload", "mlp", "--replicas", "64", "--clock", "virtual"]
    with pytest.raises(ValueError, match="ended with 2"):
        generate.answer("plan", *refused)


# -- code ------------------------------------------------------------------------------------------


def code_of(page: str, name: str) -> str:
    """The Python block of a page whose docstring begins with the file's name."""
    blocks: list[str] = re.findall(
        r"^```python\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL
    )
    (block,) = [block for block in blocks if block.startswith(f'"""{name}')]
    return block


def run(folder: Path, *arguments: str) -> Any:
    """What `benchsuite run ARGUMENTS` stored, run in the folder: the one run."""
    command = [sys.executable, "-m", "benchsuite", "run", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (path,) = json.loads(done.stdout)["files"]
    return json.loads((folder / path).read_text())


def runs_of(page: str, name: str) -> list[list[str]]:
    """The arguments of the `benchsuite run` lines of a page that use the file."""
    return [
        words[2:]
        for words in commands(text_of(page))
        if words[:2] == ["benchsuite", "run"] and f"./{name}" in words
    ]


@pytest.mark.procs
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("page", "name", "event"),
    [
        ("README.md", "my_idea.py", "synchronisations"),
        ("docs/strategies.md", "my_way.py", "means"),
    ],
)
def test_the_strategies_of_the_pages_run_in_both_worlds_and_send_what_they_predict(
    tmp_path: Path, page: str, name: str, event: str
) -> None:
    (tmp_path / name).write_text(code_of(page, name))
    lines = runs_of(page, name)
    assert len(lines) == 2
    for arguments in lines:
        made = run(tmp_path, *arguments, "--preset", "smoke")
        workers, steps = made["cell"]["replicas"], made["result"]["steps"]
        means = steps.bit_length()  # after 1, 2, 4, .. steps
        assert made["status"] == "ok" and made["result"]["events"][event] == [means] * workers
        sent = means * 2 * (workers - 1) * made["result"]["num_parameters"] * 4
        assert made["result"]["payload_bytes"] == made["result"]["predicted_bytes"] == sent


@pytest.mark.procs
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("page", "name"), [("README.md", "my_idea.py"), ("docs/strategies.md", "my_way.py")]
)
def test_the_strategies_of_the_pages_obey_the_laws_that_hold_for_every_strategy(
    tmp_path: Path, page: str, name: str
) -> None:
    (tmp_path / name).write_text(code_of(page, name))
    narrowed = ["--topology", "ring", "--replicas", "2", "--json"]
    command = [sys.executable, "-m", "benchsuite", "verify", "--sync", f"./{name}", *narrowed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["laws"], "no law was asked"


@pytest.mark.procs
@pytest.mark.timeout(200)
def test_the_workload_of_the_docs_runs_in_both_worlds_and_reaches_its_target(
    tmp_path: Path,
) -> None:
    (tmp_path / "my_net.py").write_text(code_of("docs/workloads.md", "my_net.py"))
    lines = runs_of("docs/workloads.md", "my_net.py")
    assert len(lines) == 2
    for arguments in lines:
        made = run(tmp_path, *arguments)
        assert made["status"] == "ok" and made["result"]["samples"] == 1600
        assert made["result"]["samples_to"]["target"] is not None
