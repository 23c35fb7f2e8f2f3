"""Cells trained by the real worker in fresh processes: bytes, equal losses, repetition, divergence,
stragglers."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from benchsuite.results.record import DIVERGED, Run, dumps
from tests.bench import Bench
from tests.test_store import SCHEMA

pytestmark = [pytest.mark.procs, pytest.mark.timeout(60)]

PARAMETERS = 8 * (8 * 8 + 8) + 8 + 1  # of the tiny workload
VECTOR_BYTES = 4 * PARAMETERS
STEPS = 10


def ways(sync: str, *, servers: int | None = None) -> dict[str, Any]:
    return {"sync": sync, "topology": "parameter_server", "servers": servers}


RING: dict[str, Any] = {"sync": "synchronous", "topology": "ring"}
NATIVE: dict[str, Any] = {"sync": "synchronous", "topology": "native"}
DDP: dict[str, Any] = {"sync": "ddp", "topology": "native"}
COUNTED = [
    RING,
    ways("synchronous", servers=1),
    ways("synchronous", servers=2),
    ways("asynchronous", servers=1),
    ways("asynchronous", servers=2),
    ways("k_sync", servers=1),
]


def label(way: dict[str, Any]) -> str:
    return "-".join(str(value) for value in way.values())


# bytes


def expected_bytes(way: dict[str, Any], replicas: int, clip: bool) -> int:
    """By hand. Ring: 2 (N-1) M per step in all; server: M each way per batch share; S-1 norms each
    way per clipping."""
    if way["topology"] == "ring":
        return STEPS * 2 * (replicas - 1) * VECTOR_BYTES
    norms = STEPS * 2 * (way["servers"] - 1) * 8 if clip and way["sync"] == "synchronous" else 0
    return STEPS * replicas * 2 * VECTOR_BYTES + norms


@pytest.mark.parametrize("clip_norm", [0.0, 0.5], ids=["", "clipped"])
@pytest.mark.parametrize("way", COUNTED, ids=label)
def test_predicted_is_payload_on_every_edge_over_the_whole_run(
    bench: Bench, way: dict[str, Any], clip_norm: float
) -> None:
    for replicas in (2, 3) if clip_norm else (1, 2):
        if way["sync"] == "k_sync" and replicas == 1:
            continue
        run = bench.ok(**way, replicas=replicas, tiny={"clip_norm": clip_norm, "lr": 0.01})
        result = run.result
        assert result["payload_source"] == "counted" and result["payload_reason"] is None
        assert result["predicted"]["payload"] == result["payload"]["payload"], run.cell.label
        assert result["predicted"]["messages"] == result["payload"]["messages"], run.cell.label
        wanted = expected_bytes(way, replicas, bool(clip_norm))
        assert result["predicted_bytes"] == result["payload_bytes"] == wanted, run.cell.label
        jsonschema.validate(json.loads(dumps(run.to_json())), SCHEMA)


@pytest.mark.parametrize("way", [NATIVE, DDP], ids=label)
def test_derived_bytes_are_calls_seen_times_the_rings_factor(
    bench: Bench, way: dict[str, Any]
) -> None:
    for replicas in (1, 3):
        run = bench.ok(**way, replicas=replicas)
        assert run.result["payload_source"] == "derived"
        assert run.result["payload_bytes"] == STEPS * 2 * (replicas - 1) * VECTOR_BYTES
        jsonschema.validate(json.loads(dumps(run.to_json())), SCHEMA)


def test_the_library_sends_no_constants_of_a_model(bench: Bench) -> None:
    """Masks and angles of a transformer's blocks (12,288 bytes) are buffers, which the library
    would send every step."""
    run = bench.ok(**DDP, workload="transformer", preset="smoke", replicas=2, steps=3)
    assert run.result["payload_bytes"] == run.result["predicted_bytes"] == 3 * 2 * 4 * 99_136


# 8 x 8 matrices as two factors of one column, all else as it is; from the third step on.
FACTORS = 2 * PARAMETERS + (STEPS - 2) * (8 * (2 * 8 + 8) + 8 + 1)
HOOKS: list[tuple[dict[str, Any], int]] = [
    ({"compression": "fp16"}, STEPS * PARAMETERS // 2),
    ({"compression": "bf16"}, STEPS * PARAMETERS // 2),
    ({"compression": "powersgd", "options": {"powersgd": {"rank": 1}}}, FACTORS),
    ({"options": {"ddp": {"local_steps": 5}}}, 2 * PARAMETERS),
    ({"options": {"ddp": {"local_steps": 3, "warmup_steps": 4}}}, 6 * PARAMETERS),
]


@pytest.mark.parametrize(("how", "elements"), HOOKS, ids=lambda value: str(value))
def test_bytes_of_the_librarys_hooks_are_derived_from_one_cycle_of_each_kind(
    bench: Bench, how: dict[str, Any], elements: int
) -> None:
    """By hand: elements of float32 on the whole run, 2 (N-1) times."""
    run = bench.ok(**DDP, **how, replicas=3)
    assert run.result["payload_source"] == "derived"
    assert run.result["payload_bytes"] == run.result["predicted_bytes"] == 4 * 4 * elements, (
        run.cell.label
    )
    assert run.result["steps"] == STEPS and run.result["final_metric"] is not None
    jsonschema.validate(json.loads(dumps(run.to_json())), SCHEMA)


def wire_ratio(run: Run) -> float:
    if run.cost["wire_bytes"] is None:
        pytest.skip(f"no private network here: {run.cost['wire_reason']}")
    return float(run.cost["wire_bytes"] / (run.result["payload_bytes"] + run.cost["control_bytes"]))


def _headers_only(run: Run) -> None:
    """Wire / (payload + control) is 1.00 to 1.02, but for segments that a busy kernel sent again:
    at most 64 KiB each."""
    ratio = wire_ratio(run)
    sent_again = run.cost["wire_retransmits"]
    most = 1.02 + sent_again * 65_536 / (run.result["payload_bytes"] + run.cost["control_bytes"])
    assert 1.0 <= ratio <= most, (
        f"wire / (payload + control) = {ratio:.4f}, {sent_again} segments sent again"
    )


COMPRESSED = [
    {**RING, "compression": "fp16"},
    {**DDP, "compression": "fp16"},
    {**DDP, "compression": "powersgd"},
    {**NATIVE, "compression": "topk", "options": {"topk": {"rho": 0.1}}},
    {"sync": "synchronous", "topology": "direct", "compression": "int8"},
    {**ways("asynchronous", servers=1), "compression": "int8"},
]


@pytest.mark.netns
@pytest.mark.parametrize(
    "way", [RING, ways("synchronous", servers=1), NATIVE, DDP, *COMPRESSED], ids=label
)
def test_the_wire_carries_what_was_sent(bench: Bench, way: dict[str, Any]) -> None:
    """Vectors of 1.2 MB (a tiny chain of width 192), 0.2 to 0.6 MB encoded. Headers, and nothing
    twice: 1.00 to 1.02."""
    run = bench.ok(**way, replicas=2, steps=5, tiny={"width": 192, "lr": 0.0001})
    _headers_only(run)


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.parametrize("way", [RING, ways("synchronous", servers=1), NATIVE, DDP], ids=label)
def test_the_wire_carries_what_was_sent_for_resnet_18(bench: Bench, way: dict[str, Any]) -> None:
    """44.7 MB per gradient."""
    run = bench.ok(**way, workload="cnn", preset="comm", replicas=2, steps=3, timeout_s=50)
    print(f"{run.cell.label}: wire / (payload + control) = {wire_ratio(run):.5f}")
    assert run.result["num_parameters"] == 11_173_962
    assert run.result["predicted_bytes"] == run.result["payload_bytes"]
    _headers_only(run)


# equal losses


SAME_SUM = [RING, ways("synchronous", servers=1), ways("synchronous", servers=2), NATIVE, DDP]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_workers_lose_bit_for_bit_the_same_over_every_topology(bench: Bench, seed: int) -> None:
    """a + b = b + a: at N = 2 no order of addition can differ. Real digits, 8 steps."""
    runs = [
        bench.ok(**way, workload="cnn", preset="smoke", replicas=2, seed=seed, steps=8)
        for way in SAME_SUM
    ]
    for run in runs[1:]:
        assert run.result["loss"] == runs[0].result["loss"], (
            f"{run.cell.label} and {runs[0].cell.label}"
        )
        assert run.result["checksum"] == runs[0].result["checksum"], (
            f"{run.cell.label} and {runs[0].cell.label}"
        )
    assert runs[0].result["loss"][-1] < runs[0].result["loss"][0]


def test_four_workers_in_float64_lose_the_same_to_1e_10(bench: Bench) -> None:
    one = bench.ok(**RING, replicas=1, precision="fp64", tiny={"lr": 0.01})
    for way in SAME_SUM:
        run = bench.ok(**way, replicas=4, precision="fp64", tiny={"lr": 0.01})
        gap = max(abs(a - b) for a, b in zip(run.result["loss"], one.result["loss"], strict=True))
        assert gap < 1e-10, f"{run.cell.label}: {gap:.3g} from one process"


def test_one_asynchronous_worker_is_evaluated_alike_whatever_its_servers(bench: Bench) -> None:
    """Its servers' slices, joined, are the parameters of one process: same curve, same bits."""
    one = bench.ok(**RING, replicas=1)
    for servers in (1, 2, 3):
        run = bench.ok(**ways("asynchronous", servers=servers), replicas=1)
        assert run.result["evaluations"]["samples"] == [0, 48, 96, 144, 192, 240]
        assert run.result["evaluations"]["metric"] == one.result["evaluations"]["metric"], (
            f"S = {servers}"
        )
        assert run.result["checksum"] == one.result["checksum"], f"S = {servers}"
        assert run.result["staleness"]["max"] == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_four_workers_in_float64_reach_the_target_in_the_same_evaluation(bench: Bench) -> None:
    """Cells of the digits plan, in half of its 240 steps: the target comes after 70."""
    digits: dict[str, Any] = {
        "workload": "cnn",
        "preset": "digits",
        "replicas": 4,
        "precision": "fp64",
        "steps": 120,
        "timeout_s": 100,
    }
    runs = [bench.ok(**way, **digits) for way in SAME_SUM]
    for run in runs:
        gap = max(
            abs(a - b) for a, b in zip(run.result["loss"], runs[0].result["loss"], strict=True)
        )
        print(
            f"{run.cell.label}: gap {gap:.3g}, 97.5 % after {run.result['samples_to']['target']} samples"
        )
        assert gap < 1e-10
        assert run.result["samples_to"] == runs[0].result["samples_to"]
    assert runs[0].result["samples_to"]["target"] is not None


