"""The page of reports/parallel.toml: forms at equal ranks, bytes inside and between, memory that
cannot be told apart."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib import rc_context

from benchsuite import rules
from benchsuite.analysis.parallel import CODE_BYTES, loss_gaps
from benchsuite.analysis.select import select
from benchsuite.analysis.statistics import summarize
from benchsuite.plan.cell import Budget, Cell
from benchsuite.plan.plan import Plan, Refused
from benchsuite.report import kinds, page, spec
from benchsuite.report.drawing import style
from benchsuite.report.drawing.canvas import Drawing
from benchsuite.report.figures import parallel_costs
from benchsuite.report.material import Material
from benchsuite.report.tables.parallel_table import compared, label, tied
from benchsuite.report.words.answer import answer
from benchsuite.results import columns
from benchsuite.results.record import Run, Status
from benchsuite.rules import plans
from tests import synthetic_runs as made

GOLDEN = Path(__file__).parent / "golden"
PARALLEL = Path(__file__).parents[1] / "reports" / "parallel.toml"
SEEDS = (0, 1)
MIB = 2**20
P = made.PARAMETERS
VECTOR = made.VECTOR_BYTES
STEPS = made.SAMPLES // made.BATCH


def cell(
    parallel: str = "data",
    replicas: int = 1,
    parts: int = 1,
    topology: str = "native",
    **fields: Any,
) -> Cell:
    return Cell(
        workload=fields.pop("workload", "cnn"),
        preset="digits",
        parallel=parallel,
        replicas=replicas,
        model_parallel=parts,
        topology=topology,
        servers=1 if topology == "parameter_server" else 0,
        budget=Budget(samples=made.SAMPLES),
        **fields,
    )


def pipeline(schedule: str, m: int, parts: int = 2, **fields: Any) -> Cell:
    options = {"pipeline": {"schedule": schedule, "num_micro_batches": m, "num_chunks": 0}}
    return cell("pipeline", parts=parts, options=options, **fields)


def ran(
    of: Cell,
    seed: int,
    *,
    mib: float,
    held: Sequence[int] = (),
    inside: int = 0,
    between: int = 0,
    bubble: float | None = None,
) -> Run:
    """A run of a cell with so many MiB on its fullest rank and bytes per step; held: elements of
    each part."""
    run = made.make_run(of, seed)
    crowded = of.world_size > 2
    result = {
        **run.result,
        "payload_bytes": STEPS * (inside + between),
        "predicted_bytes": STEPS * (inside + between),
    }
    if held:
        facts = [
            {"balance": 0.9, "bubble_counted": bubble, "bubble_predicted": bubble} if bubble else {}
        ] * len(held)
        result["parallel"] = {
            "held": list(held),
            "owned": list(held),
            "facts": facts,
            "inside_bytes": STEPS * inside,
            "between_bytes": STEPS * between,
        }
    cost = {**run.cost, "peak_model_bytes": round((mib + 0.1 * seed) * MIB)}
    return dataclasses.replace(
        run, flags=("oversubscribed",) if crowded else (), result=result, cost=cost
    )


ONE = cell()
RING = cell(replicas=2, topology="ring")
GPIPE = pipeline("gpipe", 4)
ONE_F = pipeline("1f1b", 4)
EMPTY = pipeline("gpipe", 1)
TENSOR = cell("tensor", parts=2)
FSDP = cell("fsdp", parts=2)
RING_4 = cell(replicas=4, topology="ring")
PRODUCT = cell("fsdp", replicas=2, parts=2, topology="ring")
SERVED = cell("fsdp", replicas=2, parts=2, topology="parameter_server")
SELDOM = cell("fsdp", replicas=2, parts=2, topology="ring", sync="diloco")
LOST = cell("tensor", parts=4)
REFUSED = cell("tensor", replicas=2, parts=2, sync="asynchronous", topology="parameter_server")


def the_runs() -> list[Run]:
    half = [P // 2, P - P // 2]
    quarter = [P // 2] * 2
    runs = []
    for seed in SEEDS:
        runs += [
            ran(ONE, seed, mib=90),
            ran(RING, seed, mib=80, between=2 * VECTOR),
            ran(EMPTY, seed, mib=70, held=[P // 5, P - P // 5], inside=5_000, bubble=0.5),
            ran(GPIPE, seed, mib=60, held=[P // 5, P - P // 5], inside=5_000, bubble=0.2),
            ran(ONE_F, seed, mib=57, held=[P // 5, P - P // 5], inside=5_000, bubble=0.2),
            ran(TENSOR, seed, mib=40, held=half, inside=90_000),
            ran(FSDP, seed, mib=120, held=half, inside=4 * VECTOR),
            ran(RING_4, seed, mib=80, between=6 * VECTOR),
            ran(PRODUCT, seed, mib=78, held=quarter, inside=8 * VECTOR, between=2 * VECTOR),
            ran(SERVED, seed, mib=77, held=quarter, inside=8 * VECTOR, between=4 * VECTOR),
            ran(SELDOM, seed, mib=20, held=quarter, inside=8 * VECTOR, between=VECTOR // 4),
        ]
        lost = made.make_run(LOST, seed)
        runs.append(
            dataclasses.replace(
                lost,
                status=Status.FAILED,
                reason="rank 3 was killed",
                result={},
                cost={},
                raw={},
                flags=(),
            )
        )
    return runs


def refused() -> Refused:
    return Refused(
        REFUSED,
        (rules.Problem("parallel x sync", "they depend on each other", "set parallel = data"),),
    )


def material(runs: Sequence[Run]) -> Material:
    cells = list({run.cell_id: run.cell for run in runs}.values())
    chosen = select(cells, SEEDS, runs)
    return Material(cells, SEEDS, chosen, [made.ENVIRONMENT], refused=(refused(),))


def plan(runs: Sequence[Run], *entries: dict[str, Any]) -> Plan:
    return Plan(
        name="parallel",
        path=None,
        question="Which parallelism?",
        seeds=SEEDS,
        cells=tuple(material(runs).cells),
        refused=(refused(),),
        num_excluded=0,
        figures=entries,
        text="",
    )


def drawn(runs: Sequence[Run]) -> Drawing:
    (parsed,) = spec.parse([{"kind": "parallel_costs"}])
    with rc_context(style.theme()):
        (drawing,) = kinds.load(parsed.kind)(parsed, material(runs))
    return drawing


def printed(folder: Path, runs: Sequence[Run]) -> str:
    """The sentences and the table as they are printed."""
    page.render(
        plan(runs, {"kind": "parallel_table"}, {"kind": "parallel_costs"}),
        runs,
        folder,
        environments={made.ENVIRONMENT_ID: made.ENVIRONMENT},
    )
    said = "\n".join(f"{sentence.topic}: {sentence.text}" for sentence in answer(material(runs)))
    return f"{said}\n\n{(folder / 'tables' / 'parallel_table.md').read_text(encoding='utf-8')}"


def rows_of(text: str) -> dict[str, list[str]]:
    """Name in the first column -> the other columns."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    fields = [[field.strip() for field in line[2:-2].split(" | ")] for line in lines]
    return {f"{first} on {rest[0]}": rest for first, *rest in fields}


