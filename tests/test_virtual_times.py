"""Closed forms of time and staleness, met by the strategies' own files: n = 8, K = 4, mean 1, free
links, 1e5 gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from benchsuite import rules
from benchsuite.laws.virtual_times import (
    EXPONENTIAL,
    FIXED,
    GAMMA,
    LAWS,
    PARETO,
    expected_update_s,
    harmonic,
    timed,
    timing_cell,
    updates_take,
)
from benchsuite.plan.cell import Budget, Cell, resolve


def cell(sync: str, times: Mapping[str, Any], *, replicas: int = 8, **options: Any) -> Cell:
    made = timing_cell(sync, times, replicas=replicas, **options)
    assert rules.validate(made) == []
    return made


@pytest.mark.parametrize(
    ("made", "theory"),
    [
        pytest.param(
            cell("k_sync", EXPONENTIAL, late="cancel"), harmonic(8) - harmonic(4), id="K-sync"
        ),
        pytest.param(
            cell("k_sync", EXPONENTIAL, late="cancel", batch=True), 0.5, id="K-batch-sync"
        ),
        pytest.param(
            cell("k_sync", EXPONENTIAL, wait=False),
            harmonic(8) - harmonic(4),
            id="K-async = K-sync",
        ),
        pytest.param(
            cell("k_sync", EXPONENTIAL, wait=False, batch=True),
            0.5,
            id="K-batch-async, exponential",
        ),
        pytest.param(cell("k_sync", GAMMA, wait=False, batch=True), 0.5, id="K-batch-async, gamma"),
        pytest.param(
            cell("k_sync", PARETO, wait=False, batch=True), 0.5, id="K-batch-async, Pareto"
        ),
        pytest.param(
            cell("synchronous", EXPONENTIAL),
            harmonic(8),
            id="synchronous: efficiency 1/H_8 = 0.3679",
        ),
        pytest.param(cell("asynchronous", EXPONENTIAL), 1 / 8, id="asynchronous"),
    ],
)
def test_an_update_takes_what_theory_says_within_1_percent(made: Cell, theory: float) -> None:
    assert expected_update_s(made) == pytest.approx(theory, rel=1e-12)
    assert pytest.approx(0.6345, abs=5e-5) == harmonic(8) - harmonic(4)
    assert 1 / harmonic(8) == pytest.approx(0.3679, abs=5e-5)
    figure = updates_take(_no_ranks, made)
    assert figure.holds, figure


def test_k_async_is_strictly_faster_than_k_sync_where_times_have_a_memory() -> None:
    each = [
        timed(cell("k_sync", GAMMA, **form), 50_000)
        for form in ({"wait": False}, {"late": "cancel"})
    ]
    k_async, k_sync = (cost["virtual_s"] / result["updates"] for result, cost in each)
    assert k_async < 0.6 * k_sync, f"{k_async:.4f} s per update, K-sync {k_sync:.4f} s"


def test_asynchronous_makes_n_harmonic_n_times_the_updates_of_synchronous() -> None:
    asynchronous, synchronous = (
        timed(cell(sync, EXPONENTIAL), 100_000) for sync in ("asynchronous", "synchronous")
    )
    rates = [result["updates"] / cost["virtual_s"] for result, cost in (asynchronous, synchronous)]
    found = rates[0] / rates[1]
    theory = 8 * harmonic(8)
    assert theory == pytest.approx(21.74, abs=5e-3)
    assert abs(found / theory - 1) < 0.02, f"{found:.3f} times the updates, theory {theory:.3f}"
    samples = [
        result["samples"] / cost["virtual_s"] for result, cost in (asynchronous, synchronous)
    ]
    assert abs(samples[0] / samples[1] / harmonic(8) - 1) < 0.02, (
        f"{samples[0] / samples[1]:.4f}, {harmonic(8):.4f}"
    )


def test_synchronous_workers_are_busy_a_share_of_1_over_harmonic_n() -> None:
    _, cost = timed(cell("synchronous", EXPONENTIAL), 100_000)
    busy = 1 - cost["idle_share"]
    assert abs(busy * harmonic(8) - 1) < 0.01, f"busy {busy:.4f}, 1/H_8 = {1 / harmonic(8):.4f}"


@pytest.mark.parametrize("workers", [2, 8])
def test_staleness_of_exponential_workers_is_geometric(workers: int) -> None:
    law = next(law for law in LAWS if law.name == "staleness of exponential workers is geometric")
    made = cell("asynchronous", EXPONENTIAL, replicas=workers)
    assert law.applies(made)
    figure = law.check(_no_ranks, made)
    assert figure.holds, figure


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
def test_equal_workers_are_n_minus_1_versions_behind_after_the_first_round(workers: int) -> None:
    law = next(law for law in LAWS if law.name == "equal workers are N - 1 versions behind")
    made = cell("asynchronous", FIXED, replicas=workers)
    assert law.applies(made)
    figure = law.check(_no_ranks, made)
    assert figure.holds, figure


@pytest.mark.parametrize(
    ("sync", "form"),
    [
        ("asynchronous", {}),
        ("synchronous", {}),
        ("k_sync", {}),
        ("k_sync", {"late": "cancel"}),
        ("k_sync", {"late": "cancel", "batch": True}),
        ("k_sync", {"wait": False}),
    ],
)
@pytest.mark.parametrize("link", [None, 10.0])
def test_the_books_balance_in_every_run_also_on_slow_links(
    sync: str, form: dict[str, Any], link: float | None
) -> None:
    """`sections` raises where the tiling identity does not hold; a read that is miscounted breaks
    it."""
    from benchsuite.results.assemble.virtual import tiling_residual
    from benchsuite.virtual.world import simulate

    made = resolve(
        Cell(
            workload="mlp",
            sync=sync,
            topology="parameter_server",
            replicas=5,
            servers=1 if sync == "k_sync" else 2,
            clock="virtual",
            compute_time=EXPONENTIAL,
            gradients="none",
            batch_mode="fixed_per_worker",
            link_mbit=link,
            link_latency_us=link and 30_000.0,
            options={sync: form},
            budget=Budget(steps=100),
        )
    )
    servers = [record["server"] for record in simulate(made, "unused").records if record["server"]]
    assert [tiling_residual(server) for server in servers] == [0] * len(servers)
    servers[0]["last_read"][0] += 1
    assert tiling_residual(servers[0]) != 0


def _no_ranks(size: int, body: Any, *, strict: str = "") -> list[Any]:
    raise AssertionError("a law of virtual time starts its own ranks")
