"""One bit per element: packing, unpacking. What `sign` and `ef_sign` share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def packed_bytes(size: int) -> int:
    """Of so many bits."""
    return -(-size // 8)


def pack_signs(flat: Tensor, wire: Tensor) -> None:
    """Bit 1 where an element is >= 0; the last byte is filled up with zeros."""
    wire.copy_(torch.from_numpy(np.packbits((flat >= 0).numpy())))


def unpack_signs(wire: Tensor, out: Tensor) -> None:
    """+1 and -1, made of the bits while they are bytes: a quarter of the memory to go through."""
    bits = np.unpackbits(wire.numpy(), count=out.numel())
    out.copy_(torch.from_numpy(bits).view(torch.int8).mul_(2).sub_(1))
