"""`calibrate`: records become fits, twins and documents by hand; once for real, tiny. No wall-clock
figure is asserted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchsuite.analysis.costs import Extrapolation
from benchsuite.cli import main
from benchsuite.errors import UsageError
from benchsuite.laws.harness.cases import TINY
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.programs.bench import Bench
from benchsuite.programs.calibrate import calibrate, cells, table
from benchsuite.programs.calibrate.launches import MESSAGES, RANKS, Effort, Launches
from benchsuite.programs.shaped_link import NotShaped, ShapedLoopback
from benchsuite.results.record import Run, Status
from benchsuite.results.store import Store

EFFORT = Effort(
    launches=2,
    sizes={1024: 3, 4096: 3, 65536: 3, 1 << 20: 3},
    controls=5,
    incast_sizes={65536: 2},
    add_sizes={65536: 3},
    gradients=8,
    rounds=5,
    steps=20,
    rates={400: {262144: 1}, 800: {262144: 1}},
)
VECTOR = 100_000  # bytes
# ns
US = 1_000
MS = 1_000_000
SECOND = 240 * US  # one more message in a step of two ranks; alone it takes 160


# -- by hand ---------------------------------------------------------------------------------------


def launches(*, num_launches: int = 2, both: bool = True) -> Launches:
    """Messages of 50 us + 1 ns a byte, 60 us + 2 ns both ways; gradients of 2 ms (64) and 1 ms
    (32); rests by hand."""
    sizes = [str(2**k) for k in range(10, 24)]
    messages = {
        "one_way": {size: [50 * US + int(size)] * 3 for size in sizes},
        "both_ways": {size: [60 * US + 2 * int(size)] * 3 for size in sizes},
        "ticket_call": [10 * US],
        "counter": [20 * US],
        "ticket": [],
    }
    answering = {name: {} if isinstance(value, dict) else [] for name, value in messages.items()}
    answering |= {"ticket": [200 * US], "both_ways": messages["both_ways"]}
    gradient = {"64": [2 * MS] * 3, "32": [MS] * 3}
    step = {"64": [2 * MS + 100 * US] * 3, "32": [MS + 90 * US] * 3}
    exchanged = MS + 60 * US + VECTOR + 300 * US  # gradient, a message of half the vector, the rest
    answered = 2 * MS + 2 * (50 * US + VECTOR) + 150 * US
    steps = {
        "both_gradient": [MS] * 3 if both else [],
        "both_step": [exchanged] * 3 if both else [],
        "twice_gradient": [MS] * 3 if both else [],
        "twice_step": [exchanged + SECOND] * 3 if both else [],
        "one_gradient": [2 * MS] * 3,
        "one_step": [answered] * 3,
    }
    waiting = {**steps, "one_gradient": [], "one_step": []}
    incast = {"at_once": {"65536": [150 * US]}, "in_turn": {"65536": [100 * US]}}
    records: dict[str, Sequence[Any]] = {
        "gradients": [{"gradient": gradient, "step": step, "vector_bytes": VECTOR}],
        "additions": [{"add": {str(VECTOR): [10 * US] * 3}}],
        "messages": [messages, answering],
        "steps": [steps, waiting],
        "incast": [incast, {"at_once": {}, "in_turn": {}}, {"at_once": {}, "in_turn": {}}],
    }
    return Launches([64, 32], {kind: [ranks] * num_launches for kind, ranks in records.items()}, {})


def wall(**fields: Any) -> Cell:
    return resolve(Cell(workload="cnn", preset="smoke", budget=Budget(steps=20), **fields))


def test_a_launch_counts_by_the_slowest_rank_and_by_whoever_has_times() -> None:
    found = Launches(
        [1],
        {
            "k": [
                [
                    {"a": {"8": [1_000, 5_000, 3_000]}, "b": [7_000]},
                    {"a": {"8": [2_000, 1_000, 4_000]}},
                ]
            ]
        },
    )
    assert [round(1e9 * value) for value in found.medians("k", "a", "8")] == [
        4_000
    ]  # the median of 2, 5 and 4 us
    assert [round(1e9 * value) for value in found.medians("k", "b")] == [7_000]


def test_what_a_step_takes_beyond_gradient_and_messages_is_its_rest() -> None:
    found = launches()
    rests = cells.rests(found, cells.models_of(found))
    assert {name: [round(1e6 * value) for value in values] for name, values in rests.items()} == {
        "alone": [100, 100],
        "exchanging": [300, 300],
        "answered": [150, 150],
    }
    assert cells.incast(found) == [2.0, 2.0]


def times_of(cell: Cell) -> set[int]:
    """Microseconds of the twin's resampled gradients."""
    assert cell.compute_time is not None and cell.compute_time["kind"] == "resampled"
    return {round(1e6 * float(word)) for word in str(cell.compute_time["values_s"]).split()}