# repetition


@pytest.mark.parametrize("way", SAME_SUM, ids=label)
def test_a_repeated_synchronous_cell_has_the_same_result_byte_for_byte(
    bench: Bench, way: dict[str, Any]
) -> None:
    first, second = (bench.ok(**way, replicas=3) for _ in range(2))
    assert dumps(first.result) == dumps(second.result)
    assert first.run_id != second.run_id


# divergence


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize(
    "way", [*SAME_SUM, ways("asynchronous", servers=1), ways("asynchronous", servers=2)], ids=label
)
def test_a_loss_that_is_not_finite_ends_the_run_as_a_miss(
    bench: Bench, way: dict[str, Any], replicas: int
) -> None:
    """Global batch 3 is NaN. An asynchronous worker's share of batch 2 may come after another's of
    batch 3."""
    run = bench.ok(**way, replicas=replicas, tiny={"nan_at": 3, "lr": 0.001}, timeout_s=10)
    result = run.result
    assert DIVERGED in run.flags
    step = result["diverged_step"]
    assert result["loss"].index(None) == step
    assert (
        step == 3
        if way["sync"] != "asynchronous"
        else run.raw["push_log"]["tag"][step] // replicas == 3
    )
    assert result["final_loss"] is result["final_metric"] is None
    assert result["samples"] < 240, "it stops instead of using the budget up"
    assert set(result["samples_to"].values()) == set(run.cost["time_to"].values()) == {None}
    if way["sync"] == "ddp" and replicas > 1:
        assert result["payload_bytes"] is None and "diverged" in result["payload_reason"]
    else:
        assert result["predicted_bytes"] == result["payload_bytes"]
    jsonschema.validate(json.loads(dumps(run.to_json())), SCHEMA)


