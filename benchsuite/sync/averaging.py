"""The mean of a vector over all replicas, by a collective or by servers that only average.

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
    """Replaces a vector (P,), with which it is called, by its mean over the workers.

    A compression acts where the topology is a collective; to servers whole vectors are pushed.
    """

    def __init__(self, topology: Topology, compression: Compression) -> None:
        self._topology = topology
        self._compression = compression
        self._server = topology if isinstance(topology, ParameterServer) else None
        self._number = 0  # of the next mean: the tag of its pushes

    @property
    def differences_only(self) -> bool:
        """Whether vectors lose something on the way.

        Then gradients and differences may be averaged, whose error is made up for later, and
        parameters may not.
        """
        return is_compressed(self._compression)

    def __call__(self, flat: Tensor) -> None:
        # A server answers with the mean, so the vector is pushed from and pulled into one place.
        if self._server is not None:
            self._server.exchange(flat, flat, tag=self._number)
        else:
            self._compression.mean(flat, self._topology)

        self._number += 1

    def goodbye(self) -> None:
        """Tells servers, where there are some, that this worker sends no more."""
        if self._server is not None:
            self._server.goodbye()


def is_compressed(compression: Compression) -> bool:
    """Says whether vectors lose something on the way."""
    return not isinstance(compression, AsItIs)


def means_traffic(shapes: Shapes, times: int, setting: Setting) -> Traffic:
    """Predicts the traffic of `times` means of whole vectors over all workers."""
    # A mean over servers is one push and one answer of every worker.
    if setting.num_servers:
        each = [times] * setting.num_workers
        return push_pull_traffic(shapes, setting, pushes=each, replies=each)

    # Without servers: one mean by the topology, as often as it was made.
    one = setting.compression.predicted_traffic(
        shapes, setting.itemsize, setting.topology, num_workers=setting.num_workers
    )

    return one.times(times)


def averaging_server_bytes(shapes: Shapes, setting: Setting) -> int:
    """Says how many bytes the largest server that averages keeps.

    They are a slot for each worker's push and their mean: (N + 1) M / S.
    """
    return (setting.num_workers + 1) * largest_slice(shapes, setting)


def largest_slice(shapes: Shapes, setting: Setting) -> int:
    """Says how many bytes the largest slice that a server owns has."""
    slices = bounds(numel(shapes), setting.num_servers)
    longest = max(stop - start for start, stop in slices)

    return longest * setting.itemsize
