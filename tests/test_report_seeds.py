"""The page of reports/seeds.toml: shares of seeds with their bounds, and when the seeds arrive."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchsuite import rules
from benchsuite.analysis.select import select
from benchsuite.plan.cell import Budget, Cell
from benchsuite.plan.plan import Plan
from benchsuite.report import page, spec
from benchsuite.report.material import Material
from benchsuite.report.tables import seeds
from benchsuite.report.words.answer import answer
from benchsuite.results.record import Run
from benchsuite.rules import plans
from tests import synthetic_runs as made

ROOT = Path(__file__).parents[1]
ONE = Cell(workload="cnn", preset="digits", budget=Budget(samples=made.SAMPLES))
TWO = dataclasses.replace(ONE, replicas=2)
SEEDS = tuple(range(60))


def arriving(seed: int, of: Cell = ONE) -> Run:
    """Seed k arrives after 1,000 + 10 k samples; 0 to 2 miss, and 0 to 4 miss `hard`."""
    run = made.make_run(of, seed)
    at = 1000 + 10 * seed
    reached = {
        "easy": at,
        "target": at if seed > 2 else None,
        "hard": at + 500 if seed > 4 else None,
    }
    return dataclasses.replace(run, result={**run.result, "samples_to": reached})


def material(runs: list[Run]) -> Material:
    cells = list({run.cell_id: run.cell for run in runs}.values())
    return Material(cells, SEEDS, select(cells, SEEDS, runs), [made.ENVIRONMENT])


@pytest.fixture(scope="module")
def of_60() -> Material:
    return material([arriving(seed) for seed in SEEDS])


def entry() -> spec.FigureSpec:
    (parsed,) = spec.parse([{"kind": "seeds"}])
    return parsed


def test_the_table_says_how_many_arrived_and_what_that_bounds(of_60: Material) -> None:
    table = seeds.tabulate(entry(), of_60)
    row = dict(zip((heading for heading, _ in table.headings), table.rows[0], strict=True))
    assert row["n"].text == "60"
    assert row["reached easy"].plain == "60 of 60 [≥ 95.1 %]"
    assert row["reached target"].plain == "57 of 60 [≥ 87.5 %]"
    assert row["reached hard"].plain == "55 of 60 [≥ 83.2 %]"
    # misses count as the latest: of 60 the 15th is seed 17, the 45th seed 47, the two middle ones
    # seeds 32 and 33
    assert row["middle half"].text == "1,170–1,470"
    assert row["range"].text == "1,030–> budget"
    assert float(str(row["samples to target"].sort)) == 1325
    numbers = table.numbers.iloc[0]
    assert numbers["reached_target"] == 57 and numbers["share_target_low"] == pytest.approx(
        0.876, abs=1e-3
    )
    assert (numbers["samples_to_hard_q1"], numbers["samples_to_hard_q3"]) == (1690, 1990)


def test_the_answer_of_a_plan_of_single_processes_is_a_sentence_per_workload(
    of_60: Material,
) -> None:
    (sentence,) = [each for each in answer(of_60) if "seeds" in each.topic]
    assert sentence.topic == "cnn/digits: 57 of 60 seeds"
    assert (
        "97.5 %" in sentence.text and "(95 %; at least 87.5 % at 95 % confidence)" in sentence.text
    )
    assert (
        "1,325 samples in the median, 1,170 to 1,470 in the middle half of them, 1,030 to > budget in all"
        in sentence.text
    )
    assert not [each for each in answer(of_60) if each.topic == "Throughput"], "nothing is compared"
    both = material([arriving(seed, of) for seed in SEEDS[:3] for of in (ONE, TWO)])
    assert not [each for each in answer(both) if "seeds" in each.topic]


def test_the_page_is_made_of_few_seeds_and_of_none(tmp_path: Path) -> None:
    figures = (
        {"kind": "seeds"},
        {"kind": "metric_against", "x": ["samples"], "y": ["metric"]},
        {"kind": "table"},
    )
    plan = Plan("seeds", None, "How surely?", (0, 3, 4), (ONE,), (), 0, figures, "")
    for runs in ([arriving(seed) for seed in (0, 3, 4)], []):
        page.render(plan, runs, tmp_path, environments={made.ENVIRONMENT_ID: made.ENVIRONMENT})
        text = (tmp_path / "index.html").read_text()
        assert "by 1 worker," in text
        assert ("2 of 3" in text) == bool(runs)
        assert (tmp_path / "tables" / "seeds.csv").is_file() and (
            tmp_path / "tables" / "seeds.tex"
        ).is_file()


def test_the_plan_asks_for_60_seeds_of_every_default_workload_in_one_process() -> None:
    plan = plans.load(ROOT / "reports" / "seeds.toml")
    assert plan.seeds == SEEDS and not plan.refused
    assert [(cell.workload, cell.preset) for cell in plan.cells] == [
        ("cnn", "digits"),
        ("transformer", "markov"),
        ("rl_agent", "cartpole"),
    ]
    for cell in plan.cells:
        assert cell.world_size == 1 and rules.validate(cell) == []
    assert {each.kind for each in spec.parse(plan.figures, plan.cells)} == {
        "seeds",
        "metric_against",
        "table",
    }


def test_a_plan_without_figures_has_no_table_of_seeds() -> None:
    assert "seeds" not in {each.kind for each in spec.parse([], [ONE])}
