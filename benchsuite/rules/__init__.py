"""Which cells mean something: the legality table of STRATEGIES.md section 2, members that come
later included.

`validate` answers for a resolved cell and for one that is not; a refused cell is an answer
(`unsupported`, with rule, reason and remedy), never a crash. What depends on the machine (devices,
backends in the torch that is installed) is `machine_problems`, for which somebody has to look at
the machine first (`measure/torch_build.py`). The rules stand in `rules_members.py` (what goes with
what), `rules_agents.py`, `rules_numbers.py`, `rules_parallel.py`, `rules_options.py`,
`rules_setting.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchsuite.plan.cell import Cell
from benchsuite.rules import agents, combinations, numbers, options, parallel, setting
from benchsuite.rules.setting import Machine
from benchsuite.rules.view import Problem, View

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

# "not built" comes last: the first reason a user reads is the one that no later version lifts.
_PLACES = (combinations, agents, numbers, parallel, options, setting)
RULES = tuple(rule for place in _PLACES for rule in place.RULES)


def validate(cell: Cell) -> list[Problem]:
    """Every problem of a cell; [] = it is legal and this version can run it."""
    view = View(cell)
    return [problem for rule in RULES for problem in rule(view)]


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
    """What an equality law refuses beyond `validate`: dropout draws differ between shards, bfloat16
    rounds."""
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