@pytest.mark.parametrize(
    ("fields", "gradient_us", "latency_us", "mbit", "copies"),
    [
        ({"replicas": 1}, 2100, 50, 8000, 0.0),
        (
            {"replicas": 2, "topology": "ring"},
            1220,
            140,
            4000,
            0.5,
        ),  # a message waits 80 us more, the step once less
        ({"replicas": 2, "topology": "native"}, 1300, 60, 4000, 0.0),
        # the rest of an answered step, counter, ticket's call, and 50 us by which the ticket comes
        # after the push
        (
            {"replicas": 1, "sync": "asynchronous", "topology": "parameter_server"},
            2230,
            50,
            8000,
            0.0,
        ),
    ],
    ids=["alone", "ring", "native", "server"],
)
def test_a_twin_has_what_was_measured(
    fields: dict[str, Any], gradient_us: int, latency_us: float, mbit: float, copies: float
) -> None:
    found = launches()
    cell = wall(**fields)
    twin = cells.twin(cell, found, cells.models_of(found))
    assert (twin.clock, twin.workload, twin.topology, twin.budget) == (
        "virtual",
        cell.workload,
        cell.topology,
        cell.budget,
    )
    assert times_of(twin) == {gradient_us}
    assert twin.link_latency_us is not None and twin.link_mbit is not None
    assert (
        abs(twin.link_latency_us / latency_us - 1) < 0.01 and abs(twin.link_mbit / mbit - 1) < 0.01
    ), twin
    assert twin.receive_cost is not None and twin.receive_cost["incast"] == 2.0
    add_s_per_gib = 10e-6 / VECTOR * 2**30
    assert abs(float(twin.receive_cost["copy_s_per_gib"]) - copies * add_s_per_gib) < 1e-9


def test_a_twin_takes_as_long_as_its_parts() -> None:
    """In virtual time, by the real strategy's file: gradient, rest, and two messages of a ring (or
    push and answer)."""
    from benchsuite.results.assemble.virtual import sections
    from benchsuite.virtual.world import simulate

    found = launches()
    models = dataclasses.replace(cells.models_of(found), copy_s_per_gib=0.0)
    size = 25_370 * 4  # of this cell's own vector
    for fields, expected in (
        ({"replicas": 2, "topology": "ring"}, 1220e-6 + 2 * (140e-6 + 2e-9 * size / 2)),
        ({"replicas": 2, "topology": "native"}, 1300e-6 + 2 * (60e-6 + 2e-9 * size / 2)),
        (
            {"replicas": 1, "sync": "asynchronous", "topology": "parameter_server"},
            2230e-6 + 2 * (50e-6 + 1e-9 * size),
        ),
    ):
        twin = dataclasses.replace(cells.twin(wall(**fields), found, models), gradients="none")
        with tempfile.TemporaryDirectory() as folder:
            simulated = simulate(twin, folder)
        _, cost, _ = sections(twin, simulated.records, simulated.facts)
        assert abs(cost["step_time_s_median"] / expected - 1) < 0.01, (
            cost["step_time_s_median"],
            expected,
        )
        assert cost["provenance"] == "virtual"