LOSSY = [
    {**RING, "compression": "bf16"},
    {**RING, "compression": "powersgd"},
    {**DDP, "compression": "powersgd"},
    {**NATIVE, "compression": "topk"},
    {**NATIVE, "compression": "ef_sign"},
    {"sync": "synchronous", "topology": "direct", "compression": "int8"},
    {**ways("asynchronous", servers=1), "compression": "int8"},
    {**ways("k_sync", servers=1), "compression": "topk"},
]


@pytest.mark.parametrize("way", LOSSY, ids=label)
def test_a_loss_that_is_not_finite_survives_a_compression(
    bench: Bench, way: dict[str, Any]
) -> None:
    run = bench.ok(**way, replicas=2, tiny={"nan_at": 3, "lr": 0.001}, timeout_s=10)
    assert DIVERGED in run.flags and run.result["diverged_step"] is not None
    assert run.result["samples"] < 240, "it stops instead of using the budget up"


def test_votes_on_what_is_not_finite_are_finite_and_the_losses_say_it(bench: Bench) -> None:
    run = bench.ok(
        **NATIVE, compression="sign", replicas=2, tiny={"nan_at": 3, "lr": 0.001}, timeout_s=10
    )
    assert (
        DIVERGED in run.flags
        and run.result["diverged_step"] == 3
        and run.result["final_loss"] is None
    )


