"""Laws of costs: messages, bytes and, in virtual time, seconds are those of closed forms.

Ports are equal and full-duplex, with 80 Mbit/s and 50 us: 100 ns per byte. Times are those of a
mean that starts with nothing under way, and of a parameter server's first and later steps, with
servers on hosts of their own and beside workers.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchsuite.analysis import costs
from benchsuite.analysis.fits import Link
from benchsuite.comm import Comm
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.results.assemble.virtual import sections
from benchsuite.topology import Topology
from benchsuite.virtual.world import simulate
from benchsuite.worker import setup

MBIT = 80.0
LATENCY_US = 50.0
LINK = Link(LATENCY_US * 1e-6, 8 / (MBIT * 1e6))
TWO_PERCENT = 0.02
STEPS = 20  # steps after the first one

# A row of the table of costs for a vector of M bytes: the most bytes that one rank sends / M, the
# bytes of all ranks / M, and the most messages of one rank.
Row = tuple[float, float, int]


def _folded(n: int) -> Row:
    """The row of halving-doubling, in which ranks beyond a power of two are folded in first."""
    rounds = int(math.log2(n))
    inside = 1 << rounds
    extra = int(inside < n)
    return 2 * (inside - 1) / inside + extra, 2 * (n - 1), 2 * rounds + extra


TABLE: Mapping[str, Callable[[int], Row]] = {
    "ring": lambda n: (2 * (n - 1) / n, 2 * (n - 1), 2 * (n - 1)),
    "halving_doubling": _folded,
    "tree": lambda n: (math.ceil(math.log2(n)), 2 * (n - 1), math.ceil(math.log2(n))),
    "direct": lambda n: (2 * (n - 1) / n, 2 * (n - 1), 2 * (n - 1)),
}
SECONDS: Mapping[str, Callable[..., float]] = {
    "native": costs.ring_s,
    "ring": costs.ring_s,
    "halving_doubling": costs.halving_doubling_s,
    "tree": costs.tree_s,
    "direct": costs.direct_s,
}


def make(cell: Cell) -> Topology:
    """The cell's topology with its default options, in which a chunk is one message."""
    topology: Topology = setup.make("topology", cell.topology, {})
    return topology


def sends_the_table(make_ranks: MakeRanks, cell: Cell, *, times: int = 1, row: str = "") -> Figure:
    """One mean sends what the table of costs says.

    Compared are the bytes of the busiest rank, the bytes of all, and the messages of the busiest.
    `times` takes so many means; `row` reads another topology's row. Bound: exact. The twins send
    everything twice or take a ring for a tree.
    """
    n = cell.replicas
    numel = 4 * n * (1 << (n.bit_length() - 1))  # a size whose chunks are equal in every topology
    traffic = make(cell).predicted_traffic(numel, 4, num_workers=n).times(times)
    found = (_most(traffic.payload), traffic.payload_bytes, _most(traffic.messages))
    busiest, total, messages = TABLE[row or cell.topology](n)
    told = (round(busiest * 4 * numel), round(total * 4 * numel), messages)
    gap = sum(abs(a - b) for a, b in zip(found, told, strict=True))
    return Figure(
        gap, 0, f"(busiest rank's bytes, all, messages) {found}, table {told}, {cell.label}"
    )


def _most(counts: Mapping[tuple[int, int], int]) -> int:
    """The most that one rank sends."""
    per_rank: dict[int, int] = {}
    for (source, _), count in counts.items():
        per_rank[source] = per_rank.get(source, 0) + count
    return max(per_rank.values(), default=0)


def mean_takes(
    make_ranks: MakeRanks, cell: Cell, *, workers: int | None = None, numel: int = 26_880
) -> Figure:
    """One mean takes the virtual seconds of its closed form, within 2 %.

    `workers` puts another number into the closed form, which is what the twin does. Off powers of
    two the form is a bound from above: a tree has idle branches there, and in halving-doubling the
    first half that a partner sends may enter the port before the vector that is folded there, up to
    M/2 beta more.
    """

    def body(comm: Comm) -> int:
        topology = make(cell)
        topology.start(comm)
        topology.mean(torch.zeros(numel))
        return comm.now_ns()

    n = workers or cell.replicas
    found = max(virtual_ranks(cell.replicas, body, link_mbit=MBIT, latency_us=LATENCY_US)) / 1e9
    theory = SECONDS[cell.topology](LINK, num_workers=n, num_bytes=4 * numel)
    least = most = theory
    if cell.topology == "tree" and n.bit_count() > 1:
        least = 0.0
    if cell.topology == "halving_doubling" and n.bit_count() > 1:
        most += 2 * numel * LINK.beta_s_per_byte
    gap = max(found / most - 1, 1 - found / least if least else 0.0)
    return Figure(gap, TWO_PERCENT, f"{found:.6f} s, theory {theory:.6f} s, {cell.label}")


