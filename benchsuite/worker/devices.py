"""The device of a rank, and the settings of torch that figures on a device depend on.

It is `cpu`, or the CUDA device whose number is local rank modulo devices: with the `nccl` backend
every local rank has a device, with `gloo` ranks may share one. On CUDA float32 means float32 (no
TF32), cuDNN picks its fastest kernels, nothing is compiled, and results need not repeat bit for
bit.
"""

from __future__ import annotations

import torch

from benchsuite.plan.cell import Cell


def choose(cell: Cell, local_rank: int) -> torch.device:
    """Makes the rank's device the current one and returns it.

    RuntimeError where torch sees none.
    """
    if cell.device == "cpu":
        return torch.device("cpu")

    count = torch.cuda.device_count()

    if count == 0:
        raise RuntimeError(
            f"device = cuda, but torch {torch.__version__} sees no CUDA device in this rank"
        )

    device = torch.device("cuda", number(local_rank, count))
    torch.cuda.set_device(device)
    # TF32 has 10 bits of mantissa instead of 23: another precision than the cell says.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # The fastest kernel of each shape is found once, in the first steps.
    torch.backends.cudnn.benchmark = True

    return device


def number(local_rank: int, count: int) -> int:
    """Which of `count` devices a local rank works on."""
    return local_rank % count


def current(cell: Cell) -> torch.device:
    """The rank's device, once it was chosen."""
    if cell.device == "cpu":
        return torch.device("cpu")

    return torch.device("cuda", torch.cuda.current_device())
