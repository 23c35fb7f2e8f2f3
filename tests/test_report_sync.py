"""The page of reports/sync.toml: time, samples and bytes to a target by straggler, misses, the
front, both tunings."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from benchsuite.analysis import cells as naming
from benchsuite.analysis.arrival import arrivals, front
from benchsuite.analysis.select import select
from benchsuite.plan.cell import Budget, Cell
from benchsuite.plan.plan import Plan
from benchsuite.report import kinds, page, spec
from benchsuite.report.drawing import style
from benchsuite.report.drawing.canvas import Drawing
from benchsuite.report.material import Material
from benchsuite.report.words.answer import answer
from benchsuite.results.record import Run
from benchsuite.rules import plans
from tests import synthetic_runs as made

GOLDEN = Path(__file__).parent / "golden"
SYNC = Path(__file__).parents[1] / "reports" / "sync.toml"
SEEDS = (0, 1, 2)
MISS = math.inf
MB = 10**6
FOUR = {"0": 4.0}
TIMES = {"kind": "gamma", "mean_s": 0.001, "cv": 0.1}
Row = tuple[
    str, str, str, Sequence[float], int
]  # sync, topology, compression, seconds to target by seed, MB to target

PLAIN: tuple[Row, ...] = (
    ("synchronous", "ring", "none", (1.0, 1.1, 1.2), 100),
    ("synchronous", "native", "topk", (1.5, 1.6, 1.7), 5),
    ("local_sgd", "native", "none", (0.5, 0.55, 0.6), 12),
    ("asynchronous", "parameter_server", "none", (0.8, 0.9, MISS), 200),
    ("hogwild", "native", "none", (0.4, 0.4, 0.5), 0),
)
SLOWED: tuple[Row, ...] = (
    ("synchronous", "ring", "none", (2.0, 2.2, 2.4), 100),
    ("synchronous", "native", "topk", (3.0, 3.1, 3.2), 5),
    ("local_sgd", "native", "none", (2.5, 2.6, 2.7), 12),
    ("asynchronous", "parameter_server", "none", (0.95, MISS, MISS), 200),
    ("hogwild", "native", "none", (0.4, 0.45, 0.5), 0),
)
TUNED: tuple[tuple[Row, float], ...] = (
    (("asynchronous", "parameter_server", "none", (0.6, 0.6, 0.7), 150), 0.25),
    (("local_sgd", "native", "none", (0.5, 0.5, 0.6), 11), 1.0),
)


def cell(sync: str, topology: str, compression: str, **fields: Any) -> Cell:
    given: dict[str, Any] = {
        "replicas": 8,
        "clock": "virtual",
        "compute_time": TIMES,
        "link_mbit": 1000.0,
        "link_latency_us": 50.0,
    }
    return Cell(
        workload="cnn",
        preset="digits",
        sync=sync,
        topology=topology,
        compression=compression,
        budget=Budget(samples=made.SAMPLES),
        **(given | fields),
    )


def arriving(
    of: Cell, seed: int, seconds: float, megabytes: int, factor: float | None = None
) -> Run:
    """A run that reached its target after `seconds` of its clock, or missed it."""
    run = made.make_run(of, seed)
    missed = math.isinf(seconds)
    to = {
        "time_to": None if missed else seconds,
        "samples_to": None if missed else 320 * round(10 * seconds),
        "bytes_to": None if missed else megabytes * (MB + seed * MB // 10),
    }
    goals = {key: dict.fromkeys(("easy", "target", "hard"), value) for key, value in to.items()}
    result = {**run.result, "samples_to": goals["samples_to"]}
    if factor is not None:
        trials = [{"lr_factor": each, "status": "ok"} for each in (0.25, 0.5, 1.0, 2.0, 4.0)]
        result["tuning"] = {"lr_factor": factor, "trials": trials}
    if not megabytes:
        result |= {"predicted_bytes": 0, "payload_bytes": 0, "payload_source": "counted"}
    cost = {**run.cost, "time_to": goals["time_to"], "bytes_to": goals["bytes_to"]}
    if of.clock == "virtual":
        cost |= {"provenance": "virtual", "virtual_s": 5.0}
    return dataclasses.replace(
        run, flags=() if of.clock == "virtual" else run.flags, result=result, cost=cost
    )


def the_runs() -> list[Run]:
    runs = []
    for rows, straggler in ((PLAIN, {}), (SLOWED, FOUR)):
        for sync, topology, compression, times, amount in rows:
            of = cell(sync, topology, compression, straggler=straggler)
            runs += [
                arriving(of, seed, time, amount) for seed, time in zip(SEEDS, times, strict=True)
            ]
    for (sync, topology, compression, times, amount), factor in TUNED:
        of = cell(sync, topology, compression, tuning="per_strategy")
        runs += [
            arriving(of, seed, time, amount, factor)
            for seed, time in zip(SEEDS, times, strict=True)
        ]
    return runs


def measured() -> list[Run]:
    """The anchor: two workers of the wall clock; with a server they are more ranks than cores."""
    plain: dict[str, Any] = {
        "replicas": 2,
        "clock": "wall",
        "compute_time": None,
        "link_mbit": None,
    }
    ring, server = (
        cell("synchronous", t, "none", **plain, link_latency_us=None)
        for t in ("ring", "parameter_server")
    )
    return [arriving(of, seed, 3.0 + seed, 40) for of in (ring, server) for seed in SEEDS]


def material(runs: Sequence[Run]) -> Material:
    cells = list({run.cell_id: run.cell for run in runs}.values())
    return Material(cells, SEEDS, select(cells, SEEDS, runs), [made.ENVIRONMENT])


def drawn(entry: dict[str, Any], runs: Sequence[Run]) -> Drawing:
    (parsed,) = spec.parse([entry])
    with rc_context(style.theme()):
        (drawing,) = kinds.load(parsed.kind)(parsed, material(runs).seen_by(parsed))
    return drawing


SAME = {"tuning": "same"}
TO_TARGET = {"kind": "virtual_to_target", "where": SAME}
PARETO = {"kind": "virtual_pareto", "where": SAME}


def marks(drawing: Drawing, axes: int, gid: str) -> list[tuple[float, float]]:
    """(x, y) of the marks of one kind on one axes, lowest x first."""
    lines = [line for line in drawing.figure.axes[axes].get_lines() if line.get_gid() == gid]
    return sorted((float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines)


def test_the_front_is_whom_nobody_beats_on_both() -> None:
    points = {
        "fast": (1.0, 10.0),
        "as fast": (1.0, 10.0),
        "between": (2.0, 5.0),
        "slower than between": (3.0, 5.0),
        "dearer than between": (2.0, 6.0),
        "frugal": (9.0, 1.0),
        "beaten": (10.0, 20.0),
        "missed": (MISS, 0.5),
        "silent": (MISS, MISS),
    }
    assert front(points) == ["fast", "as fast", "between", "frugal"]
    assert front({}) == [] and front({"alone": (3.0, 4.0)}) == ["alone"]


def test_a_miss_is_infinite_in_every_quantity_and_stays_in_the_median() -> None:
    of = material(the_runs()).in_virtual_time
    table = arrivals(of.runs, of.names).set_index(["series", "straggler"])
    slowed = table.loc["asynchronous/parameter_server", "worker 0: 4x"]
    for quantity in ("seconds", "samples", "bytes"):
        assert math.isinf(slowed[quantity].center) and slowed[quantity].misses == 2, quantity
    assert table.loc["asynchronous/parameter_server", ""]["seconds"].center == 0.9
    assert slowed["slowdown"] == 4 and table.loc["hogwild/native", ""]["slowdown"] == 1
    tuned = table.loc["asynchronous/parameter_server tuned", ""]
    assert tuned["base"] == "asynchronous/parameter_server" and tuned["lr_factors"] == (0.25,)


def test_marks_stand_at_the_medians_of_their_row_and_lines_span_the_range() -> None:
    drawing = drawn(TO_TARGET, the_runs())
    seconds = marks(drawing, 0, "filled")
    assert [x for x, _ in seconds] == sorted([1.1, 1.6, 0.55, 0.9, 0.4, 2.2, 3.1, 2.6, 0.45])
    rows = [text.get_text() for text in drawing.figure.axes[0].get_yticklabels()]
    assert rows == ["sync ring", "sync native top-k", "local SGD", "async", "hogwild"]
    assert {round(y) for x, y in seconds if x in (1.1, 2.2)} == {rows.index("sync ring")}
    spans = {
        tuple(segment[:, 0])
        for lines in drawing.figure.axes[0].collections
        for segment in lines.get_segments()
    }
    assert (2.5, 2.7) in spans and (1.0, 1.2) in spans, spans
    assert [x for x, _ in marks(drawing, 2, "filled")][:2] == [5.5e6, 5.5e6], (
        "bytes of either straggler"
    )
    assert len(marks(drawing, 2, "zero")) == 2, (
        "hogwild sends nothing, and a logarithmic axis has no zero"
    )


def test_a_miss_stands_open_beyond_the_axis_with_k_of_n() -> None:
    drawing = drawn(TO_TARGET, the_runs())
    for axes in range(3):
        missed = marks(drawing, axes, "missed")
        assert len(missed) == 2 and all(x > 1 for x, _ in missed), (
            "a fraction of the axes: right of its end"
        )
        assert {round(y) for _, y in missed} == {3}, "the row of asynchronous"
        texts = [text.get_text() for text in drawing.figure.axes[axes].texts]
        assert "1 of 3" in texts and "2 of 3" in texts and "> budget" in texts, texts
    assert not any(math.isclose(x, 0.95) for x, _ in marks(drawing, 0, "filled")), (
        "2 of 3 missed: no median to draw"
    )
    assert "k of n runs did not arrive" in drawing.caption and "n = 3 seeds" in drawing.caption


def test_virtual_and_wall_seconds_never_share_a_picture() -> None:
    runs = [*the_runs(), *measured()]
    clocks = {run.cell_id: run.cell.clock for run in runs}
    virtual = drawn(TO_TARGET, runs)
    wall = drawn({"kind": "to_target"}, runs)
    assert {clocks[each] for each in virtual.cell_ids} == {"virtual"}
    assert {clocks[each] for each in wall.cell_ids} == {"wall"}
    assert virtual.figure.axes[0].get_xlabel() == "virtual seconds"
    assert wall.figure.axes[0].get_xlabel() == "seconds"
    assert "virtual seconds" in virtual.caption and "wall" not in virtual.caption
    assert "wall seconds" in wall.caption and "virtual" not in wall.caption


def test_more_ranks_than_cores_are_hollow_where_the_wall_clock_decides_and_only_there() -> None:
    drawing = drawn({"kind": "to_target"}, measured())
    assert [len(marks(drawing, axes, "hollow")) for axes in range(3)] == [1, 0, 0]
    assert "Hollow (1 of 2 cells): oversubscribed or contended" in drawing.caption
    rates = drawn({"kind": "throughput"}, measured())
    assert [len(marks(rates, axes, "hollow")) for axes in range(2)] == [1, 0]


def test_the_front_is_drawn_and_named_and_what_it_beats_is_pale() -> None:
    drawing = drawn(PARETO, the_runs())
    nobody, slowed = drawing.figure.axes
    assert [x for x, _ in marks(drawing, 0, "front")] == [0.55, 1.6]
    assert [x for x, _ in marks(drawing, 0, "beaten")] == [0.9, 1.1]
    assert marks(drawing, 1, "front") == [(2.2, 110e6), (2.6, 13.2e6), (3.1, 5.5e6)]
    assert marks(drawing, 1, "beaten") == [], (
        "asynchronous missed: it is no number, and hogwild sends nothing"
    )
    listed = [
        [t.get_text() for t in ax.texts if not t.get_text().isdigit()] for ax in (nobody, slowed)
    ]
    assert listed[0] == ["1  local SGD", "2  sync native top-k"]
    assert listed[1] == ["1  sync ring", "2  local SGD", "3  sync native top-k"]
    assert nobody.get_xlim() == slowed.get_xlim() and nobody.get_ylim() == slowed.get_ylim(), (
        "one scale"
    )
    assert "worker 0: 4x slower: async > budget (2 of 3)" in drawing.caption
    assert "Nor is hogwild: it sends nothing" in drawing.caption


def test_where_all_are_tuned_nobody_is_called_so() -> None:
    drawing = drawn({"kind": "virtual_pareto", "where": {"tuning": "per_strategy"}}, the_runs())
    assert [t.get_text() for t in drawing.figure.axes[0].texts if not t.get_text().isdigit()] == [
        "1  local SGD"
    ]


def test_both_tunings_stand_in_one_row_with_the_factor_that_was_chosen() -> None:
    drawing = drawn({"kind": "virtual_tuning", "y": "seconds"}, the_runs())
    (ax,) = drawing.figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["local SGD", "async"], (
        "who was tuned"
    )
    assert [x for x, _ in marks(drawing, 0, "filled")] == [0.5, 0.55, 0.6, 0.9]
    texts = [text.get_text() for text in ax.texts]
    assert "×0.25" in texts and "×1" in texts, texts
    assert len(marks(drawing, 0, "joined")) == 2
    with rc_context(style.theme()):
        (entry,) = spec.parse([{"kind": "virtual_tuning"}])
        none = kinds.load(entry.kind)(entry, material(measured()).seen_by(entry))
    assert none == []


def plan(runs: Sequence[Run], *entries: dict[str, Any]) -> Plan:
    return Plan(
        name="sync",
        path=None,
        question="Which strategy?",
        seeds=SEEDS,
        cells=tuple(material(runs).cells),
        refused=(),
        num_excluded=0,
        figures=entries,
        text="",
    )


def printed(folder: Path) -> str:
    """The tables and the sentences as they are printed."""
    runs = [*the_runs(), *measured()]
    page.render(
        plan(runs, {"kind": "virtual_table"}, TO_TARGET, PARETO),
        runs,
        folder,
        environments={made.ENVIRONMENT_ID: made.ENVIRONMENT},
    )
    said = "\n".join(f"{sentence.topic}: {sentence.text}" for sentence in answer(material(runs)))
    return f"{said}\n\n{(folder / 'tables' / 'virtual_table.md').read_text(encoding='utf-8')}"


def test_the_answer_and_the_table_are_the_golden_ones(tmp_path: Path) -> None:
    assert printed(tmp_path) == (GOLDEN / "report_sync.txt").read_text(encoding="utf-8")


def test_the_answer_names_who_is_first_who_is_frugal_and_who_misses_straggler_by_straggler() -> (
    None
):
    said = {sentence.topic: sentence.text for sentence in answer(material(the_runs()))}
    assert list(said)[:3] == ["Answer", "No straggler", "Worker 0: 4x slower"], list(said)
    assert (
        "First in virtual time: local SGD (no straggler); sync ring (worker 0: 4x slower)"
        in said["Answer"]
    )
    assert "Fewest bytes: sync native top-k." in said["Answer"]
    assert "missed in some runs: async in 1 of 3" in said["No straggler"]
    assert "missed: async > budget (2 of 3)" in said["Worker 0: 4x slower"]
    assert "least for hogwild, 1.12 [1.00–1.12] times" in said["What it costs"], said[
        "What it costs"
    ]
    assert "most for local SGD, 4.73 [4.50–5.00] times" in said["What it costs"], (
        "ratios of seeds, not of medians"
    )
    assert "async ×0.25" in said["Tuning"] and "no difference seen for local SGD" in said["Tuning"]
    assert not any(" wall " in text for text in said.values())


def test_payload_that_is_not_what_was_predicted_is_shouted_first(tmp_path: Path) -> None:
    runs = the_runs()
    run = next(run for run in runs if run.cell.topology == "ring" and run.cell.straggler)
    spoiled = dataclasses.replace(
        run, result={**run.result, "payload_bytes": run.result["payload_bytes"] + 1}
    )
    runs[runs.index(run)] = spoiled
    first = answer(material(runs))[0]
    assert first.topic == "BROKEN LAW" and run.cell.label in first.text, first
    page.render(plan(runs, {"kind": "virtual_table"}), runs, tmp_path)
    rows = (tmp_path / "tables" / "virtual_table.md").read_text(encoding="utf-8").splitlines()
    assert [
        row
        for row in rows
        if "PAYLOAD DIFFERS FROM PREDICTION" in row and "4x" in row and "ring" in row
    ]
    assert sum("PAYLOAD DIFFERS" in row for row in rows) == 1
    assert not [each for each in answer(material(runs)) if "equals its prediction" in each.text]


def test_a_filter_takes_factors_of_the_slowest_worker() -> None:
    def kept(straggler: object) -> int:
        (parsed,) = spec.parse(
            [{"kind": "virtual_table", "where": {"straggler": straggler, "tuning": "same"}}]
        )
        return sum(parsed.wants(each) for each in material(the_runs()).cells)

    assert (kept(1), kept(4.0), kept([1, 4]), kept(2)) == (5, 5, 10, 0)
    assert (kept(True), kept(False)) == (5, 5)


def test_on_a_phone_every_panel_has_the_names_of_its_rows(tmp_path: Path) -> None:
    runs = the_runs()
    text = page.render(plan(runs, TO_TARGET), runs, tmp_path).read_text(encoding="utf-8")
    panels = text[text.index('<div class="panels"') :]
    boxes = [
        re.findall(r'viewBox="([^"]+)"', one)
        for one in re.findall(r'<div style="width:min.*?</div>', panels)
    ]
    assert len(boxes) == 3 and all(len(each) == 2 for each in boxes), boxes
    assert len({each[0] for each in boxes}) == 1, "the same strip of names"
    left, _, width, _ = (float(value) for value in boxes[0][0].split())
    for names, panel in boxes:
        assert names.split()[3] == panel.split()[3], "equally high, so that rows stay rows"
    assert (left, float(boxes[0][1].split()[0])) == (0.0, width)


def test_names_say_hosts_where_a_strategy_has_several() -> None:
    cells = [
        cell("synchronous", "hierarchical", "none", hosts=2),
        cell("synchronous", "ring", "none"),
    ]
    runs = [arriving(each, seed, 1.0 + seed, 10) for each in cells for seed in SEEDS]
    drawing = drawn(TO_TARGET, runs)
    labels = [text.get_text() for text in drawing.figure.axes[0].get_yticklabels()]
    assert labels == ["sync hierarchical, 2 hosts", "sync ring"]


def test_what_the_plan_refuses_is_refused_by_a_rule_and_not_for_want_of_a_file() -> None:
    plan_of = plans.load(SYNC)
    reasons = {
        refused.cell.label.partition(" N=")[0]: refused.problems[0].rule
        for refused in plan_of.refused
    }
    assert reasons == {
        "cnn/digits asynchronous ring": "sync x topology",
        "cnn/digits synchronous ring topk": "compression x topology",
        "cnn/digits synchronous ring int8": "compression x topology",
        "cnn/digits gossip ring": "sync x topology",
        "cnn/digits asynchronous parameter_server sign": "compression x sync",
    }
    virtual = naming.describe(
        [each for each in plan_of.cells if each.clock == "virtual" and each.tuning == "same"]
    )
    per_straggler = virtual.groupby("straggler")["series"].apply(set)
    assert set(per_straggler.index) == {"", "worker 0: 2x", "worker 0: 4x"}
    assert len({frozenset(each) for each in per_straggler}) == 1, (
        "every strategy meets every straggler"
    )
    assert {each.budget.samples for each in plan_of.cells} == {15_360}, (
        "equal samples for everybody"
    )


def test_no_interval_of_an_accuracy_passes_100(tmp_path: Path) -> None:
    of = cell("synchronous", "ring", "none")
    seeds = range(5)
    runs = [arriving(of, seed, 1.0 + seed, 10) for seed in seeds]
    runs = [
        dataclasses.replace(run, result={**run.result, "final_metric": value})
        for run, value in zip(runs, (20.0, 99.0, 30.0, 95.0, 90.0), strict=True)
    ]
    page.render(
        dataclasses.replace(plan(runs, {"kind": "virtual_table"}), seeds=tuple(seeds)),
        runs,
        tmp_path,
    )
    row = (tmp_path / "tables" / "virtual_table.md").read_text(encoding="utf-8").splitlines()[2]
    assert re.search(r"\[\d+–100\]", row), row