def test_the_answer_and_the_table_are_the_golden_ones(tmp_path: Path) -> None:
    assert printed(tmp_path, the_runs()) == (GOLDEN / "report_parallel.txt").read_text(
        encoding="utf-8"
    )


def test_all_that_whole_replicas_send_goes_between_them_and_the_two_sum_to_the_payload() -> None:
    table = compared(material(the_runs())).set_index("cell_id")
    for cell_id, row in table[table["n"] > 0].iterrows():
        inside = row["inside_bytes_per_step"].center
        between = row["between_bytes_per_step"].center
        total = row["payload_bytes_per_step"].center
        assert inside + between == total, f"{cell_id}: {inside} + {between} != {total}"
    assert table.loc[RING.id, "between_bytes_per_step"].center == 2 * VECTOR
    assert table.loc[RING.id, "inside_bytes_per_step"].center == 0
    assert table.loc[FSDP.id, "between_bytes_per_step"].center == 0


def test_forms_are_compared_by_ranks_never_by_the_number_of_their_replicas() -> None:
    table = compared(material(the_runs()))
    ranks = dict(zip(table["cell_id"], table["ranks"], strict=True))
    assert [ranks[each.id] for each in (ONE, RING, FSDP, RING_4, PRODUCT, SERVED)] == [
        1,
        2,
        2,
        4,
        4,
        4,
    ]
    texts = [f"{sentence.topic}: {sentence.text}" for sentence in answer(material(the_runs()))]
    assert not [text for text in texts if "worker" in text], (
        "sentences about workers take 2 x fsdp for two ranks"
    )


