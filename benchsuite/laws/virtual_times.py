"""Laws of time and staleness under the virtual clock, where theory has a closed form.

There are no gradients, and links are free. Times of an update are those of Dutta et al. 2018,
section 4, where m is the mean compute time and X_(K:n) the K-th smallest of n: synchronous
E[X_(n:n)], K-sync E[X_(K:n)], K-batch-async K m / n for any distribution, asynchronous m / n. For
exponential times E[X_(K:n)] = (H_n - H_(n-K)) m, and by their lack of memory K-async equals K-sync,
and K-batch-sync takes K m / n.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.runs import option, with_options
from benchsuite.plan import compute_time
from benchsuite.plan.cell import Budget, Cell, global_batch, resolve
from benchsuite.results.assemble.virtual import sections
from benchsuite.virtual.world import simulate

GRADIENTS = 100_000
ONE_PERCENT = 0.01
TWO_PERCENT = 0.02


def harmonic(n: int) -> float:
    """H_n = 1 + 1/2 + .. + 1/n."""
    return math.fsum(1 / k for k in range(1, n + 1))


def expected_update_s(cell: Cell) -> float | None:
    """The mean virtual seconds between two updates of the server, or steps of all workers.

    None where no closed form is known.
    """
    n = cell.num_workers
    table = cell.compute_time or compute_time.DEFAULT
    kind = table["kind"]
    mean = compute_time.mean_s(table, global_batch(cell) / n)
    if mean is None or cell.straggler:
        return None
    if cell.sync == "asynchronous":
        return mean / n
    k = n
    if cell.sync == "k_sync":
        k = n - int(option(cell, "k_sync", "backup_workers"))
        wait = option(cell, "k_sync", "wait")
        batch = option(cell, "k_sync", "batch")
        if not wait and batch:
            return k * mean / n
        if wait and option(cell, "k_sync", "late") != "cancel" and k < n:
            return None
        if batch:
            return k * mean / n if kind == "exponential" else None
        if not wait and kind != "exponential":
            return None
    elif cell.sync != "synchronous":
        return None
    if kind == "exponential":
        return mean * (harmonic(n) - harmonic(n - k))
    return mean if kind == "fixed" else None


def timed(cell: Cell, gradients: int = GRADIENTS) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """`result` and `cost` of the cell without gradients and links, over so many gradients."""
    share = global_batch(cell) // cell.num_workers
    budget = Budget(samples=gradients * share, timeout_s=cell.budget.timeout_s)
    bare = dataclasses.replace(
        cell, gradients="none", budget=budget, link_mbit=None, link_latency_us=None
    )
    with tempfile.TemporaryDirectory() as folder:
        simulated = simulate(resolve(bare), folder)
    result, cost, _ = sections(bare, simulated.records, simulated.facts)
    return result, cost


def updates_take(
    make_ranks: MakeRanks,
    cell: Cell,
    *,
    gradients: int = GRADIENTS,
    bound: float = ONE_PERCENT,
    instead: Mapping[str, Any] | None = None,
) -> Figure:
    """The mean time between updates is that of theory, within 1 or 2 %.

    `instead` gives options of k_sync that run in the place of the cell's, which is what the twins
    do.
    """
    cell = resolve(cell)
    expected = expected_update_s(cell)
    assert expected is not None
    result, cost = timed(
        cell if instead is None else with_options(cell, "k_sync", **instead), gradients
    )
    found = cost["virtual_s"] / result["updates"]
    return Figure(
        abs(found / expected - 1),
        bound,
        f"{found:.5f} s per update, theory {expected:.5f} s, {cell.label}",
    )


def staleness_is_geometric(
    make_ranks: MakeRanks, cell: Cell, *, gradients: int = GRADIENTS, workers: int | None = None
) -> Figure:
    """With exponential times staleness is geometric with p = 1/N.

    Its standard deviation is sqrt(N (N - 1)), within 2 %. The twin expects one worker more.
    """
    result, _ = timed(resolve(cell), gradients)
    histogram = {int(value): count for value, count in result["staleness"]["histogram"].items()}
    total = sum(histogram.values())
    mean = sum(value * count for value, count in histogram.items()) / total
    found = math.sqrt(
        sum((value - mean) ** 2 * count for value, count in histogram.items()) / total
    )
    n = workers or cell.num_workers
    expected = math.sqrt(n * (n - 1))
    text = f"standard deviation {found:.4f}, theory {expected:.4f}; mean {mean:.4f}, {cell.label}"
    return Figure(abs(found / expected - 1), TWO_PERCENT, text)


def equal_workers_take_turns(make_ranks: MakeRanks, cell: Cell, *, shift: int = 0) -> Figure:
    """With equal fixed times every gradient after the first N updates is N - 1 versions old.

    `shift` expects another number, which is what the twin does. Bound: exact.
    """
    result, _ = timed(resolve(cell), gradients=50 * cell.num_workers)
    histogram = dict(result["staleness"]["histogram"])
    n = cell.num_workers
    for first in range(n):  # in the first round every worker starts from version 0
        histogram[str(first)] = histogram.get(str(first), 0) - 1
    wrong = sum(abs(count) for value, count in histogram.items() if int(value) != n - 1 + shift)
    return Figure(
        wrong,
        0,
        f"{wrong} gradients of another staleness than {n - 1 + shift}: {histogram}, {cell.label}",
    )


def _is_virtual(cell: Cell) -> bool:
    """Whether the cell is timed without gradients."""
    return cell.clock == "virtual"


def _exponential_asynchronous(cell: Cell) -> bool:
    """Whether the cell is asynchronous with exponential times and no straggler."""
    kind = (cell.compute_time or {}).get("kind")
    return (
        _is_virtual(cell)
        and cell.sync == "asynchronous"
        and kind == "exponential"
        and not cell.straggler
    )


_BASE: Mapping[str, Any] = {
    "clock": "virtual",
    "topology": "parameter_server",
    "servers": 1,
    "replicas": 8,
    "compute_time": {"kind": "exponential", "mean_s": 1.0},
}
_ON = {**_BASE, "sync": "k_sync", "options": {"k_sync": {"backup_workers": 4, "late": "cancel"}}}
_ASYNCHRONOUS = {**_BASE, "sync": "asynchronous"}
_EQUAL = {**_ASYNCHRONOUS, "compute_time": {"kind": "fixed", "mean_s": 1.0}}
_FEW = 20_000  # enough gradients to show a defect


def _control(broken: str, **instead: Any) -> Control:
    """A twin that runs other options than the cell's."""
    return Control(broken, partial(updates_take, gradients=_FEW, instead=instead), _ON)


