"""The transformer: its source and what can be known of it, its data, its chain of layers, its size
and operations."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchsuite.workloads import transformer
from benchsuite.workloads.transformer import Rotation, Workload, presets
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchsuite import rules
from benchsuite.laws import synchronous
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.workload import seeded_layers, trained_parameters
from tests import virtual_runs

SIZES = {
    "markov": 99_136,
    "smoke": 99_136,
    "comm": 3_279_104,
    "gpu": 124_373_760,
    "gpu_medium": 354_599_936,
    "cluster": 1_011_165_184,
}


def made(
    preset: str = "markov", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Workload:
    fields = {field.name for field in dataclasses.fields(Workload)}
    workload = Workload(
        **{**{key: value for key, value in presets[preset].items() if key in fields}, **options}
    )
    workload.start(seed=seed, dtype=dtype)
    return workload


def model(workload: Workload, seed: int = 0) -> nn.Module:
    return nn.Sequential(*seeded_layers(workload, seed))


# the source


def entropy(distribution: np.ndarray, weights: np.ndarray) -> float:
    return float(-(weights[..., None] * distribution * np.log(distribution)).sum())


def test_the_source_s_entropy_rate_is_0_5360_nats_and_one_symbol_of_memory_costs_1_17_more() -> (
    None
):
    table = transformer.source()
    assert np.allclose(table.sum(-1), 1) and (table > 0).all()
    pairs = transformer.stationary(table)
    assert np.abs(np.einsum("ab,abc->bc", pairs, table) - pairs).max() < 1e-12, "not stationary"
    floor = entropy(table, pairs)
    assert abs(floor - 0.5360) < 5e-5, f"entropy rate {floor}, known 0.5360"
    joint = np.einsum("ab,abc->bc", pairs, table)
    bigram = entropy(joint / joint.sum(1, keepdims=True), joint.sum(1))
    assert abs(bigram - floor - 1.17) < 5e-3, f"one symbol of memory costs {bigram - floor} more"


def test_sequences_follow_the_source() -> None:
    rows = transformer.source_sequences(np.random.default_rng(1), 4000, 33)
    table = transformer.source()
    pairs = transformer.stationary(transformer.source())
    counts = np.zeros_like(table)
    np.add.at(counts, (rows[:, :-2], rows[:, 1:-1], rows[:, 2:]), 1)
    expected = 4000 * 31 * pairs[..., None] * table
    deviation = np.abs(counts - expected) / np.sqrt(expected + 1)
    assert deviation.mean() < 1.5 and deviation.max() < 10, (deviation.mean(), deviation.max())
    floor = entropy(table, pairs)
    found = transformer.realised_nats(rows)
    assert abs(found - floor) < 0.02, f"realised {found}, entropy rate {floor}"


def test_the_source_itself_as_the_model_has_no_excess_and_a_uniform_guess_ln_8_minus_the_floor() -> (
    None
):
    workload = made()
    table = torch.from_numpy(transformer.source()).log()

    def perfect(x: torch.Tensor) -> torch.Tensor:
        before = torch.cat([x[:, :1], x[:, :-1]], 1)
        return table[before, x]

    excess = workload.evaluate(perfect)
    assert abs(excess) < 1e-12, excess
    uniform = workload.evaluate(lambda x: torch.zeros(*x.shape, 8))
    assert (
        abs(uniform - (math.log(8) - transformer.realised_nats(workload._test.numpy()))) < 1e-6
    ), uniform


# data


@pytest.mark.parametrize("data", ["markov", "random", "text"])
def test_shards_of_any_number_of_workers_are_the_same_global_batch(
    data: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": data}
    if data == "text":
        (tmp_path / "words").write_bytes(bytes(range(256)) * 40)
        options |= {"path": str(tmp_path / "words"), "symbols": 256}
    one = made(**options)
    again = made(**options)
    for index in (0, 1, 31, 32, 33, 200):  # a block of 1024 ends with batch 31
        whole = one.batch(index, shard=0, num_shards=1)
        assert whole.x.shape == whole.y.shape == (32, 32) and torch.equal(
            whole.x[:, 1:], whole.y[:, :-1]
        )
        for workers in (2, 4, 32):
            shards = [
                again.batch(index, shard=shard, num_shards=workers) for shard in range(workers)
            ]
            assert torch.equal(torch.cat([shard.x for shard in shards]), whole.x), (index, workers)
    other = made(seed=1, **options)
    assert not torch.equal(
        other.batch(0, shard=0, num_shards=1).x, one.batch(0, shard=0, num_shards=1).x
    )
    assert torch.equal(other._test, one._test), "what is held out must not depend on the seed"


def test_a_batch_over_the_end_of_a_block_is_drawn_from_both() -> None:
    workload = made(global_batch=48)
    whole = workload.batch(21, shard=0, num_shards=1).x  # sequences 1008 to 1055
    assert torch.equal(whole[:16], workload._rows(1008, 16)[:, :-1])
    assert torch.equal(whole[16:], workload._rows(1024, 32)[:, :-1])


def test_a_text_is_read_as_bytes_and_its_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_bytes(b"a" * 9000 + b"b" * 1000)
    workload = made(data="text", path=str(path), symbols=256)
    assert (workload._test == ord("b")).all() and len(workload._test) == 1000 // 33
    assert all(
        (workload.batch(index, shard=0, num_shards=1).x == ord("a")).all() for index in range(20)
    )
    assert workload.data_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"ab" * 20)
    with pytest.raises(ValueError, match="40 bytes, too few for sequences of 33: at least 67"):
        made(data="text", path=str(path), symbols=256)
    for wrong in ("", "words"):
        with pytest.raises(
            ValueError, match=f"path = '{wrong}', but data = text needs the whole path"
        ):
            made(data="text", path=wrong, symbols=256)


def test_a_run_file_has_the_sha256_of_its_text_and_none_where_there_is_no_text(
    tmp_path: Path,
) -> None:
    (tmp_path / "words").write_bytes(bytes(range(256)) * 40)
    options = {"data": "text", "path": str(tmp_path / "words"), "symbols": 256}
    for given, known in ((options, hashlib.sha256(bytes(range(256)) * 40).hexdigest()), ({}, None)):
        cell = resolve(
            Cell(
                workload="transformer",
                preset="smoke",
                clock="virtual",
                budget=Budget(steps=2),
                options={"transformer": given},
            )
        )
        result, _, _ = virtual_runs.run(cell, tmp_path)
        assert result.get("data_sha256") == known


def test_the_standard_library_is_a_text_of_some_megabytes() -> None:
    workload = made(data="stdlib", symbols=256)
    assert len(workload._text) > 2**20
    assert b"import" in bytes(workload._text[:100_000])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"symbols": 9}, r"symbols\(9\) != 8"), ({"heads": 5}, r"width\(64\) % heads\(5\)")],
)
def test_options_that_do_not_fit_are_refused_past_the_rules_too(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        made(**options)


# the model


@pytest.mark.parametrize("preset", presets)
def test_parameters_of_every_preset_on_the_meta_device(preset: str) -> None:
    workload = made(preset)
    with torch.device("meta"):
        chain = nn.Sequential(*workload.layers())
    found = sum(p.numel() for p in trained_parameters(chain).values())
    assert found == SIZES[preset], f"{found} parameters, known {SIZES[preset]}"
    assert len(chain) == presets[preset]["num_layers"] == len(workload.layer_flops())
    if preset == "markov":
        assert len(trained_parameters(chain)) == 14


@pytest.mark.parametrize("preset", ["markov", "comm"])
def test_a_prediction_depends_on_nothing_that_comes_after_it(preset: str) -> None:
    workload = made(preset)
    network = model(workload)
    x = workload.batch(0, shard=0, num_shards=workload.global_batch).x.clone()
    middle = workload.context // 2
    with torch.no_grad():
        before = network(x)
        x[:, middle] = (x[:, middle] + 1) % workload.symbols
        after = network(x)
    assert torch.allclose(before[:, :middle], after[:, :middle], atol=1e-6)
    assert not torch.allclose(before[:, middle:], after[:, middle:], atol=1e-6)


def test_a_rotated_query_and_key_know_only_their_distance() -> None:
    turn = Rotation(32, 16).double()
    query = torch.randn(16, dtype=torch.float64)
    key = torch.randn(16, dtype=torch.float64)
    queries = turn(query.expand(32, 16))
    keys = turn(key.expand(32, 16))
    for distance in (0, 1, 7):
        products = torch.stack([queries[at + distance] @ keys[at] for at in range(32 - distance)])
        assert float(products.std()) < 1e-6, distance
    assert abs(float(queries[0] @ keys[0] - query @ key)) < 1e-12


@pytest.mark.parametrize("preset", ["markov", "comm"])
def test_operations_by_formula_are_those_that_torch_counts(preset: str) -> None:
    workload = made(preset)
    network = model(workload)
    x = workload.batch(0, shard=0, num_shards=1).x[:2]
    for layer, formula in zip(network, workload.layer_flops(), strict=True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            x = layer(x)
        counted = counter.get_total_flops() / 2
        assert counted == formula, (
            f"{type(layer).__name__}: {counted} counted, {formula} by formula"
        )


def test_the_fused_attention_equals_the_mathematical_one() -> None:
    workload = made("comm", context=64)
    plain = model(workload)
    fused = model(workload)
    for block in fused[1:-1]:
        block._fused = True
    x = workload.batch(0, shard=0, num_shards=1).x[:2]
    assert torch.allclose(plain(x), fused(x), atol=1e-5)


@pytest.mark.parametrize(
    ("clock", "optimizer", "replicas"),
    [
        ("wall", "adamw", 2),
        ("wall", "adamw", 4),
        ("wall", "sgd", 2),
        ("wall", "muon", 2),
        ("virtual", "adamw", 4),
        ("virtual", "muon", 2),
    ],
)
def test_workers_together_make_the_step_of_one_process(
    clock: str, optimizer: str, replicas: int
) -> None:
    """10 steps with clipping in float64. In virtual time gradients are computed in groups."""
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    cell = resolve(
        Cell(
            workload="transformer",
            preset="smoke",
            topology="ring",
            replicas=replicas,
            precision="fp64",
            budget=Budget(steps=10),
            clock=clock,
            options={"transformer": {"optimizer": optimizer}},
        )
    )
    assert rules.validate(cell) == []
    figure = synchronous.equals_one_process(
        virtual_ranks if clock == "virtual" else thread_ranks, cell
    )
    assert figure.value <= 1e-10, f"{figure.value} from one process, bound 1e-10: {figure.detail}"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    workload = made(optimizer="muon")
    named = trained_parameters(model(workload))
    optimizer = workload.recipe().optimizer_of(named)
    names = {id(p): name for name, p in named.items()}
    matrices, rest = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert matrices == {
        f"{block}.{part}.weight" for block in (1, 2) for part in ("qkv", "out", "up", "down")
    }
    assert rest == set(named) - matrices and "0.symbols.weight" in rest


def test_the_cell_s_id_does_not_know_optimisers_that_came_later() -> None:
    plain, named = (
        resolve(Cell(workload="transformer", options=given))
        for given in ({}, {"transformer": {"optimizer": "adamw"}})
    )
    other = resolve(Cell(workload="transformer", options={"transformer": {"optimizer": "sgd"}}))
    assert plain.id == named.id == "5dd6367c9df9" and other.id != plain.id
