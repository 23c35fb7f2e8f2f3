"""`parallel/fsdp.py` without ranks: units, shards, bytes by hand; and on the wire, gloo's
reduce-scatter included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchsuite.laws.harness import tiny
from benchsuite.parallel.fsdp import Parallel
from benchsuite.parallel.pieces import cut, join, shapes_of
from benchsuite.parallel.shards import units_of
from benchsuite.workload import Batch, trained_parameters
from tests.bench import Bench
from tests.test_end_to_end import wire_ratio

BATCH = Batch(None, None, 24)
NORM = LOSS = 2 * 8  # bytes of a sum of one number over two ranks


class Tied(nn.Module):
    """Gives out what the first layer looks up in."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(weight.shape[1])
        self.weight = weight


def tied_chain() -> list[nn.Module]:
    first = nn.Embedding(5, 4)
    return [first, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), Tied(first.weight)]


def test_layers_that_share_a_parameter_are_the_root_unit_with_all_that_is_theirs() -> None:
    units = units_of(tied_chain())
    assert [(unit.layers, unit.is_root) for unit in units] == [
        ((1,), False),
        ((3,), False),
        ((0, 4), True),
    ]
    assert units[2].numel(1) == 5 * 4 + 2 * 4  # the shared matrix once
    assert units[2].numel(2) == 6 * 4 + 2 * 4  # 5 rows padded to 6
    assert units_of([nn.ReLU()]) == []


def test_a_layer_that_stands_twice_in_the_chain_is_in_the_root_unit() -> None:
    twice = nn.Linear(2, 2)
    assert [(unit.layers, unit.is_root) for unit in units_of([twice, nn.Linear(2, 2), twice])] == [
        ((1,), False),
        ((0, 2), True),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_shards_are_torchs_chunks_and_put_together_again_they_are_the_whole(size: int) -> None:
    layers = tiny.Workload(width=6).layers()
    named = trained_parameters(nn.Sequential(*layers))
    shapes = {name: p.shape for name, p in named.items()}
    pieces = Parallel().pieces(tiny.Workload(), layers, size)
    for name, p in named.items():
        chunks = [tuple(chunk.shape) for chunk in p.chunk(size)]
        held = [tuple(shapes_of(part)[name]) for part in pieces]
        assert held == chunks + [(0, *p.shape[1:])] * (size - len(chunks)), name
    whole = join([cut(named, part) for part in pieces], pieces, shapes)
    assert torch.equal(whole, nn.utils.parameters_to_vector(named.values()).detach())


@pytest.mark.parametrize(
    ("reshard", "backend", "factor"),
    [
        ("full", "gloo", 4),
        ("full", "nccl", 3),
        ("gradient_only", "gloo", 3),
        ("gradient_only", "nccl", 2),
    ],
)
def test_a_step_sends_so_many_times_the_parameters_of_each_other_rank(
    reshard: Any, backend: str, factor: int
) -> None:
    layers: list[nn.Module] = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)]
    whole = 4 * 3 * (8 * 8 + 8)
    for size in (2, 4):
        traffic = Parallel(reshard).predicted_traffic(
            tiny.Workload(), layers, BATCH, size=size, itemsize=4, clip=False, backend=backend
        )
        assert traffic.payload_bytes == factor * (size - 1) * whole + (size - 1) * LOSS, (
            reshard,
            backend,
            size,
        )


def test_the_root_unit_is_gathered_once_and_padding_is_sent() -> None:
    def sent(reshard: Any) -> int:
        return (
            Parallel(reshard)
            .predicted_traffic(tiny.Workload(), tied_chain(), BATCH, size=2, itemsize=8, clip=True)
            .payload_bytes
        )

    root = 6 * 4 + 2 * 4
    others = 2 * (4 * 4 + 4)
    assert sent("but_root") == 8 * (3 * root + 4 * others) + LOSS + NORM
    assert sent("full") == 8 * 4 * (root + others) + LOSS + NORM
    assert sent("gradient_only") == 8 * 3 * (root + others) + LOSS + NORM


def test_frozen_parameters_are_gathered_but_not_reduced() -> None:
    frozen = nn.Linear(4, 4)
    free = nn.Linear(4, 4)
    frozen.requires_grad_(False)
    (one,), (other,) = units_of([frozen]), units_of([free])
    assert (one.numel(2), one.numel(2, trained=True)) == (20, 0)
    assert (other.numel(2), other.numel(2, trained=True)) == (20, 20)


# A few large messages, as in a model worth sharding: 4 MiB and more per unit.
LARGE: list[dict[str, Any]] = [
    {
        "workload": "mlp",
        "preset": "wide",
        "options": {"mlp": {"num_parameters": 2**20, "hidden": 1024}},
    },
    {"workload": "transformer", "preset": "comm"},
]
ON_THE_WIRE = [
    (what, size, reshard)
    for what, size in ((LARGE[0], 4), (LARGE[1], 2))
    for reshard in ("but_root", "gradient_only")
]


@pytest.mark.procs
@pytest.mark.netns
@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("what", "size", "reshard"),
    ON_THE_WIRE,
    ids=lambda value: str(value["workload"] if isinstance(value, dict) else value),
)
def test_the_wire_carries_the_librarys_gathers_and_scatters(
    bench: Bench, what: dict[str, Any], size: int, reshard: str
) -> None:
    """Derived from the calls seen, gloo's reduce-scatter as an all-reduce; messages of 1 MiB and
    more: 1.00 to 1.05."""
    options = {**what.get("options", {}), "fsdp": {"reshard": reshard}}
    run = bench.ok(
        **{**what, "options": options}, parallel="fsdp", model_parallel=size, steps=3, timeout_s=60
    )
    assert (
        run.result["payload_source"] == "derived"
        and run.result["predicted_bytes"] == run.result["payload_bytes"]
    )
    sent_again = run.cost["wire_retransmits"] or 0
    most = 1.05 + sent_again * 65_536 / run.result["payload_bytes"]
    ratio = wire_ratio(run)
    print(
        f"{run.cell.label}: wire / (payload + control) = {ratio:.4f}, {run.result['payload_bytes']} bytes"
    )
    assert 1.0 <= ratio <= most, (
        f"{ratio:.4f} is not in 1.00 .. {most:.4f}, {sent_again} segments sent again"
    )
