"""Which cells mean something: `validate` says what is wrong with a cell, with reason and remedy.

A refused cell is an answer (`unsupported`), never a crash. `validate` answers for a resolved cell
and for one that is not. What depends on the machine (devices, backends in the torch that is
installed) is `machine_problems`, for which somebody has to look at the machine first
(`measure/torch_build.py`).

A new rule is one file in this folder that defines RULES, functions from a `View` to `Problem`s, and
PLACE, a number: files with a small one are asked first, and the first reason is the first that a
user reads. What concerns one member only is no rule but a literal in the member's file
(`benchsuite/plan/declared.py`). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell
from benchsuite.plan.declared import LAST
from benchsuite.rules import setting
from benchsuite.rules.setting import Machine
from benchsuite.rules.view import Problem, Problems, View

__all__ = [
    "Machine",
    "Notice",
    "Problem",
    "law_problems",
    "machine_problems",
    "needs_machine",
    "noticed",
    "notices",
    "validate",
]

HERE = Path(__file__).resolve().parent
FOLDERS = (HERE,)  # where files of rules are looked for
Rule = Callable[[View], Problems]


def validate(cell: Cell) -> list[Problem]:
    """Every problem of a cell; [] = it is legal and this version can run it.

    All of them, not the first: a user puts right in one go what would otherwise take several tries.
    PluginError where a member's own file is wrong.
    """
    view = View(cell)
    return [problem for rule in found_in(FOLDERS) for problem in rule(view)]


@cache
def found_in(folders: tuple[Path, ...]) -> tuple[Rule, ...]:
    """The rules of every file of the folders that has RULES, by the file's PLACE, then its name."""
    modules: list[Any] = []
    for folder in folders:
        package = __name__ if folder == HERE else ""
        paths = sorted(folder.glob("[!_]*.py"))
        modules += [plugins.module_of(package, path) for path in paths if _has_rules(path)]
    # By name where two places are equal: folders list files in any order, and the first reason is
    # what reports show.
    modules.sort(key=lambda module: (getattr(module, "PLACE", LAST), module.__name__))
    return tuple(rule for module in modules for rule in module.RULES)


def _has_rules(path: Path) -> bool:
    """Whether the file defines RULES; the others of the folder are what rules stand on."""
    return "\nRULES" in path.read_text(encoding="utf-8")


def machine_problems(cell: Cell, machine: Machine) -> list[Problem]:
    """What this machine lacks for a legal cell."""
    return list(setting.machine(View(cell), machine))


def needs_machine(cell: Cell) -> bool:
    """Whether `machine_problems` can say anything: gloo on the CPU is everywhere."""
    return cell.device != "cpu" or cell.backend != "gloo"


def notices(cell: Cell) -> list[Problem]:
    """What runs, but does not mean what one may think: `plan`, `run` and the page say it."""
    view = View(cell)
    found = []
    if view.option("workload", "norm") == "batch" and cell.replicas > 1:
        found.append(
            Problem(
                "batch norm",
                f"BatchNorm over {cell.replicas} shards is not one large batch: each normalises by "
                "its own statistics",
                "use GroupNorm or LayerNorm for comparisons with one process",
            )
        )

    if cell.num_workers > 1:  # one worker is equal to one process whatever it draws
        found += _unequal(view)
    return found


def law_problems(cell: Cell) -> list[Problem]:
    """What an equality law refuses beyond `validate`.

    Dropout draws differ between shards, and bfloat16 rounds.
    """
    return [*validate(cell), *_unequal(View(cell))]


def _unequal(view: View) -> list[Problem]:
    """Why workers together are not equal to one process, as the equality laws say of the others."""
    found = []
    if dropout := view.number("workload", "dropout"):
        reason = f"dropout = {dropout:g}: shards draw other masks than one process"
        found.append(Problem("laws", reason, "set dropout = 0"))
    if view.cell.precision == "bf16":
        reason = "precision = bf16: equality is a law of float64, bfloat16 rounds to 2^-8"
        found.append(Problem("laws", reason, "set precision = fp64"))
    return found


@dataclass(frozen=True)
class Notice:
    """One of `notices` with all the cells that it is about (at least one), in their order."""

    problem: Problem
    cells: tuple[Cell, ...]

    @property
    def concerns(self) -> str:
        """The first cell, and how many more."""
        more = len(self.cells) - 1
        return self.cells[0].label + (f" and {more} more" if more else "")

    @property
    def text(self) -> str:
        """One line: reason, remedy, cells."""
        return f"{self.problem.reason}: {self.problem.remedy} ({self.concerns})"


def noticed(cells: Iterable[Cell]) -> list[Notice]:
    """The notices of several cells, each once."""
    concerned: dict[Problem, list[Cell]] = {}
    for cell in cells:
        for problem in notices(cell):
            concerned.setdefault(problem, []).append(cell)
    return [Notice(problem, tuple(several)) for problem, several in concerned.items()]
