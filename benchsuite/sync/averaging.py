"""The mean of a vector over all replicas, on whatever reduces: a collective, or servers that only
average.

For strategies whose replicas step by themselves and meet now and then (`local_sgd`, `diloco`,
`elastic_averaging`).
"""

from __future__ import annotations

from torch import Tensor

from benchsuite.comm import Traffic
from benchsuite.compression import Compression
from benchsuite.compression.none import Compression as AsItIs
from benchsuite.sync import Setting
from benchsuite.sync.push_pull import push_pull_traffic
from benchsuite.topology import Topology, bounds
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.workload import Shapes, numel


class Averager:
    """Called with a vector (P,), replaces it by its mean over the workers."""

    def __init__(self, topology: Topology, compression: Compression) -> None:
        self._topology = topology
        self._compression = compression
        self._server = topology if isinstance(topology, ParameterServer) else None
        self._number = 0

    @property
    def differences_only(self) -> bool:
        """Whether what travels is compressed: then gradients and differences may, and parameters
        may not.
        """
        return is_compressed(self._compression)

    def __call__(self, flat: Tensor) -> None:
        if self._server is not None:
            self._server.exchange(flat, flat, tag=self._number)
        else:
            self._compression.mean(flat, self._topology)

        self._number += 1

    def goodbye(self) -> None:
        """The last call of a worker."""
        if self._server is not None:
            self._server.goodbye()


def is_compressed(compression: Compression) -> bool:
    """Whether vectors lose something on the way."""
    return not isinstance(compression, AsItIs)


def means_traffic(shapes: Shapes, times: int, setting: Setting) -> Traffic:
    """Traffic of so many means of whole vectors."""
    if setting.num_servers:
        each = [times] * setting.num_workers
        return push_pull_traffic(shapes, setting, pushes=each, replies=each)

    one = setting.compression.predicted_traffic(
        shapes, setting.itemsize, setting.topology, num_workers=setting.num_workers
    )

    return one.times(times)


def averaging_server_bytes(shapes: Shapes, setting: Setting) -> int:
    """Memory formula of the largest server that averages: N slots and their mean, (N + 1) M / S."""
    return (setting.num_workers + 1) * largest_slice(shapes, setting)


def largest_slice(shapes: Shapes, setting: Setting) -> int:
    """Bytes of the largest slice that a server owns."""
    return (
        max(stop - start for start, stop in bounds(numel(shapes), setting.num_servers))
        * setting.itemsize
    )
