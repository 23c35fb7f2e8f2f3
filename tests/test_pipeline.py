"""Pipelines without ranks: cut points, what crosses them, the bubble in slots. `laws/pipeline.py`
holds them in ranks."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from benchsuite.errors import UsageError
from benchsuite.parallel import cuts, slots
from benchsuite.parallel.pieces import num_owned
from benchsuite.parallel.pipeline import Parallel
from benchsuite.plan.cell import Cell, resolve
from benchsuite.worker import model_parallel, setup


def largest(loads: list[float], chunks: list[range]) -> float:
    return max(sum(loads[at] for at in chunk) for chunk in chunks)


@pytest.mark.parametrize("seed", range(30))
def test_the_largest_chunk_is_as_small_as_can_be(seed):
    """Against all ways to cut."""
    draw = random.Random(seed)
    loads = [float(draw.choice([0, draw.randint(1, 20)])) for _ in range(draw.randint(4, 9))]
    trained = [draw.random() < 0.7 for _ in loads]
    count = draw.randint(1, 4)
    size = draw.choice([each for each in range(1, count + 1) if count % each == 0])
    ways = []
    for ends in itertools.combinations(range(1, len(loads)), count - 1):
        chunks = [range(a, b) for a, b in itertools.pairwise((0, *ends, len(loads)))]
        if all(any(trained[at] for at in chunk) for chunk in chunks[:size]):
            ways.append(largest(loads, chunks))
    found = cuts.balanced(loads, count, trained, size)
    assert (found is None) == (not ways)
    if found is not None:
        assert [at for chunk in found for at in chunk] == list(range(len(loads)))
        assert largest(loads, found) == min(ways)


def test_the_balance_bound_is_total_over_stages_times_largest():
    found = cuts.Cuts(
        [range(2), range(2, 3), range(3, 5), range(5, 6)], [1, 2, 3, 4, 5, 6], "flops", 2
    )
    assert found.layers_of(0) == [0, 1, 3, 4] and found.load_of(0) == 12 and found.load_of(1) == 9
    assert found.balance == 21 / (2 * 12)


def test_what_cannot_be_cut_is_told_with_its_numbers():
    workload = setup.start_workload(resolve(Cell(workload="mlp")))
    with pytest.raises(
        UsageError, match=r"5 layers, 3 of them with parameters, on stages\(4\) x num_chunks\(1\)"
    ):
        cuts.cuts(workload, model_parallel.meta_layers(workload), size=4, num_chunks=1)


@pytest.mark.parametrize(("m", "bubble"), [(1, 0.5), (4, 0.2), (8, 1 / 9)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_bubble_of_two_stages(schedule, m, bubble):
    orders = [
        slots.order_of(schedule, stages=2, part=part, num_micro_batches=m) for part in range(2)
    ]
    counted = slots.counted(orders, num_stages=2)
    assert counted == pytest.approx(bubble, abs=1e-12)
    assert slots.predicted(schedule, stages=2, num_micro_batches=m, num_chunks=1) == pytest.approx(
        bubble, abs=1e-12
    )


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_in_flight_are_as_many_as_the_formula_says(schedule, stages):
    for part in range(stages):
        order = slots.order_of(schedule, stages=stages, part=part, num_micro_batches=7)
        told = slots.in_flight_expected(schedule, stages=stages, part=part, num_micro_batches=7)
        assert (
            slots.in_flight(order) == told == (7 if schedule == "gpipe" else min(7, stages - part))
        )


def test_parts_that_wait_for_each_other_are_found():
    """The last stage wants micro-batch 1 first, the first one sends 0 and then waits for its
    gradient."""
    first = [("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1)]
    last = [("F", 1, 1), ("B", 1, 1), ("F", 1, 0), ("B", 1, 0)]
    with pytest.raises(ValueError, match="wait for each other"):
        slots.counted([first, last], num_stages=2)


def test_halves_of_a_backward_pass_fill_the_bubble():
    """Two stages, two micro-batches by hand: W after everything that others wait for."""
    first = [("F", 0, 0), ("F", 0, 1), ("I", 0, 0), ("W", 0, 0), ("I", 0, 1), ("W", 0, 1)]
    last = [("F", 1, 0), ("I", 1, 0), ("F", 1, 1), ("I", 1, 1), ("W", 1, 0), ("W", 1, 1)]
    assert slots.counted([first, last], num_stages=2) == pytest.approx(1 / 7, abs=1e-12)
    assert slots.predicted(
        "zero_bubble", stages=2, num_micro_batches=2, num_chunks=1
    ) == pytest.approx(1 / 7)


def test_tied_weights_stand_on_the_first_and_the_last_stage():
    workload = setup.start_workload(resolve(Cell(workload="transformer", preset="markov")))
    layers = model_parallel.meta_layers(workload)
    whole = sum(p.numel() for p in nn.Sequential(*layers).parameters())
    first, *between, last = Parallel().pieces(workload, layers, 4)
    copies = [piece for piece in last if not piece.owned]
    assert [piece.name for piece in copies] == ["0.symbols.weight"] and copies[0] == last[-1]
    assert all(piece.owned for held in (first, *between) for piece in held)
    held = sum(piece.shape.numel() for each in (first, *between, last) for piece in each)
    assert held == whole + copies[0].shape.numel()
    assert sum(num_owned(each) for each in (first, *between, last)) == whole


@pytest.mark.parametrize(("options", "boundaries"), [({}, 1), ({"schedule": "interleaved"}, 3)])
def test_predicted_bytes_are_those_of_the_cuts_and_of_what_is_tied(options, boundaries):
    """Markov transformer on 2 stages: 2 (stages x V - 1) m a, the embedding both ways, the loss,
    the norm."""
    workload = setup.start_workload(resolve(Cell(workload="transformer", preset="markov")))
    layers = model_parallel.meta_layers(workload)
    batch, _ = model_parallel.example(workload, layers, 1)
    traffic = Parallel(**options).predicted_traffic(
        workload, layers, batch, size=2, itemsize=4, clip=True
    )
    activation = (32 // 4) * 32 * 64 * 4  # sequences of a micro-batch, symbols, width, bytes
    tied = 8 * 64 * 4
    assert traffic.payload_bytes == 2 * boundaries * 4 * activation + 2 * tied + 8 + 2 * 8
    assert traffic.num_messages == 2 * boundaries * 4 + 2 + 1 + 2


def test_layers_on_meta_share_what_the_chain_shares():
    shared = nn.Linear(3, 3)
    chain = [nn.Sequential(shared, nn.BatchNorm1d(3)), nn.ReLU(), shared]
    first, _, last = cuts.on_meta(chain)
    assert (
        first[0].weight is last.weight
        and last.weight.is_meta
        and shared.weight.device.type == "cpu"
    )
    assert first[1].running_mean.is_meta and torch.equal(chain[0][1].running_mean, torch.zeros(3))