def test_parameters_that_overflow_between_two_pushes_are_a_divergence(bench: Bench) -> None:
    """No push carries the loss that is not finite: the servers never see it, the workers' files
    do."""
    for way in (ways("k_sync", servers=1), ways("asynchronous", servers=1)):
        run = bench.ok(**way, replicas=2, tiny={"lr": 3e38}, timeout_s=10)
        assert DIVERGED in run.flags and run.result["diverged_step"] is not None, way
        assert (
            run.result["final_loss"] is None
            and run.result["loss"][run.result["diverged_step"]] is None
        )


# time


@pytest.mark.parametrize("way", [RING, NATIVE, DDP, ways("synchronous", servers=1)], ids=label)
def test_totals_are_the_sums_of_the_steps_and_nothing_is_later_than_the_end(
    bench: Bench, way: dict[str, Any]
) -> None:
    """The step under the dispatch mode, the barriers and the evaluation after the loop count
    nowhere."""
    run = bench.ok(**way, workload="cnn", preset="smoke", replicas=2, steps=7)
    assert run.cost["evaluation_s"][-1] <= run.cost["wall_s"]
    for rank in (split for split in run.cost["ranks"] if split["role"] == "worker"):
        parts = sum(rank[name] for name in ("data_s", "compute_s", "blocked_s", "update_s"))
        assert parts == pytest.approx(rank["wall_s"], rel=1e-6), (rank, way)


# stragglers


@pytest.mark.parametrize("sync", ["synchronous", "asynchronous"])
def test_who_waits_for_a_slow_worker_is_recorded(bench: Bench, sync: str) -> None:
    """Worker 0 is 4 times slower, on real digits; the page draws each rank's split from this."""
    run = bench.ok(
        **ways(sync, servers=1),
        workload="cnn",
        preset="smoke",
        replicas=2,
        straggler={"0": 4.0},
        steps=20,
    )
    slow, fast, server = run.cost["ranks"]
    assert slow["straggler"]["factor"] == 4.0 and slow["straggler"]["how"] in ("busy", "sleep")
    assert fast["straggler"] is server["straggler"] is None
    for split in (slow, fast, server):
        parts = sum(
            split[part] for part in ("data_s", "compute_s", "blocked_s", "update_s", "idle_s")
        )
        assert parts == pytest.approx(run.cost["wall_s"], rel=0.02), split
    if sync == "synchronous":
        assert slow["steps"] == fast["steps"] == 20
    else:
        assert slow["steps"] + fast["steps"] == 40 and slow["steps"] < fast["steps"], (
            "the fast one takes more batches"
        )
    assert (run.result["staleness"] is None) == (sync == "synchronous")