def served_steps(cell: Cell, steps: int) -> tuple[float, int, int]:
    """Virtual seconds, bytes of the busiest port and of the vector, of steps without computing."""
    small = Cell(
        workload="mlp",
        preset="smoke",
        topology="parameter_server",
        replicas=cell.replicas,
        servers=cell.num_servers,
        server_placement=cell.server_placement,
        clock="virtual",
        gradients="none",
        batch_mode="fixed_per_worker",
        compute_time={"kind": "fixed", "mean_s": 1e-9},
        link_mbit=MBIT,
        link_latency_us=LATENCY_US,
        budget=Budget(steps=steps),
        options={"mlp": {"num_parameters": 20_000}},
    )
    with tempfile.TemporaryDirectory() as folder:
        simulated = simulate(resolve(small), folder)
    result, cost, _ = sections(small, simulated.records, simulated.facts)
    return cost["virtual_s"], result["busiest_port_bytes"], 4 * result["num_parameters"]


def served_step_takes(
    make_ranks: MakeRanks, cell: Cell, *, with_workers: bool | None = None
) -> Figure:
    """A synchronous step over servers takes the seconds of its closed form, within 2 %.

    The first step and the later ones are compared. `with_workers` tells the form whether servers
    stand beside workers; the twin tells it wrongly.
    """
    beside = cell.server_placement == "with_worker" if with_workers is None else with_workers
    one, _, num_bytes = served_steps(cell, 1)
    many, _, _ = served_steps(cell, 1 + STEPS)
    n = cell.replicas
    s = cell.num_servers
    given: dict[str, Any] = {
        "num_workers": n,
        "num_bytes": num_bytes,
        "num_servers": s,
        "with_workers": beside,
    }
    goodbye = (
        LINK.alpha_s if n > 1 or not beside else 0.0
    )  # the run ends when the last one is there
    theory = (
        costs.parameter_server_first_s(LINK, **given) + goodbye,
        costs.parameter_server_s(LINK, **given),
    )
    found = one, (many - one) / STEPS
    gaps = [a / b - 1 if b else a for a, b in zip(found, theory, strict=True)]
    if beside and s > max(n - 2, 1):
        gaps[1] = max(gaps[1], 0.0)
    text = (
        f"first and later steps {found[0]:.5f} and {found[1]:.5f} s, theory {theory[0]:.5f} and "
        f"{theory[1]:.5f} s"
    )
    return Figure(
        max(map(abs, gaps)), TWO_PERCENT, f"{text}, {cell.label}, {cell.server_placement}"
    )


def served_port_carries(
    make_ranks: MakeRanks, cell: Cell, *, with_workers: bool | None = None
) -> Figure:
    """The busiest port carries the bytes of its closed form in a step over servers, within 2 %.

    Both directions count. The twin gives servers hosts of their own in the form only.
    """
    beside = cell.server_placement == "with_worker" if with_workers is None else with_workers
    _, found, num_bytes = served_steps(cell, 1)
    theory = costs.busiest_port_bytes(
        num_workers=cell.replicas,
        num_bytes=num_bytes,
        num_servers=cell.num_servers,
        with_workers=beside,
    )
    gap = abs(found / theory - 1) if theory else found
    return Figure(
        gap,
        TWO_PERCENT,
        f"{found} bytes, theory {theory:.0f}, {cell.label}, {cell.server_placement}",
    )


def _served(cell: Cell) -> bool:
    """Whether the cell is synchronous training over parameter servers."""
    return (
        cell.clock == "virtual"
        and cell.sync == "synchronous"
        and cell.topology == "parameter_server"
    )


_RING = {"topology": "ring", "replicas": 4, "clock": "virtual"}
_BESIDE: Mapping[str, Any] = {
    "topology": "parameter_server",
    "replicas": 4,
    "servers": 2,
    "clock": "virtual",
    "server_placement": "with_worker",
}

_SQUARE = {**_BESIDE, "servers": 4}


def _cells(asked: cases.Asked) -> list[Cell]:
    """Every mean; in virtual time also servers, on hosts of their own and beside the workers."""
    made = cases.means(asked)
    if not made or asked.clock == "wall" or not asked.includes(topology="parameter_server"):
        return made
    return made + [
        cases.tiny(
            topology="parameter_server",
            replicas=n,
            servers=s,
            server_placement=place,
            clock=asked.clock,
        )
        for place in ("own_host", "with_worker")
        for n in asked.workers
        for s in sorted({1, 2, n})
        if s <= n or place == "own_host"
    ]


CELLS = cases.Cells(_cells, cases.MEANS.subject)
LAWS = (
    Law(
        "a rank sends what the table of costs says",
        sends_the_table,
        lambda cell: cell.topology in TABLE and cell.replicas > 1,
        (
            Control("sends everything twice", partial(sends_the_table, times=2), _RING),
            Control("a ring taken for a tree", partial(sends_the_table, row="tree"), _RING),
        ),
    ),
    Law(
        "a mean takes the time of its closed form",
        mean_takes,
        lambda cell: cell.topology in SECONDS and cell.replicas > 1 and cell.clock == "virtual",
        (Control("one worker more", partial(mean_takes, workers=5), _RING),),
    ),
    Law(
        "a step over parameter servers takes the time of its closed form",
        served_step_takes,
        _served,
        (
            Control(
                "the servers have hosts of their own",
                partial(served_step_takes, with_workers=False),
                _BESIDE,
            ),
        ),
    ),
    Law(
        "the busiest port of a step over parameter servers carries what theory says",
        served_port_carries,
        _served,
        (
            Control(
                "the servers have hosts of their own",
                partial(served_port_carries, with_workers=False),
                _SQUARE,
            ),
        ),
    ),
)