def test_a_message_between_computations_is_never_cheaper_than_alone() -> None:
    found = launches()
    for ranks in found.records["steps"]:
        for rank in ranks:
            rank["twice_step"] = [MS] * 3  # noise: less than with one message
    models = cells.models_of(found)
    assert cells.busy_link(found, models) == models.both_ways.fit.link(VECTOR / 2)


def test_two_ranks_need_a_batch_that_can_be_halved() -> None:
    found = launches(both=False)
    assert "exchanging" not in cells.rests(found, cells.models_of(found))
    quantities = [
        figure.quantity for figure in calibrate._quantities(found, cells.models_of(found))
    ]
    assert not any("both ranks" in quantity or "two ranks" in quantity for quantity in quantities)


def test_a_large_model_makes_fewer_steps() -> None:
    found = launches()  # 2.1 ms a step
    assert [found.affordable(120, seconds) for seconds in (10, 0.1, 0.001)] == [120, 47, 20]


def a_pair(step_s: float | None = 0.004, flags: tuple[str, ...] = ()) -> cells.Pair:
    def run(seconds: float) -> Run:
        cost = {"step_time_s_median": seconds, "provenance": "measured"}
        return Run(cell=wall(), code_id="c", status=Status.OK, flags=flags, cost=cost)

    runs = [] if step_s is None else [run(step_s), run(2 * step_s), run(step_s)]
    return cells.Pair(wall(), twin=wall(), runs=runs, predicted=run(0.005))


def test_the_difference_is_to_the_median_launch_and_none_where_ranks_share_cores() -> None:
    difference = a_pair().difference
    assert difference is not None and abs(difference - 0.25) < 1e-12
    assert a_pair(flags=("oversubscribed",)).difference is None
    assert a_pair(step_s=None).difference is None
    assert a_pair(flags=("contended",)).to_json()["measured_flags"] == ["contended"]


def test_a_gradients_line_and_its_left_out_batch() -> None:
    found = launches()
    for ranks in found.records["gradients"]:
        ranks[0]["gradient"]["16"], ranks[0]["step"]["16"] = [500 * US] * 3, [590 * US] * 3
    found.batches = [64, 32, 16]
    line = calibrate._compute(found)
    assert (
        abs(line["per_sample_s"] / (2e-3 / 64) - 1) < 1e-6 and line["worst_batch_error"] < 1e-6
    ), line
    found.batches = [64]
    assert "needs two" in calibrate._compute(found)["reason"]


def test_a_number_is_printed_with_its_interval_or_the_reason_why_not() -> None:
    good = Extrapolation(0.0123, 0.0111, 0.0136, 0.04, 0.02).to_json()
    assert table._extrapolated(good) == "12.3 ms [11.1 13.6]"
    assert table._extrapolated(Extrapolation(0.4, 0.2, 1.2, 0, 0).to_json()) == "400 ms [200 1200]"
    assert table._extrapolated(Extrapolation(1, 1, 1, 0.31, 0.0).to_json()) == "- error 31 % > 25 %"
    assert table._extrapolated(Extrapolation(1, 1, 1, 0.1, None).to_json()) == "- not tried"


# -- the store and the command line ----------------------------------------------------------------


