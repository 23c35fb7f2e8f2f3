"""A kind of figure is one file: it is found, checked, drawn, and it may be a user's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchsuite.errors import UsageError
from benchsuite.plan.plan import Plan
from benchsuite.report import kinds, page, spec
from tests import synthetic_runs as made
from tests.user_files import user_file

MINE = user_file("my_ends")


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "my_ends.py"
    path.write_text(MINE, encoding="utf-8")
    return str(path)


def _plan(*figures: dict[str, Any]) -> Plan:
    return Plan("mine", None, "Mine?", (0,), tuple(made.quick_cells()), (), 0, figures, "")


def test_a_file_of_one_s_own_is_drawn_on_the_page_under_its_own_title(
    mine: str, tmp_path: Path
) -> None:
    entry = {"kind": mine, "where": {"sync": "synchronous"}, "order": "value"}
    out = tmp_path / "page"
    html = page.render(_plan(entry), made.quick_runs((0,)), out).read_text(encoding="utf-8")
    assert ">How does every run end?</h2>" in html
    assert {path.name for path in (out / "figures").iterdir()} == {
        "my_ends.pdf",
        "my_ends.png",
        "my_ends.svg",
    }
    assert "my dots" in (out / "figures" / "my_ends.svg").read_text(encoding="utf-8")
    cells = {run.cell_id for run in made.quick_runs((0,)) if run.cell.sync == "synchronous"}
    assert f"Figure 1. {len(cells)} runs." in html


def test_a_kind_of_one_s_own_is_an_equal_of_those_that_ship(mine: str) -> None:
    (entry,) = spec.parse([{"kind": mine}])
    assert (entry.name, entry.title) == ("my_ends", "How does every run end?")
    assert entry.values == {"order": ("seed", "value")}
    with pytest.raises(UsageError, match="unknown order 'sed' .*did you mean 'seed'"):
        spec.parse([{"kind": mine, "order": "sed"}])
    with pytest.raises(UsageError, match="unknown key 'ordr' .*did you mean 'order'"):
        spec.parse([{"kind": mine, "ordr": "seed"}])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('title="How does every run end?", ', "", "needs a title"),
        ('clock="wall"', 'clock="wal"', "unknown clock 'wal'; did you mean 'wall'"),
        ('clock="wall"', 'klock="wall"', "unknown argument 'klock' of Kind; did you mean 'clock'"),
        ('clock="wall"', "clock=str()", r"clock needs a literal, not str\(\)"),
        ("def draw", "def paint", "defines neither draw nor tabulate"),
        ("KIND = ", "KIN = ", "declares no figure kind"),
        ("def draw(spec, material):", "def draw(spec, material:", "line 9: "),
    ],
)
def test_a_file_that_is_no_kind_is_refused_with_what_it_lacks(
    mine: str, old: str, new: str, said: str
) -> None:
    assert old in MINE
    Path(mine).write_text(MINE.replace(old, new), encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        spec.parse([{"kind": mine}])


def test_the_figure_of_the_documentation_is_drawn(tmp_path: Path) -> None:
    pages = (Path(__file__).resolve().parent.parent / "docs" / "results.md").read_text("utf-8")
    (code,) = [
        block.partition("```")[0]
        for block in pages.split("```python\n")[1:]
        if "KIND = Kind" in block
    ]
    (tmp_path / "my_ends.py").write_text(code, encoding="utf-8")
    plan = _plan({"kind": str(tmp_path / "my_ends.py")})
    html = page.render(plan, made.quick_runs((0,)), tmp_path / "page").read_text(encoding="utf-8")
    assert ">How does every run end?</h2>" in html and "Figure 1. Final metric of " in html


def test_a_path_without_a_file_is_refused_with_the_kinds_there_are() -> None:
    with pytest.raises(UsageError, match="no such file; .*staleness"):
        spec.parse([{"kind": "./nowhere.py"}])


def test_every_file_of_the_two_folders_is_a_kind_with_a_place_of_its_own() -> None:
    declared = {name: kinds.find(name) for name in kinds.names()}
    places = [each.kind.place for each in declared.values() if each.kind.place is not None]
    assert len(places) == len(set(places)) == len(declared) - 1  # seeds is drawn on demand only
    titles = [each.kind.title for each in declared.values()]
    assert len(titles) == len(set(titles))
    for name, each in declared.items():
        assert callable(kinds.load(name))
        assert each.is_table == (each.path.parent.name == "tables")


def test_a_plan_s_figures_are_checked_without_matplotlib_and_pandas() -> None:
    code = (
        "import sys; from benchsuite.report import kinds, spec; spec.parse([]); "
        "spec.parse([{'kind': name} for name in kinds.names()]); "
        "print(sorted({'matplotlib', 'pandas', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
