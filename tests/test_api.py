"""`api.run` with cells: which runs are meant, and what is refused before anything is launched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchsuite.errors import UsageError
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.plan.plan import Plan
from benchsuite.running import api

REFUSED = Cell(sync="asynchronous", topology="ring", replicas=2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Calls `api.run` and returns the plan that it would have run."""
    monkeypatch.setattr(api, "run_plan", lambda plan, store, **kwargs: plan)
    return lambda *args, **kwargs: api.run(*args, results=tmp_path, **kwargs)


def pairs(plan: Plan) -> list[tuple[int, int]]:
    return [(cell.replicas, cell.seed) for cell in plan.runs()]


def test_cells_keep_their_own_seeds_and_are_run_once(asked: Any) -> None:
    one = Cell()
    two = Cell(replicas=2)
    assert pairs(asked([one.with_seed(0), one.with_seed(1)])) == [(1, 0), (1, 1)]
    assert pairs(asked([one.with_seed(0), two.with_seed(1), one.with_seed(0), resolve(one)])) == [
        (1, 0),
        (2, 1),
    ]
    assert pairs(asked([one.with_seed(5), two], seeds=[2, 3, 2])) == [
        (1, 2),
        (2, 2),
        (1, 3),
        (2, 3),
    ]
    assert pairs(asked(one, seeds=range(2))) == [(1, 0), (1, 1)]
    assert pairs(asked(asked([one.with_seed(0), two.with_seed(1)]), seeds=[7])) == [(1, 7), (2, 7)]
    refused = asked([REFUSED.with_seed(1), one, REFUSED.with_seed(1)]).refused_runs()
    assert [(cell.sync, cell.seed) for cell, _ in refused] == [("asynchronous", 1)]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"replicas": "2"}, "replicas takes an integer, not '2'"),
        ({"replicas": None}, "replicas takes an integer, not None"),
        ({"sync": 5}, "sync takes a name, not 5"),
        ({"link_mbit": float("nan")}, "link_mbit takes a number or none, not nan"),
        ({"straggler": {"first": 4.0}}, "straggler.first: the key is a worker's number"),
        ({"budget": {"samples": 64}}, "budget takes a Budget, not"),
        ({"budget": Budget(samples="64")}, "budget.samples takes an integer or none, not '64'"),  # type: ignore[arg-type]
        ({"options": {"cnn": 3}}, "options takes tables, not"),
        ({"seed": -1}, "give at least one integer from 0 to 2"),
        ({"seed": "0"}, "seed takes an integer, not '0'"),
    ],
)
def test_a_cell_with_a_value_of_another_type_is_refused(
    asked: Any, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        asked(Cell(**fields))
    assert says in str(refusal.value)


@pytest.mark.parametrize("seeds", [[-1], [], [1.5], ["a"]])
def test_wrong_seeds_are_refused_for_cells_and_plans(asked: Any, seeds: list[Any]) -> None:
    for what in (Cell(), [Cell()], asked(Cell())):
        with pytest.raises(UsageError, match="seeds"):
            asked(what, seeds=seeds)
    with pytest.raises(UsageError, match="a Cell is asked for, not 3"):
        asked([3])


def test_a_valid_cell_keeps_its_id(asked: Any) -> None:
    cell = Cell(
        topology="parameter_server",
        replicas=2,
        straggler={"0": 4},
        budget=Budget(steps=3, timeout_s=9),
    )
    (run,) = asked(cell).runs()
    assert run.id == resolve(cell).id


def test_the_packages_names_are_functions_whatever_was_imported_before() -> None:
    """A room of the package called `run` would take the function's place once it is imported."""
    program = (
        "import benchsuite, benchsuite.running.api, inspect\n"
        "from benchsuite import Cell, load_results, run\n"
        "assert benchsuite.run is run is benchsuite.running.api.run, benchsuite.run\n"
        "assert inspect.isfunction(run) and inspect.isfunction(load_results), (run, load_results)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
