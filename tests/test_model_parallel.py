"""Replicas that several ranks hold: whole runs, from the command to the run file. The laws are in
test_laws_processes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import benchsuite
from benchsuite.comm import Traffic
from benchsuite.parallel.pieces import Piece, cut, join, num_owned, ordered, shapes_of, whole
from benchsuite.plan.cell import Budget, Cell
from benchsuite.plan.placement import ranks_of_part, ranks_of_replica, replica_and_part
from benchsuite.results.store import Store
from benchsuite.worker.predict import kept, predicted
from tests.law_cells import tiny

torch = pytest.importorskip("torch")

SHORT = Budget(steps=8, timeout_s=60.0)
PRODUCT = Cell(
    workload="cnn",
    preset="smoke",
    parallel="pipeline",
    model_parallel=2,
    replicas=2,
    topology="parameter_server",
    servers=2,
    budget=SHORT,
)


def test_every_rank_stands_once_in_its_replica_and_once_among_its_likes():
    for placement in ("replica_major", "part_major"):
        cell = Cell(
            parallel="fsdp", model_parallel=3, replicas=2, servers=0, rank_placement=placement
        )
        for ranks in (
            [rank for replica in range(2) for rank in ranks_of_replica(cell, replica)],
            [rank for part in range(3) for rank in ranks_of_part(cell, part)],
        ):
            assert sorted(ranks) == list(range(6))
        for rank in range(6):
            replica, part = replica_and_part(cell, rank)
            assert (
                ranks_of_replica(cell, replica)[part] == rank == ranks_of_part(cell, part)[replica]
            )
    neighbours = dataclasses.replace(cell, rank_placement="replica_major")
    assert ranks_of_replica(neighbours, 1) == [3, 4, 5] and ranks_of_part(cell, 1) == [2, 3]


def test_servers_stand_behind_the_workers_of_every_part():
    cell = Cell(
        parallel="tensor", model_parallel=2, replicas=2, topology="parameter_server", servers=2
    )
    assert [ranks_of_part(cell, part) for part in range(2)] == [[0, 2, 4, 5], [1, 3, 4, 5]]


def test_pieces_of_all_parts_join_to_the_whole_and_a_missing_one_is_seen():
    shapes = {"a": torch.Size((4, 3)), "b": torch.Size((2,))}
    parameters = {name: torch.randn(shape) for name, shape in shapes.items()}
    first = [Piece("a", torch.Size((1, 3))), whole("b", shapes["b"])]
    second = ordered(
        [whole("b", shapes["b"], owned=False), Piece("a", torch.Size((3, 3)), start=1)]
    )
    vectors = [cut(parameters, pieces) for pieces in (first, second)]
    assert torch.equal(
        join(vectors, [first, second], shapes),
        torch.cat([p.reshape(-1) for p in parameters.values()]),
    )
    assert [num_owned(first), num_owned(second), vectors[1].numel()] == [5, 9, 11]
    assert list(shapes_of(second)) == ["a", "b"], "what is owned stands first"
    assert torch.isnan(join(vectors[:1], [first], shapes)).sum() == 9


def test_traffic_without_a_part_of_it_is_the_rest():
    traffic = Traffic()
    traffic.add(0, 1, 10)
    traffic.add(1, 0, 5)
    rest = traffic.minus(Traffic({(0, 1): 10}, {(0, 1): 1}))
    assert (rest.payload, rest.messages) == ({(1, 0): 5}, {(1, 0): 1})
    with pytest.raises(AssertionError, match="no part of"):
        traffic.minus(Traffic({(0, 1): 11}))


def test_a_server_keeps_something_for_every_part():
    cell = tiny(
        parallel="pipeline", model_parallel=2, replicas=2, topology="parameter_server", servers=1
    )
    one = tiny(parallel="data", replicas=2, topology="parameter_server", servers=1)
    assert kept(cell)["server"] == kept(one)["server"], (
        "three vectors of the whole model, part by part"
    )


def test_a_replica_of_two_sends_what_each_part_sends_and_what_is_sent_inside():
    whole_replicas = predicted(tiny(replicas=2, topology="ring"))
    product = predicted(tiny(parallel="fsdp", model_parallel=2, replicas=2, topology="ring"))
    between = sum(count for (a, b), count in product.payload.items() if a // 2 != b // 2)
    assert between == whole_replicas.payload_bytes and product.payload_bytes > between


@pytest.mark.procs
@pytest.mark.timeout(120)
def test_the_result_of_model_parallel_replicas_is_the_same_again_and_its_times_stand_elsewhere(
    tmp_path: Path,
):
    again = dataclasses.replace(PRODUCT, topology="ring", servers=None, replicas=1)
    for folder in ("first", "second"):
        benchsuite.run(again, results=tmp_path / folder)
    first, second = (next(iter(Store(tmp_path / folder).runs())) for folder in ("first", "second"))
    assert first.status == "ok", first.reason
    assert json.dumps(first.result) == json.dumps(second.result)
    assert [part["busy_s"] > 0 for part in first.cost["parts"]] == [True, True]
    assert first.cost["parts"] != second.cost["parts"]


@pytest.mark.procs
@pytest.mark.timeout(120)
@pytest.mark.parametrize("sync", ["synchronous", "local_sgd"])
def test_shards_are_evaluated_when_whole_replicas_are(sync: str, tmp_path: Path):
    """A part of fsdp counts its own share of the samples; the curve is against those of all."""
    whole = Cell(
        workload="mlp",
        preset="smoke",
        replicas=2,
        sync=sync,
        topology="ring",
        precision="fp64",
        budget=SHORT,
    )
    benchsuite.run(
        [whole, dataclasses.replace(whole, parallel="fsdp", model_parallel=2)], results=tmp_path
    )
    runs = {run.cell.parallel: run for run in Store(tmp_path).runs()}
    assert runs["fsdp"].status == "ok", runs["fsdp"].reason
    one, other = (runs[name].result["evaluations"] for name in ("data", "fsdp"))
    assert one["samples"] == other["samples"] and len(one["samples"]) > 1
    gap = max(abs(a - b) for a, b in zip(one["metric"], other["metric"], strict=True))
    assert gap < 1e-10, f"metrics differ by {gap}"
    assert runs["data"].result["loss"] == pytest.approx(runs["fsdp"].result["loss"], rel=1e-10)


@pytest.mark.procs
@pytest.mark.timeout(120)
def test_a_product_runs_from_the_command_to_the_run_file(tmp_path: Path):
    benchsuite.run([PRODUCT, Cell(workload="cnn", preset="smoke", budget=SHORT)], results=tmp_path)
    runs = {run.cell.parallel: run for run in Store(tmp_path).runs()}
    product = runs["pipeline"]
    alone = runs["data"]
    assert product.status == "ok", product.reason
    result = product.result
    one = alone.result
    assert result["num_parameters"] == one["num_parameters"] == sum(result["parallel"]["owned"])
    assert result["samples"] == one["samples"], "a sample that two parts worked on is one"
    gap = max(abs(a - b) for a, b in zip(result["loss"], one["loss"], strict=True))
    assert gap < 1e-5, f"losses of one process and of the product differ by {gap}"
    assert result["payload_bytes"] == result["predicted_bytes"]
    parts = result["parallel"]
    assert parts["inside_bytes"] + parts["between_bytes"] == result["payload_bytes"]
    assert parts["between_bytes"] == 2 * 2 * 4 * one["num_parameters"] * result["steps"], (
        "2 N M per step"
    )
    assert product.cost["window"]["samples"] <= result["samples"]
    assert abs(result["final_metric"] - one["final_metric"]) < 0.02
