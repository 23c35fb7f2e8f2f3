"""One bit per element: packing signs into bytes and unpacking them, for `sign` and `ef_sign`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def packed_bytes(size: int) -> int:
    """Returns how many bytes so many bits fill, the last one perhaps in part."""
    return -(-size // 8)


def pack_signs(flat: Tensor, wire: Tensor) -> None:
    """Writes the signs of `flat` (P,) into the bytes of `wire` (ceil(P / 8),).

    A bit is 1 where an element is >= 0, so a zero counts as positive; the last byte is filled up
    with zeros.
    """
    positive = (flat >= 0).numpy()  # (P,)
    wire.copy_(torch.from_numpy(np.packbits(positive)))


def unpack_signs(wire: Tensor, out: Tensor) -> None:
    """Writes +1 and -1 into `out` (P,), by the bits of `wire`.

    The bits become signs while they are bytes, because that is a quarter of the memory to go
    through.
    """
    bits = np.unpackbits(wire.numpy(), count=out.numel())  # (P,), 0 or 1
    signs = torch.from_numpy(bits).view(torch.int8)
    signs.mul_(2).sub_(1)

    out.copy_(signs)