def test_a_stored_calibration_is_no_run(tmp_path: Path) -> None:
    document = {"schema": 1, "started_at": "2026-11-24T15:28:55Z", "raw": [1.5]}
    path = Store(tmp_path).write_calibration("m", document)
    assert path.parent == tmp_path / "m" / "calibration" and path.name.startswith(
        "20261124T152855Z-"
    )
    assert json.loads(path.read_text()) == document
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = Store(tmp_path)
        assert store.runs() == [] and len(store.frame()) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--launches", "0"], "--launches 0: at least 1 is needed"),
        (["--workload", "cnnn"], "did you mean 'cnn'?"),
        (["--preset", "digit"], "did you mean 'digits'?"),
    ],
)
def test_bad_input_gets_one_line_and_exit_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["calibrate", "--results", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and says in captured.err and captured.err.count("\n") == 1
    with pytest.raises(UsageError):
        calibrate.run(effort=dataclasses.replace(EFFORT, launches=0))


# -- once for real, tiny ---------------------------------------------------------------------------

KEYS = {
    "schema",
    "kind",
    "machine",
    "environment_id",
    "commit",
    "dirty",
    "started_at",
    "workload",
    "preset",
    "launches",
    "cores",
    "foreign_cpu_share",
    "contended",
    "vector_bytes",
    "quantities",
    "fits",
    "shaped",
    "predictions",
    "modelled",
    "raw",
    "path",
}
PREDICTION = {
    "label",
    "cell",
    "virtual_cell",
    "reason",
    "measured_step_s",
    "measured_provenance",
    "measured_flags",
    "measured_failures",
    "predicted_virtual_step_s",
    "predicted_provenance",
    "predicted_failure",
    "difference",
}
MODELLED = {
    "operation",
    "num_workers",
    "num_bytes",
    "link_mbit",
    "value_s",
    "low_s",
    "high_s",
    "size_error",
    "rate_error",
    "error",
    "shown_s",
    "provenance",
}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = tmp_path_factory.mktemp("results")
    return calibrate.run(TINY, "", effort=EFFORT, results=results)


@pytest.mark.procs
def test_the_document_is_complete_and_stored(document: dict[str, Any]) -> None:
    assert set(document) == KEYS
    stored = json.loads(Path(document["path"]).read_text())
    assert {**stored, "path": document["path"]} == json.loads(json.dumps(document, allow_nan=False))
    assert Path(document["path"]).parent.name == "calibration"
    assert (document["schema"], document["kind"], document["launches"]) == (1, "calibration", 2)
    assert {figure["item"] for figure in document["quantities"]} == {
        "messages",
        "incast",
        "additions",
        "gradients",
        "steps",
    }
    for figure in document["quantities"]:
        assert figure["n"] == 2 and figure["unit"] in ("us", "ms", "x", "GB/s", "Gbit/s"), figure
    assert set(document["raw"]["records"]) >= {
        "messages",
        "incast",
        "additions",
        "gradients",
        "steps",
        "shaped",
    }
    for name in ("one_way", "both_ways"):
        assert set(document["fits"][name]["left_out_size_errors"]) == {
            f"{size:g}" for size in EFFORT.sizes
        }
    assert (
        document["fits"]["compute"]["per_sample_s"] >= 0
    )  # of a tiny model it is lost in the overhead


@pytest.mark.procs
def test_the_prediction_is_virtual_and_what_it_is_held_against_is_measured(
    document: dict[str, Any],
) -> None:
    labels = [pair["label"].partition(" ")[2] for pair in document["predictions"]]
    assert labels == [
        "synchronous native N=1",
        "synchronous ring N=2",
        "synchronous native N=2",
        "asynchronous parameter_server N=1",
    ]
    for pair in document["predictions"]:
        assert set(pair) == PREDICTION
        assert (pair["cell"]["clock"], pair["virtual_cell"]["clock"]) == ("wall", "virtual")
        assert pair["virtual_cell"]["compute_time"]["kind"] == "resampled"
        assert pair["predicted_provenance"] == "virtual" and pair["predicted_virtual_step_s"] > 0, (
            pair
        )
        assert (
            pair["measured_provenance"] in ("measured", "counted")
            and len(pair["measured_step_s"]) == 2
        ), pair
        assert pair["measured_failures"] == [] and pair["predicted_failure"] is None
        assert (pair["difference"] is None) == ("oversubscribed" in pair["measured_flags"])


@pytest.mark.procs
def test_every_modelled_time_carries_its_errors(document: dict[str, Any]) -> None:
    rows = document["modelled"]
    assert len(rows) == 4 * 6 * 2 * 2
    for row in rows:
        assert set(row) == MODELLED and row["provenance"] == "modelled"
        known = row["error"] is not None and row["error"] <= 0.25
        assert (row["shown_s"] == row["value_s"]) if known else row["shown_s"] is None


@pytest.mark.procs
def test_the_table_fits_a_page_and_has_all_sections(document: dict[str, Any]) -> None:
    text = table.table(document)
    for words in (
        "measured, one value",
        "fitted: alpha",
        "median step time",
        "modelled: one mean",
        "Others used",
    ):
        assert words in text, text
    too_long = [line for line in text.splitlines() if len(line) > 100 and not line.startswith("/")]
    assert not too_long, too_long


def test_without_shaped_links_nothing_is_modelled() -> None:
    """`--no-shaped`, or a machine that does not allow it: no error at rates is known, so no time is
    shown."""
    found = launches()
    assert found.shaped_reason == "not asked for" and found.shaped_points() == {}
    rows = list(calibrate._modelled(cells.models_of(found)))
    assert all(row["error"] is None and row["shown_s"] is None for row in rows)
    assert "nothing, since no two rates" in "".join(table._modelled({"modelled": rows}))


def test_a_link_that_could_not_be_shaped_leaves_its_reason_and_no_points() -> None:
    found = launches()
    refused = {"reason": "tc is not installed (iproute2)", "one_way": {}}
    found.records["shaped"] = [[refused, refused]]
    assert found.shaped_reason == refused["reason"] and found.shaped_points() == {}
    shaped = calibrate._shaped(found, cells.models_of(found).one_way)
    assert (shaped["reason"], shaped["rates"], shaped["provenance"]) == (
        refused["reason"],
        [],
        "emulated",
    )


@pytest.mark.procs
def test_ranks_that_may_not_shape_say_why_and_end_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    cell = resolve(Cell(workload="cnn", preset="smoke", replicas=2))
    with Bench(RANKS) as bench:
        ranks = bench.launch(cell, f"{MESSAGES}:shaped", {"rates": {"400": {"262144": 1}}}).ranks
    assert all(rank["reason"] and rank["one_way"] == {} for rank in ranks), ranks


@pytest.mark.procs
@pytest.mark.netns
def test_a_shaped_link_is_slow_in_the_right_order(own_bench: Bench) -> None:
    cell = resolve(Cell(workload="cnn", preset="smoke", replicas=2))
    order = {"rates": {"50": {"262144": 2}, "400": {"262144": 2}}}
    (first, second) = own_bench.launch(cell, f"{MESSAGES}:shaped", order).ranks
    if first["reason"]:
        pytest.skip(first["reason"])
    times = first["one_way"]
    assert second["one_way"] == {"50": {"262144": []}, "400": {"262144": []}}
    assert min(times["50"]["262144"]) > max(times["400"]["262144"])  # eight times the rate


@pytest.fixture(scope="module")
def own_bench() -> Iterator[Bench]:
    with Bench(RANKS) as bench:
        yield bench


SHAPE = """
import re, subprocess
from benchsuite.cluster import private_network
from benchsuite.programs.shaped_link import NotShaped, ShapedLoopback

def state():
    mtu = re.search(r"mtu \\d+", subprocess.run(["ip", "link", "show", "lo"], capture_output=True, text=True).stdout)[0]
    return mtu, "tbf" in subprocess.run(["tc", "qdisc", "show", "dev", "lo"], capture_output=True, text=True).stdout

try:
    private_network.enter_private_network()
    before = state()
    with ShapedLoopback(private_network=True) as link:
        unshaped = state()
        link.set_rate(100)
        shaped = state()
        link.set_rate(200)
except (private_network.NoNamespace, NotShaped) as reason:
    raise SystemExit(f"skip: {reason}")
try:
    with ShapedLoopback(private_network=True) as link:
        link.set_rate(100)
        raise KeyError
except KeyError:
    pass
assert (unshaped, shaped) == (("mtu 1500", False), ("mtu 1500", True)), (unshaped, shaped)
assert before == state(), (before, state())
"""


@pytest.mark.netns
def test_the_loopback_is_as_it_was_afterwards_also_after_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHAPE], capture_output=True, text=True, timeout=60, check=False
    )
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def test_the_machines_own_loopback_is_never_shaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    with pytest.raises(NotShaped, match="not shaped: user namespaces are off"):
        ShapedLoopback(private_network=False, network_reason="user namespaces are off").__enter__()


def test_a_missing_tool_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NotShaped, match="ip is not installed"):
        ShapedLoopback(private_network=True).__enter__()