def test_memory_is_told_apart_only_beyond_ranges_and_beyond_what_code_may_take() -> None:
    small, near, far = (
        summarize([x, x + 1000.0]) for x in (1e7, 1e7 + CODE_BYTES, 1e7 + CODE_BYTES + 1001)
    )
    assert tied({"small": small, "near": near, "far": far}, "peak_model_bytes") == ["small", "near"]
    assert tied({"small": small, "near": near}, "payload_bytes_per_step") == ["small"], (
        "bytes are exact"
    )
    assert tied(
        {"a": summarize([1.0, 3.0]), "b": summarize([2.0, 4.0])}, "samples_per_s", least=False
    ) == ["b", "a"]


def test_the_answer_names_least_memory_fewest_bytes_and_the_bubble_with_their_numbers() -> None:
    said = {sentence.topic: sentence.text for sentence in answer(material(the_runs()))}
    assert (
        "Least memory per rank: tensor (cnn/digits on 2 ranks); too close to tell (cnn/digits on 4 ranks)"
        in said["Answer"]
    )
    assert (
        "Fewest bytes per step: pipeline (cnn/digits on 2 ranks); data (cnn/digits on 4 ranks)"
        in said["Answer"]
    )
    assert (
        "2 ranks, MiB per rank: tensor 40, pipeline 57, data 80, fsdp 120;" in said["cnn/digits"]
    ), said["cnn/digits"]
    assert "bytes per step: pipeline 5 kB, tensor 90 kB" in said["cnn/digits"], said["cnn/digits"]
    assert "2 × fsdp 77 ≈ data 80" in said["cnn/digits"], said["cnn/digits"]
    assert "without an ok run: tensor" in said["cnn/digits"]
    assert "2 stages: gpipe m=1 50 %, gpipe m=4 20 %, 1f1b m=4 20 %" in said["Bubble"]
    assert (
        "as the formula says in 3 of 3 cells" in said["Bubble"]
        and "72 % on 2 (0.90)" in said["Bubble"]
    )
    assert "25.4 kB for 203 kB (2 × fsdp, DiLoCo, ring)" in said["Between replicas"], said[
        "Between replicas"
    ]


def test_forms_that_drift_in_single_precision_are_told_by_their_first_step() -> None:
    runs = [ran(of, 0, mib=1) for of in (RING, TENSOR)]
    losses = ([2.0, 1.0, 0.5], [2.0 + 1e-7, 1.0, 0.4])
    runs = [
        dataclasses.replace(run, result={**run.result, "loss": loss})
        for run, loss in zip(runs, losses, strict=True)
    ]
    assert loss_gaps(runs) == pytest.approx((1e-7, 0.1))
    assert all(math.isnan(gap) for gap in loss_gaps(runs[:1])), "alone there is nothing to compare"
    other_seed = dataclasses.replace(runs[1], cell=runs[1].cell.with_seed(1))
    assert math.isnan(loss_gaps([runs[0], other_seed])[0])


def test_there_is_no_rate_where_ranks_share_cores_and_it_says_why(tmp_path: Path) -> None:
    rows = rows_of(printed(tmp_path, the_runs()))
    assert rows["data, ring on 4"][-3] == "– (4 ranks, 2 cores)", rows["data, ring on 4"]
    assert (
        rows["2 × fsdp, server on 4"][-3] == "– (5 ranks, 2 cores)"
        and "and 1 server" in rows["2 × fsdp, server on 4"][-1]
    )
    assert float(rows["fsdp on 2"][-3].split()[0].replace(",", "").strip("*")) > 0
    said = {sentence.topic: sentence.text for sentence in answer(material(the_runs()))}
    assert "on 2 ranks" in said["Throughput"] and "4 ranks" not in said["Throughput"], said[
        "Throughput"
    ]


