"""Compressions: their means in virtual time and in NCCL's rounds, volumes, and what is not a
law."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from benchsuite.workloads.cnn import Workload
from torch import Tensor, nn

from benchsuite.compression import Compression
from benchsuite.compression.ef_sign import Compression as EfSign
from benchsuite.compression.int8 import Compression as Int8
from benchsuite.compression.powersgd import Compression as PowerSGD
from benchsuite.compression.topk import SAMPLE, TopK
from benchsuite.compression.topk import Compression as TopKCompression
from benchsuite.errors import UsageError
from benchsuite.laws import Law
from benchsuite.laws.codecs import CELLS as PUSHES
from benchsuite.laws.codecs import SHAPES
from benchsuite.laws.compression import CELLS as MEANS
from benchsuite.laws.harness.cases import Asked
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.runs import remembered
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan.cell import Cell
from benchsuite.topology import Topology
from benchsuite.topology.native import Topology as Native
from benchsuite.workload import Shapes
from tests.law_cells import holds, lines, strict_ranks

VIRTUAL = remembered(partial(virtual_ranks, graphs={}))
STRICT = remembered(strict_ranks)
FAMILIES = ("compression", "compression_loss")


def means(**asked: Any) -> list[Any]:
    """Laws of compressed means (on threads: tests/test_laws_hold.py)."""
    return [line for family in FAMILIES for line in lines(family, MEANS.of(Asked(**asked)))]


@pytest.mark.parametrize(("law", "cells"), means(clock="virtual", workers=(2, 3, 6)))
def test_means_in_virtual_time(law: Law, cells: list[Cell]) -> None:
    holds(law, VIRTUAL, cells)


@pytest.mark.parametrize(
    ("law", "cells"), means(workers=(3,), topology=("native", "direct", "ring"))
)
def test_means_with_nothing_that_nccl_refuses(law: Law, cells: list[Cell]) -> None:
    holds(law, STRICT, cells)


def test_every_compression_stands_on_the_topologies_of_the_rules() -> None:
    found: dict[str, set[str]] = {}
    for cell in MEANS.of(Asked()):
        found.setdefault(cell.compression, set()).add(cell.topology)
    everywhere = {"native", "ring", "halving_doubling", "tree", "direct", "hierarchical"}
    assert found == {
        **dict.fromkeys(("fp16", "bf16", "powersgd"), everywhere),
        **{name: {"native"} for name in ("topk", "sign", "ef_sign")},
        "int8": {"direct"},
    }
    pushed = {cell.compression for cell in PUSHES.of(Asked())}
    assert pushed == {"fp16", "bf16", "topk", "sign", "ef_sign", "int8"}


# -- volumes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18() -> Shapes:
    with torch.device("meta"):
        model = nn.Sequential(*Workload(model="resnet18").layers())
    return {name: parameter.shape for name, parameter in model.named_parameters()}


class Counting(Topology):
    """A topology of one worker that counts the elements handed to its means."""

    num_workers = 1

    def __init__(self) -> None:
        self.numel = 0

    def mean(self, flat: Tensor) -> None:
        self.numel += flat.numel()


@pytest.mark.parametrize(("rank", "mib"), [(1, 4.21), (2, 7.53), (4, 14.18)])
def test_powersgd_sends_of_resnet18_in_24_steps(resnet18: Shapes, rank: int, mib: float) -> None:
    """What stays dense: vectors, and matrices that two factors would not make smaller. Dense: 1023
    MiB."""
    size = sum(shape.numel() for shape in resnet18.values())
    steps = 24
    assert size == 11_173_962 and round(size * 4 * steps / 2**20) == 1023
    compression = PowerSGD(rank=rank)
    topology = Counting()
    compression.start(resnet18, seed=0)
    flat = torch.randn(size)
    compression.mean(flat, topology)  # type: ignore[arg-type]
    sent = topology.numel * 4 * steps / 2**20
    assert topology.numel == sum(compression.element_counts(resnet18))
    assert round(sent, 2) == pytest.approx(mib, abs=0.0051), f"{sent:.4f} MiB sent, {mib} MiB told"
    assert compression.nominal_ratio == pytest.approx(sent / (size * 4 * steps / 2**20))


def test_powersgds_rule_and_the_librarys_leave_the_same_tensors_dense(resnet18: Shapes) -> None:
    """torch's hook compresses where (n + m) r * min_compression_rate (2) < n m, ours where it saves
    anything."""
    for rank in (1, 2, 4):
        ours = {name for name, shape in resnet18.items() if PowerSGD(rank=rank).factors(shape)}
        theirs = {
            name
            for name, (n, *rest) in resnet18.items()
            if rest and 2 * rank * (n + torch.Size(rest).numel()) < n * torch.Size(rest).numel()
        }
        assert ours == theirs, f"rank {rank}: {ours ^ theirs}"
    assert PowerSGD(rank=2).factors(torch.Size([5, 5])) and not PowerSGD(rank=3).factors(
        torch.Size([5, 5])
    )


# -- what is not a law -----------------------------------------------------------------------------


def sparse_cases() -> dict[str, Tensor]:
    size = 5 * SAMPLE + 3
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, generator=generator)
    periodic = noise.clone()
    periodic[::5] = 0.0  # what a sample by strides sees is no picture of the whole
    burst = noise * 1e-3
    burst[1000:2000] = noise[1000:2000]
    one_nan = noise.clone()
    one_nan[7] = float("nan")
    return {
        "noise": noise,
        "periodic": periodic,
        "burst": burst,
        "one NaN": one_nan,
        "zeros": torch.zeros(size),
        "ones": torch.ones(size),
        "small": noise[:100],
    }


@pytest.mark.parametrize("name", sparse_cases())
@pytest.mark.parametrize("share", [1e-3, 0.01, 0.1, 0.6, 1.0])
def test_topk_sends_the_largest_also_where_a_sample_tells_where_to_look(
    name: str, share: float
) -> None:
    flat = sparse_cases()[name]
    k = max(1, int(share * len(flat)))
    codec = TopK(len(flat), k, flat.dtype, feedback=False)
    back = torch.empty_like(flat)
    codec.decode(codec.encode(flat), back)
    indices = codec._largest(flat)
    assert len(set(indices.tolist())) == k
    largest = torch.topk(flat.abs(), k).values.sort().values
    assert torch.equal(
        flat[indices].abs().sort().values.nan_to_num(nan=9e9), largest.nan_to_num(nan=9e9)
    )
    assert torch.equal(back[indices].nan_to_num(nan=9e9), flat[indices].nan_to_num(nan=9e9))


@pytest.mark.parametrize(
    "compression", [TopKCompression(), EfSign(), Int8(), PowerSGD()], ids=lambda c: c.__module__
)
def test_a_gradient_of_zeros_stays_zero_and_the_next_one_is_sent(compression: Compression) -> None:
    size = sum(shape.numel() for shape in SHAPES.values())
    compression.start(SHAPES, seed=0)
    topology = Alone()
    zeros = torch.zeros(size)
    compression.mean(zeros, topology)  # type: ignore[arg-type]
    assert torch.equal(zeros, torch.zeros(size))
    flat = torch.randn(size)
    compression.mean(flat, topology)  # type: ignore[arg-type]
    assert bool(torch.isfinite(flat).all()) and bool(flat.any())


class Alone(Topology):
    """All that a compression asks of the topology of one worker."""

    num_workers = 1

    def mean(self, flat: Tensor) -> None:
        """Of one."""

    def gather(self, wire: Tensor) -> list[Tensor]:
        return [wire]


def test_a_topology_without_gather_is_told_so() -> None:
    compression = TopKCompression()
    compression.start(SHAPES, seed=0)
    with pytest.raises(UsageError, match="has no `gather`.*set topology = native"):
        compression.mean(torch.zeros(259), Counting())  # type: ignore[arg-type]


def test_powersgd_leaves_tensors_without_elements_alone() -> None:
    shapes = {
        "empty": torch.Size([0, 4]),
        "column": torch.Size([5, 0]),
        "full": torch.Size([40, 30]),
    }
    assert PowerSGD(rank=2).element_counts(shapes) == (2 * 40, 2 * 30)


def test_powersgd_pushes_nothing() -> None:
    with pytest.raises(UsageError, match="set topology to a collective"):
        PowerSGD().codec([4], torch.float32)
    with pytest.raises(UsageError, match="set topology to a collective"):
        PowerSGD().wire_bytes([4], 4)


def test_nominal_ratios_are_those_of_their_papers() -> None:
    ratios = {
        name: module.nominal_ratio
        for name, module in (("topk", TopKCompression(rho=0.01)), ("int8", Int8()))
    }
    assert ratios == {"topk": 0.02, "int8": 0.25} and EfSign().nominal_ratio == 1 / 32
    # the wire's own ratio is that and the overhead of its ranges or scales
    assert Int8().wire_bytes([1000], 4) == 1008 and EfSign().wire_bytes([1001], 4) == 4 + 126
    assert TopKCompression(rho=0.01).wire_bytes([999], 4) == 10 * 8


def test_native_gathers_rows_that_begin_anywhere() -> None:
    """Rows of 33 bytes: float32 scales are read from unaligned places."""
    assert EfSign().wire_bytes([225], 4) % 4 != 0

    def body(comm: Any) -> Tensor:
        topology = Native()
        compression = EfSign()
        topology.start(comm)
        compression.start({"a": torch.Size([225])}, seed=0)
        flat = torch.full((225,), float(comm.rank + 1))
        compression.mean(flat, topology)
        return flat

    for flat in thread_ranks(3, body):
        assert torch.equal(flat, torch.full((225,), 2.0))
