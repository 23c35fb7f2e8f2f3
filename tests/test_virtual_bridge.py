"""From a real run to a virtual one and back: the push log replayed, counts and parameters of the
same cells."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchsuite.cli import main
from benchsuite.cluster.local import Cluster
from benchsuite.errors import UsageError
from benchsuite.laws import bridge
from benchsuite.laws.harness.process_ranks import process_ranks
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.runs import relative, run
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan.cell import Cell
from benchsuite.results.assemble.virtual import sections
from benchsuite.results.record import dumps
from benchsuite.virtual.replay import PushOrder, gaps, in_virtual_time, replay
from tests.bench import Bench
from tests.bench import cell as bench_cell
from tests.law_cells import STALE_RECIPES, tiny
from tests.virtual_runs import run as run_virtual

(LAW,) = bridge.LAWS
SERVER: dict[str, Any] = {"topology": "parameter_server", "precision": "fp64"}
WAYS: list[dict[str, Any]] = [
    {"sync": "synchronous", "topology": "ring"},
    {"sync": "synchronous", "topology": "native"},
    {"sync": "synchronous", **SERVER, "servers": 1},
    {"sync": "synchronous", **SERVER, "servers": 2},
    {"sync": "asynchronous", **SERVER, "servers": 1},
    {"sync": "asynchronous", **SERVER, "servers": 2},
    {"sync": "k_sync", **SERVER, "servers": 1},
]


def simulated(cell: Cell) -> dict[str, Any]:
    return run_virtual(cell, tempfile.gettempdir())[0]


@pytest.mark.parametrize(
    "recipe", STALE_RECIPES, ids=lambda recipe: f"{recipe[0]} clip {recipe[2]}"
)
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_real_run_replayed_in_virtual_time_is_the_same_run(recipe: Any, workers: int) -> None:
    cell = tiny(recipe, sync="asynchronous", topology="parameter_server", replicas=workers)
    assert LAW.applies(cell)
    figure = LAW.check(thread_ranks, cell)
    assert figure.holds, figure


@pytest.mark.procs
@pytest.mark.timeout(60)
@pytest.mark.parametrize("straggler", [{}, {"0": 4.0}])
def test_a_stored_run_of_real_processes_is_replayed_from_its_file(
    bench: Bench, straggler: dict[str, float]
) -> None:
    real = bench.ok(
        sync="asynchronous",
        **SERVER,
        replicas=3,
        steps=40,
        straggler=straggler,
        tiny={"optimizer": "sgd"},
    )
    again = replay(real)
    result, _, _ = sections(in_virtual_time(real.cell), again.records, again.facts)
    found = gaps(real, result)
    assert found["staleness"] == 0 and found["loss"] <= 1e-10 and found["metric"] <= 1e-10, found
    assert (
        result["samples"] == real.result["samples"]
        and result["payload"]["payload"] == real.result["payload"]["payload"]
    )


@pytest.mark.procs
@pytest.mark.timeout(60)
def test_the_verb_tells_the_same_run_from_another(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = bench.ok(sync="asynchronous", **SERVER, replicas=3, steps=40, tiny={"optimizer": "sgd"})
    document = real.to_json()
    (tmp_path / "run.json").write_text(dumps(document))
    log = document["raw"]["push_log"]
    changed = next(row for row in range(1, 40) if log["worker"][row] != log["worker"][row - 1])
    for column in ("worker", "tag"):
        log[column][changed - 1 : changed + 1] = reversed(log[column][changed - 1 : changed + 1])
    (tmp_path / "swapped.json").write_text(dumps(document))
    (tmp_path / "cut.json").write_text("{")

    assert main.main(["replay", str(tmp_path / "run.json")]) == 0
    assert "  the same run\n" in capsys.readouterr().out
    assert main.main(["replay", str(tmp_path / "swapped.json"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["gaps"]["staleness"] > 0
    document["raw"]["push_log"] = real.raw["push_log"]
    document["result"]["loss"][-1] = None
    (tmp_path / "lost.json").write_text(dumps(document))
    assert main.main(["replay", str(tmp_path / "lost.json")]) == 1
    assert "finite in one of them only" in capsys.readouterr().out
    assert main.main(["replay", str(tmp_path / "cut.json")]) == 2
    assert "give a run file" in capsys.readouterr().err


@pytest.mark.procs
@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_bytes_and_messages_are_those_of_real_processes_on_every_edge(
    bench: Bench, workers: int
) -> None:
    """Exactly, wherever the count does not depend on timing; who pushes how often in an
    asynchronous run does."""
    for way in WAYS:
        real = bench.ok(**way, replicas=workers, tiny={"clip_norm": 0.5, "lr": 0.01})
        virtual = simulated(
            bench_cell(
                **way, replicas=workers, tiny={"clip_norm": 0.5, "lr": 0.01}, clock="virtual"
            )
        )
        by_timing = way["sync"] in ("asynchronous", "k_sync")
        if not by_timing:
            for name in ("payload", "messages"):
                assert virtual["payload"][name] == real.result["payload"][name], real.cell.label
        if (
            way["sync"] != "k_sync"
        ):  # how many versions end early, and so how many norms are agreed on, time decides
            assert virtual["payload_bytes"] == real.result["payload_bytes"], real.cell.label
        assert virtual["payload_source"] == real.result["payload_source"], real.cell.label
        assert virtual["predicted_bytes"] == virtual["payload_bytes"], real.cell.label


@pytest.mark.procs
@pytest.mark.timeout(120)
def test_final_parameters_of_synchronous_cells_are_those_of_real_processes(tmp_path: Path) -> None:
    with Cluster() as cluster:
        real_ranks = process_ranks(cluster, tmp_path)
        ranks = partial(virtual_ranks, graphs={})
        for workers in (2, 3, 4):
            for way in WAYS[:4]:
                cell = tiny(("nesterov", 0.05, 0.5), **way, replicas=workers)
                real = run(real_ranks, cell)
                virtual = run(ranks, cell)
                for mine, theirs in zip(virtual.workers, real.workers, strict=True):
                    gap = relative(mine.params[-1] - theirs.params[-1], theirs.params[-1])
                    assert gap <= 1e-10, f"{cell.label}: {gap:.3g} is not <= 1e-10"


def test_the_order_of_a_log_is_what_is_replayed() -> None:
    cell = tiny(STALE_RECIPES[0], sync="asynchronous", topology="parameter_server", replicas=3)
    real = run(thread_ranks, cell)
    log = real.logs[0]
    again = run(partial(virtual_ranks, order=PushOrder(log.worker, log.tag)), cell)
    assert again.logs[0].worker == log.worker and again.logs[0].version_read == log.version_read
    assert not torch.equal(again.servers[0].params[0], again.servers[0].params[-1])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sync": "synchronous", "topology": "ring"}, "sync = synchronous, and a replay needs"),
        ({"sync": "asynchronous", "topology": "parameter_server", "servers": 2}, "servers = 2"),
        (
            {
                "sync": "asynchronous",
                "topology": "parameter_server",
                "options": {"asynchronous": {"lock": "none"}},
            },
            "lock = none",
        ),
        (
            {"sync": "asynchronous", "topology": "parameter_server", "clock": "virtual"},
            "clock = virtual",
        ),
    ],
)
def test_what_a_log_does_not_tell_whole_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        in_virtual_time(tiny(replicas=2, **fields))