def test_what_failed_and_what_a_rule_refuses_are_rows_with_their_words(tmp_path: Path) -> None:
    rows = rows_of(printed(tmp_path, the_runs()))
    assert rows["tensor on 4"][1] == "0" and rows["tensor on 4"][-1] == "2 failed"
    assert rows["2 × tensor, asynchronous, server on 4"][-1] == "unsupported: parallel x sync"
    assert set(rows["tensor on 4"][2:-1]) == {"–"}
    assert (
        "Not on the picture, without an ok run or its bytes: cnn/digits tensor on 4 ranks."
        in drawn(the_runs()).caption
    )
    page.render(plan(the_runs(), {"kind": "parallel_table"}), [], tmp_path)
    nothing = (tmp_path / "tables" / "parallel_table.md").read_text(encoding="utf-8")
    assert (
        "2 × tensor, asynchronous, server" in nothing
        and rows_of(nothing)["fsdp on 2"][-1] == "2 not run"
    )


def test_bold_is_only_what_does_as_one_process_would(tmp_path: Path) -> None:
    rows = rows_of(printed(tmp_path, the_runs()))
    assert rows["tensor on 2"][3].startswith("**40") and "**" not in rows["fsdp on 2"][3]
    assert "**" not in rows["2 × fsdp, DiLoCo, ring on 4"][3], "least memory, but another training"
    assert rows["pipeline gpipe m=1 on 2"][4] == rows["pipeline 1f1b m=4 on 2"][4] == "**5 kB**"


def test_the_front_has_who_keeps_clearly_less_than_all_that_send_less() -> None:
    table = compared(material(the_runs()))
    two, four = (table[(table["ranks"] == ranks) & (table["n"] > 0)] for ranks in (2, 4))
    assert parallel_costs.front(two) == [[ONE_F.id, GPIPE.id], [TENSOR.id]], (
        "gpipe is 3 MiB above 1f1b: may be code"
    )
    assert parallel_costs.front(four) == [[RING_4.id]], (
        "3 MiB less may be code, and DiLoCo trains another way"
    )


def test_a_panel_per_workload_and_number_of_ranks_with_marks_at_the_medians() -> None:
    drawing = drawn(the_runs())
    two, four = drawing.figure.axes
    assert (two.get_title(loc="left"), four.get_title(loc="left")) == (
        "cnn/digits, 2 ranks",
        "cnn/digits, 4 ranks",
    )
    marks = {
        (line.get_gid(), round(float(line.get_xdata()[0])), round(float(line.get_ydata()[0]), 2))
        for line in two.get_lines()
        if line.get_gid() not in (None, "one rank")
    }
    assert (
        ("tensor", 90_000, 40.05) in marks
        and ("data", 2 * VECTOR, 80.05) in marks
        and len(marks) == 6
    ), marks
    alone = [line for line in two.get_lines() if line.get_gid() == "one rank"]
    assert [round(float(line.get_ydata()[0]), 2) for line in alone] == [90.05]
    assert [t.get_text() for t in two.texts if t.get_text().startswith(("1:", "2:"))] == [
        "1:  pipeline 1f1b m=4 (and 1 other alike)",
        "2:  tensor",
    ]
    assert (
        two.get_ylim() == four.get_ylim()
        and two.get_xlim() == four.get_xlim()
        and two.get_ylim()[0] == 0
    )


def test_on_a_phone_every_panel_stands_alone(tmp_path: Path) -> None:
    runs = the_runs()
    text = page.render(plan(runs, {"kind": "parallel_costs"}), runs, tmp_path).read_text(
        encoding="utf-8"
    )
    panels = text[text.index('<div class="panels"') :]
    assert len(re.findall(r'<div style="width:min', panels)) == 2
    assert "cnn/digits under" in text and "on 1, 2, 4 ranks" in text


