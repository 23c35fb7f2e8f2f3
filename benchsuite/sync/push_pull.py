"""What pushes to a parameter server, and its replies, put on the wire.

Pushes travel encoded, one slice to each server; replies are slices of the parameters as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchsuite.comm import Traffic
from benchsuite.compression import Compression
from benchsuite.sync import Setting
from benchsuite.topology import bounds
from benchsuite.topology.parameter_server import sized_traffic
from benchsuite.workload import Shapes, numel, pieces_of


def push_pull_traffic(
    shapes: Shapes,
    setting: Setting,
    *,
    pushes: Sequence[int],
    replies: Sequence[int],
    compression: Compression | None = None,
) -> Traffic:
    """Predicts the traffic of pushes and replies, whose numbers are given by worker.

    `compression`, where it is given, takes the place of the setting's.
    """
    slices = bounds(numel(shapes), setting.num_servers)
    how = compression or setting.compression

    # An encoded push need not be of the same size for slices of the same length: pieces count.
    encoded = [
        how.wire_bytes(pieces_of(shapes, start, stop), setting.itemsize) for start, stop in slices
    ]

    return sized_traffic(
        encoded,
        [(stop - start) * setting.itemsize for start, stop in slices],
        pushes=pushes,
        replies=replies,
    )
