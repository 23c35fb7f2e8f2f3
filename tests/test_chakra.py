"""Chakra traces of virtual schedules, read back by a reader of their own: no message, byte or wait
is lost or made up."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchsuite import rules
from benchsuite.cli import main
from benchsuite.comm.traffic import TICKET_BYTES
from benchsuite.errors import UsageError
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.programs import chakra
from benchsuite.results.assemble.virtual import sections
from benchsuite.results.record import dumps
from benchsuite.virtual.world import Simulated, simulate
from tests import chakra_reader
from tests.chakra_reader import (
    COLL,
    COMP,
    RECV,
    SEND,
    Node,
    Trace,
    bytes_by_edge,
    faults,
    read,
    replay,
)

ALL_REDUCE = 0
MBIT = 100.0
LATENCY_US = 50.0
SERVER = {"topology": "parameter_server", "replicas": 3}
WAYS: dict[str, dict[str, Any]] = {
    "ring": {"topology": "ring", "replicas": 5},
    "native": {"topology": "native", "replicas": 4},
    "synchronous": {"sync": "synchronous", **SERVER, "servers": 2},
    "asynchronous": {"sync": "asynchronous", **SERVER, "servers": 2},
    "k_sync, cancel": {"sync": "k_sync", **SERVER, "options": {"k_sync": {"late": "cancel"}}},
    "equal workers": {
        "sync": "asynchronous",
        **SERVER,
        "compute_time": {"kind": "fixed", "mean_s": 0.004},
    },
    "costly receives": {
        "topology": "ring",
        "replicas": 3,
        "receive_cost": {"copy_s_per_gib": 0.5, "incast": 1.0},
    },
}


def cell(way: str) -> Cell:
    fields = {"link_mbit": MBIT, "link_latency_us": LATENCY_US, **WAYS[way]}
    fields = {"compute_time": {"kind": "exponential", "mean_s": 0.004}, **fields}
    made = resolve(
        Cell(
            workload="mlp",
            clock="virtual",
            gradients="none",
            batch_mode="fixed_per_worker",
            budget=Budget(steps=5),
            **fields,
        )
    )
    assert rules.validate(made) == []
    return made


@functools.cache
def exported(way: str, folder: Path) -> tuple[Cell, chakra.Exported, Trace]:
    made = cell(way)
    written = chakra.export(made, folder)
    return made, written, read(written.traces)


@functools.cache
def ran(way: str) -> Simulated:
    """The same cell as anybody runs it: nothing is recorded."""
    return simulate(cell(way), "unused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chakra")


# -- the laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_messages_pair_up_and_events_begin_when_what_they_wait_for_is_over(
    way: str, folder: Path
) -> None:
    _, written, trace = exported(way, folder)
    assert faults(trace) == [] and written.about["unreceived"] == []


@pytest.mark.parametrize("way", WAYS)
def test_the_trace_holds_the_bytes_that_the_run_counted_on_every_edge(
    way: str, folder: Path
) -> None:
    made, written, trace = exported(way, folder)
    counted = {(a, b): n for record in ran(way).records for a, b, n in record["traffic"]["payload"]}
    assert bytes_by_edge(trace) == bytes_by_edge(trace, RECV) == counted
    assert counted == {(a, b): n for a, b, n, _ in written.about["messages"]} and bool(counted) == (
        way != "native"
    )
    tickets = Counter(node.rank for node in trace.values() if node.type == SEND and node.is_ticket)
    counters = sum(n for record in ran(way).records for _, n in record["traffic"]["control"])
    assert counters - 20 * tickets.total() == 8 * counters_asked(made, trace), (
        "20 bytes a ticket, 8 a counter"
    )
    assert TICKET_BYTES == 20


def counters_asked(made: Cell, trace: Trace) -> int:
    """`fetch_add` is not in the trace: a worker of an asynchronous cell asks before each gradient,
    and once in vain."""
    begun = sum(node.type == COMP and node.name.startswith("gradient") for node in trace.values())
    return begun + made.num_workers if made.sync != "synchronous" else 0


def test_collectives_have_the_size_that_their_bytes_are_derived_from(folder: Path) -> None:
    made, written, trace = exported("native", folder)
    calls = [node for node in trace.values() if node.type == COLL]
    assert {(node.name, node.attrs["comm_type"], "pg_name" in node.attrs) for node in calls} == {
        ("all_reduce", ALL_REDUCE, False)
    }
    assert Counter(node.rank for node in calls) == dict.fromkeys(range(made.replicas), 5)
    ring = {(rank, (rank + 1) % 4): 0 for rank in range(4)}
    for node in calls:  # 2 (N - 1) M bytes in all, each rank's share to its right
        ring[node.rank, (node.rank + 1) % 4] += 2 * 3 * node.attrs["comm_size"] // 4
    derived = {(a, b): n for a, b, n in ran("native").records[0]["derived_total"]["payload"]}
    assert sum(ring.values()) == sum(derived.values()) and ring.keys() == derived.keys()
    assert written.about["derived"]["payload"] == [
        [a, b, n] for (a, b), n in sorted(derived.items())
    ]


@pytest.mark.parametrize("way", WAYS)
def test_replayed_on_the_same_ports_it_ends_when_the_run_ended_to_the_nanosecond(
    way: str, folder: Path
) -> None:
    made, written, trace = exported(way, folder)
    end = replay(trace, ns_per_byte=8000 / MBIT, latency=round(LATENCY_US * 1000))
    _, cost, _ = sections(made, ran(way).records, {})
    assert end == round(cost["virtual_s"] * 1e9), (
        f"replayed {end} ns, the run {cost['virtual_s']} s"
    )
    assert end == written.about["end_ns"] == max(node.end for node in trace.values())
    assert replay(trace, ns_per_byte=16000 / MBIT, latency=0) != end, "another network, another end"


@pytest.mark.parametrize("way", WAYS)
def test_a_recorded_run_is_the_same_run(way: str) -> None:
    made = cell(way)
    plain = ran(way)
    recorded = simulate(made, "unused", record=True)
    assert plain.schedule is None and recorded.schedule is not None
    texts = [dumps(sections(made, each.records, {})) for each in (plain, recorded)]
    assert texts[0] == texts[1]


# -- negative controls: each of these checks sees what it is there for -----------------------------


def broken(trace: Trace, change: Callable[[Trace], Any]) -> Trace:
    twin = copy.deepcopy(trace)
    change(twin)
    return twin


def first(trace: Trace, kind: int) -> Node:
    return next(
        node for node in trace.values() if node.type == kind and not node.is_ticket and node.ctrl
    )


@pytest.mark.parametrize("way", ["ring", "asynchronous"])
def test_a_lost_message_changed_bytes_and_a_lost_wait_are_noticed(way: str, folder: Path) -> None:
    _, _, trace = exported(way, folder)
    ports = {"ns_per_byte": 8000 / MBIT, "latency": round(LATENCY_US * 1000)}

    def lose(twin: Trace) -> None:
        del twin[(lost := first(twin, RECV)).rank, lost.id]

    def grow(twin: Trace) -> None:
        first(twin, SEND).attrs["comm_size"] += 400_000

    def forget(twin: Trace) -> None:
        last = max(twin.values(), key=lambda node: node.begin)
        last.ctrl = []
        last.data = []

    def turn(twin: Trace) -> None:
        node = first(twin, COMP)
        twin[node.rank, node.ctrl[0]].ctrl.append(node.id)

    assert any("message (" in fault for fault in faults(broken(trace, lose)))
    grown = broken(trace, grow)
    assert any("message (" in fault and "bytes" in fault for fault in faults(grown))
    assert bytes_by_edge(grown) != bytes_by_edge(trace) and replay(grown, **ports) != replay(
        trace, **ports
    )
    assert any("is over at 0" in fault for fault in faults(broken(trace, forget)))
    assert any("circle" in fault for fault in faults(broken(trace, turn)))


def test_a_file_that_lacks_a_message_is_noticed(folder: Path, tmp_path: Path) -> None:
    _, written, trace = exported("ring", folder)
    kept = chakra_reader.messages(written.traces[0])
    lost = next(
        i for i, each in enumerate(kept[1:], 1) if chakra_reader.read_node(0, each).type == SEND
    )
    assert all(len(each) < 0x4000 for each in kept)
    delimited = [
        bytes([len(m) & 0x7F | 0x80, len(m) >> 7]) + m for m in kept[:lost] + kept[lost + 1 :]
    ]
    path = tmp_path / "short.et"
    path.write_bytes(b"".join(delimited))
    twin = read((path, *written.traces[1:]))
    assert len(twin) == len(trace) - 1 and any(
        "message (0, 1, 0)" in fault for fault in faults(twin)
    )


# -- the verb --------------------------------------------------------------------------------------

FLAGS = ["--workload", "mlp", "--topology", "ring", "--replicas", "4", "--set", "link_mbit=100"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.main(["export", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_verb_writes_a_trace_per_rank_and_says_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(
        capsys, "chakra", *FLAGS, "--clock", "virtual", "--out", str(tmp_path / "made")
    )
    assert (code, err) == (0, "") and "4 ranks" in out
    (path,) = (tmp_path / "made").glob("*.json")
    about = json.loads(path.read_text())
    names = [f"{about['cell_id']}.{rank}.et" for rank in range(4)]
    assert (
        [each["file"] for each in about["ranks"]]
        == names
        == sorted(p.name for p in path.parent.glob("*.et"))
    )
    trace = read(tuple(path.parent / name for name in names))
    assert faults(trace) == [] and [each["nodes"] for each in about["ranks"]] == [3 * 13] * 4, (
        "3 steps"
    )
    assert bytes_by_edge(trace) == {(a, b): n for a, b, n, _ in about["messages"]}
    assert (
        about["cell"]["gradients"] == "none" and about["left_out"].keys() == chakra.LEFT_OUT.keys()
    )
    first_bytes = [(path.parent / name).read_bytes() for name in names]
    said(
        capsys,
        "chakra",
        *FLAGS,
        "--clock",
        "virtual",
        "--out",
        str(tmp_path / "again"),
        "--steps",
        "3",
    )
    assert first_bytes == [(tmp_path / "again" / name).read_bytes() for name in names], (
        "the same schedule, the same bytes"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            [*FLAGS],
            "clock = wall, and a schedule is what the virtual clock did: add --clock virtual",
        ),
        ([*FLAGS, "--clock", "virtual", "--replicas", "2,4"], "2 cells x 1 seeds"),
        ([*FLAGS, "--clock", "virtual", "--seeds", "0,1"], "1 cells x 2 seeds"),
        ([*FLAGS, "--clock", "virtual", "--sync", "k_sync"], "parameter_server"),
        ([*FLAGS, "--clock", "virtual", "--steps", "0"], "give --steps 1 or more"),
        ([*FLAGS, "--clock", "virtual", "--series", "x"], "--series DIR is of export csv"),
        ([], "give a PLAN (benchsuite list report) or a cell by flags"),
    ],
)
def test_what_is_not_one_virtual_cell_is_refused_with_rule_and_remedy(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, "chakra", *arguments, "--out", str(tmp_path / "made"))
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err
    assert not (tmp_path / "made").exists()


def test_chakra_needs_a_folder_and_csv_no_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give --out DIR" in said(capsys, "chakra", *FLAGS, "--clock", "virtual")[2]
    (tmp_path / "afile").write_text("kept")
    code, _, err = said(
        capsys, "chakra", *FLAGS, "--clock", "virtual", "--out", str(tmp_path / "afile")
    )
    assert code == 2 and "cannot be written" in err
    for more in (["--steps", "2"], ["--workload", "mlp"], ["quick"], ["--seeds", "1"]):
        code, out, err = said(capsys, "csv", *more, "--results", str(tmp_path))
        assert (code, out) == (2, "") and "leave it out" in err


def test_without_protobuf_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with pytest.raises(
        UsageError, match=r"needs the package protobuf: pip install 'benchsuite\[chakra\]'"
    ):
        chakra.Format()