EXPONENTIAL: Mapping[str, Any] = {"kind": "exponential", "mean_s": 1.0}
GAMMA: Mapping[str, Any] = {"kind": "gamma", "mean_s": 1.0, "cv": 0.1}
PARETO: Mapping[str, Any] = {"kind": "pareto", "mean_s": 1.0, "shape": 3.0}
FIXED: Mapping[str, Any] = {"kind": "fixed", "mean_s": 1.0}
# The cells that are timed: strategy, compute times, options of the strategy.
SHOWN: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = (
    ("k_sync", EXPONENTIAL, {"late": "cancel"}),  # K-sync
    ("k_sync", EXPONENTIAL, {"late": "cancel", "batch": True}),  # K-batch-sync
    ("k_sync", EXPONENTIAL, {"wait": False}),  # K-async, equal to K-sync
    *(
        ("k_sync", times, {"wait": False, "batch": True}) for times in (EXPONENTIAL, GAMMA, PARETO)
    ),  # K-batch-async
    ("synchronous", EXPONENTIAL, {}),
    ("asynchronous", EXPONENTIAL, {}),
    ("asynchronous", FIXED, {}),
)


def timing_cell(sync: str, times: Mapping[str, Any], *, replicas: int = 8, **options: Any) -> Cell:
    """A cell without gradients; in k_sync half of the workers make a version."""
    given = {sync: {"backup_workers": replicas // 2, **options}} if sync == "k_sync" else {}
    return resolve(
        Cell(
            workload="mlp",
            sync=sync,
            topology="parameter_server",
            replicas=replicas,
            clock="virtual",
            compute_time=dict(times),
            batch_mode="fixed_per_worker",
            gradients="none",
            options=given,
        )
    )


def _cells(asked: cases.Asked) -> list[Cell]:
    """Cells of eight workers, whatever numbers are asked for: a closed form is one of n and K."""
    shown = [
        each
        for each in SHOWN
        if asked.includes(sync=each[0], topology="parameter_server", compression="none")
    ]
    return [
        timing_cell(sync, times, **options)
        for sync, times, options in shown
        if asked.clock == "virtual"
    ]


CELLS = cases.Cells(_cells, cases.subject_of)
LAWS = (
    Law(
        "an update takes as long as theory says",
        updates_take,
        lambda cell: _is_virtual(cell) and expected_update_s(cell) is not None,
        (
            _control("one gradient more than K", backup_workers=3),
            _control("late gradients are finished, not given up", late="finish"),
            _control("gradients are counted, not workers", batch=True),
        ),
    ),
    Law(
        "staleness of exponential workers is geometric",
        staleness_is_geometric,
        _exponential_asynchronous,
        (
            Control(
                "one worker more",
                partial(staleness_is_geometric, gradients=_FEW, workers=9),
                _ASYNCHRONOUS,
            ),
        ),
    ),
    Law(
        "equal workers are N - 1 versions behind",
        equal_workers_take_turns,
        lambda cell: (
            _is_virtual(cell)
            and cell.sync == "asynchronous"
            and (cell.compute_time or compute_time.DEFAULT)["kind"] == "fixed"
            and not cell.straggler
        ),
        (Control("N versions behind", partial(equal_workers_take_turns, shift=1), _EQUAL),),
    ),
)