def test_payload_that_is_not_what_was_predicted_is_shouted_first(tmp_path: Path) -> None:
    runs = the_runs()
    place = next(i for i, run in enumerate(runs) if run.cell_id == RING.id)
    result = {**runs[place].result, "payload_bytes": runs[place].result["payload_bytes"] + 1}
    runs[place] = dataclasses.replace(runs[place], result=result)
    assert answer(material(runs))[0].topic == "BROKEN LAW"
    rows = rows_of(printed(tmp_path, runs))
    assert rows["data, ring on 2"][-1] == "PAYLOAD DIFFERS FROM PREDICTION"
    assert not [each for each in answer(material(runs)) if "equals its prediction" in each.text]


def test_a_row_of_the_csv_has_the_fullest_part_and_the_pipeline_s_shares() -> None:
    run = ran(GPIPE, 0, mib=60, held=[P // 5, P - P // 5], inside=5_000, between=0, bubble=0.2)
    row = columns.row(run)
    assert (row["held_parameters"], row["num_parameters"]) == (P - P // 5, P)
    assert (row["inside_bytes"], row["between_bytes"]) == (STEPS * 5_000, 0)
    assert (row["inside_bytes_per_step"], row["between_bytes_per_step"]) == (5_000, 0)
    assert (row["bubble_slots"], row["bubble_predicted"], row["balance"]) == (0.2, 0.2, 0.9)
    plain = columns.row(made.make_run(RING, 0))
    assert (
        plain["held_parameters"] == P
        and plain["inside_bytes"] is None
        and plain["bubble_slots"] is None
    )


def test_names_say_replicas_form_options_sync_and_topology() -> None:
    two_chunks = pipeline("interleaved", 4)
    assert label(two_chunks) == "pipeline interleaved m=4 V=2"
    assert (
        label(SELDOM) == "2 × fsdp, DiLoCo, ring"
        and label(ONE) == "one rank"
        and label(SERVED) == "2 × fsdp, server"
    )
    assert label(TENSOR, "sequence_parallel=true") == "tensor sequence_parallel=true"
    assert label(GPIPE, "num_micro_batches=4 schedule=gpipe") == "pipeline gpipe m=4"


def test_kinds_of_model_parallel_replicas_are_left_out_where_a_plan_has_none() -> None:
    listed = {entry.kind for entry in spec.parse([], [RING])}
    assert not listed & {"parallel_costs", "parallel_table"}
    assert {"parallel_costs", "parallel_table"} <= {
        entry.kind for entry in spec.parse([], [RING, FSDP])
    }


@pytest.fixture(scope="module")
def shipped() -> Plan:
    return plans.load(PARALLEL)


def test_every_workload_meets_every_form_on_two_and_four_ranks_or_is_refused_by_a_rule(
    shipped: Plan,
) -> None:
    found: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for each in (*shipped.cells, *(one.cell for one in shipped.refused)):
        found.setdefault((each.workload, each.preset), set()).add((each.parallel, each.num_workers))
    wanted = {(form, ranks) for form in ("data", "pipeline", "tensor", "fsdp") for ranks in (2, 4)}
    assert len(found) == 5 and all(wanted <= forms for forms in found.values()), found


def test_what_is_compared_uses_equal_samples(shipped: Plan) -> None:
    for workload, preset in {(each.workload, each.preset) for each in shipped.cells}:
        mine = [
            each for each in shipped.cells if (each.workload, each.preset) == (workload, preset)
        ]
        assert len({each.budget.samples for each in mine}) == 1, (workload, preset)


def test_the_plan_s_refusals_are_refused_by_these_rules(shipped: Plan) -> None:
    reasons = {(each.cell.sync, each.problems[0].rule) for each in shipped.refused}
    assert reasons == {
        ("asynchronous", "parallel x sync"),
        ("stale_synchronous", "parallel x sync"),
        ("gossip", "parallel x sync"),
        ("synchronous", "compression x parallel"),
        ("synchronous", "stages"),
    }


def test_names_longer_than_half_a_page_leave_room_for_the_bars(tmp_path: Path) -> None:
    """They once took more than the width there is, and matplotlib refused axes of less than none."""
    runs = the_runs()
    page.render(plan(runs, {"kind": "traffic"}), runs, tmp_path)
    assert (tmp_path / "figures" / "traffic.svg").is_file()
