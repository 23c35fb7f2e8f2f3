"""What a device was used for: peak memory, arithmetic per sample, and the ceiling of both.

The ceiling is measured in the same run, after the loop: the rate of one large matrix product in the
cell's precision, timed by events. Training takes three times the forward pass's operations (one
forward, two backward), which is the field's convention: neither what is computed twice to save
memory counts, nor what is not a product.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchsuite.measure.device_time import Event, cuda_event
from benchsuite.plan.cell import Cell
from benchsuite.workload import Workload

# precision -> the type of the two matrices whose product is the ceiling.
PRODUCTS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
SIZE = {"fp32": 8192, "fp64": 4096, "bf16": 8192}  # rows and columns of each matrix
REPEATS = 20
TRAINING = 3  # forward passes that a gradient is worth


def peaks() -> dict[str, Any]:
    """Name of the rank's device, and the most of its memory that this process has used."""
    return {
        "name": torch.cuda.get_device_name(),
        "index": torch.cuda.current_device(),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def arithmetic(cell: Cell, workload: Workload, *, measures: bool) -> dict[str, Any]:
    """Operations of training on one sample, and the ceiling on the rank that measures it.

    Both may be None: where the workload states no operations, and on the other ranks.
    """
    return {
        "flops_per_sample": training_flops(workload),
        "matmul_ceiling_flop_per_s": matmul_ceiling(cell.precision) if measures else None,
    }


def training_flops(workload: Workload) -> int | None:
    """Operations of training on one sample: three times the forward pass of all layers.

    None where the workload's `layer_flops` states none.
    """
    # Nobody guesses: where a workload states no numbers there is no figure.
    counted = workload.layer_flops()
    return None if counted is None else TRAINING * sum(counted)


def matmul_ceiling(
    precision: str,
    *,
    device: str = "cuda",
    size: int | None = None,
    event: Callable[[], Event] = cuda_event,
    synchronise: Callable[[], None] = torch.cuda.synchronize,
) -> float:
    """Operations per second of C = A B with square matrices.

    The median of `REPEATS` products, after as many that warm up. event, synchronise: of the device;
    a test gives those of the host.
    """
    n = size or SIZE[precision]
    dtype = PRODUCTS[precision]
    a = torch.randn(n, n, device=device).to(dtype)  # (n, n)
    b = torch.randn(n, n, device=device).to(dtype)  # (n, n)
    out = torch.empty_like(a)  # (n, n)
    for _ in range(REPEATS):
        torch.mm(a, b, out=out)

    marks = [event()]
    marks[0].record()

    for _ in range(REPEATS):
        torch.mm(a, b, out=out)
        marks.append(event())
        marks[-1].record()

    synchronise()

    milliseconds = [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]
    seconds = statistics.median(milliseconds) / 1e3
    return 2 * n**3 / seconds  # a product and a sum for each of n terms of n^2 elements


class HostEvent:
    """An event of the host's clock, for what runs on the CPU; it has the methods of a CUDA
    event.
    """

    def __init__(self) -> None:
        self.at_ns = 0

    def record(self) -> None:
        """Marks the present moment."""
        self.at_ns = time.perf_counter_ns()

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds until `end`."""
        return (end.at_ns - self.at_ns) / 1e6
