"""DiLoCo: H inner steps on each replica, then one outer step on their common way (Douillard et al.
2023).

arXiv 2311.08105, algorithm 1: every replica starts from the outer copy theta and makes H steps of
the recipe's optimiser. Then d = theta - (1/N) sum theta_i is the gradient of an outer SGD with
Nesterov momentum on theta, and everybody loads theta. The inner optimiser keeps its state. With
outer lr 1 and momentum 0 it is `local_sgd`.

Streaming, overlapped, in few bits (Douillard et al. 2025, arXiv 2501.18512): the vector is cut into
`fragments` that agree in turn, H/fragments steps apart. A fragment's mean may travel for `delay`
steps while the inner steps go on; the replica then loads what has come, and its steps on that
fragment meanwhile are lost. `outer_bits` quantises the outer gradient. At the end of the budget
every fragment agrees once more, unless its turn was the last step.

Sends one mean of M bytes every H steps. Keeps 2 M, the outer copy and the outer gradient, and M of
outer momentum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Handle, Traffic
from benchsuite.compression import Compression, pieces_of
from benchsuite.compression.quantise import Quantised
from benchsuite.sync import Events, Setting, Work, count
from benchsuite.sync.averaging import Averager, averaging_server_bytes
from benchsuite.sync.push_pull import push_pull_traffic
from benchsuite.sync.synchronous import ServerMean
from benchsuite.topology import Topology, bounds
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.update import Load, Updater, clip_part, in_chunks
from benchsuite.workload import Batch, Part, Recipe, Shapes, numel


@dataclass
class Strategy(sync.Strategy):
    """Replicas make inner steps alone, and one outer step together."""

    local_steps: int = 8
    """H, inner steps between two outer steps."""

    outer_lr: float = 0.7
    """Learning rate of the outer SGD."""

    outer_momentum: float = 0.9
    """Nesterov momentum of the outer SGD (0 = none)."""

    fragments: int = 1
    """Pieces of the vector that agree in turn."""

    delay: int = 0
    """Inner steps that a fragment's mean may take before it is waited for."""

    outer_bits: Literal[0, 4, 8] = 0
    """Bits per element of the outer gradient on the wire (0 = as the cell's compression says)."""

    alone_is_plain = False
    timing_free = True
    snapshot_of = "replica"
    clips_mean = False
    goes_on = True

    label = "DiLoCo"
    order = 6
    colour = "#882255"
    topologies = ("collective", "server")
    topologies_why = "every replica's vector enters one mean; {topology.called} has no such mean"
    takes_votes = False
    agrees_after = "local_steps"
    refuses = (
        {
            "rule": "fragments",
            "when": "local_steps >= 1 and (fragments < 1 or local_steps % fragments != 0)",
            "reason": (
                "fragments({fragments:g}) does not divide local_steps({local_steps:g}): they "
                "agree in turn"
            ),
            "remedy": "set fragments to a divisor of local_steps",
        },
        {
            "rule": "fragments",
            "when": (
                "local_steps >= 1 and fragments >= 1 and local_steps % fragments == 0 and not 0 "
                "<= delay < local_steps // fragments"
            ),
            "reason": (
                "delay = {delay:g} with local_steps({local_steps:g}) / fragments({fragments:g}) "
                "= {local_steps // fragments:g}: a mean is there before the next fragment's turn"
            ),
            "remedy": "set delay to 0 .. {local_steps // fragments - 1:g}",
        },
        {
            "rule": "fragments",
            "when": (
                'local_steps >= 1 and topology.kind == "server" and (fragments > 1 or delay > 0)'
            ),
            "reason": (
                "fragments = {fragments:g} and delay = {delay:g} with topology = "
                "{topology.name}: a server averages whole vectors, and its answer is waited for"
            ),
            "remedy": "set fragments = 1 and delay = 0, or topology to a collective",
        },
        {
            "rule": "outer step",
            "when": "not 0 < outer_lr < 1e300",
            "reason": "outer_lr = {outer_lr:g}: a number above 0",
            "remedy": "set outer_lr = 0.7",
        },
        {
            "rule": "outer step",
            "when": "not 0 <= outer_momentum < 1",
            "reason": "outer_momentum = {outer_momentum:g}: 0 <= outer_momentum < 1",
            "remedy": "set it to 0.9, or 0",
        },
        {
            "rule": "outer bits",
            "when": (
                'outer_bits != 0 and topology.kind != "" and topology.kind != "server" and '
                'topology.name not in ("native", "direct")'
            ),
            "reason": (
                "outer_bits = {outer_bits:g} over topology = {topology.name}: levels are never "
                "summed (100 + 100 = -56)"
            ),
            "remedy": "set topology to one of native, direct, parameter_server, or outer_bits = 0",
        },
        {
            "rule": "compression x sync",
            "when": 'compression.name != "none" and fragments > 1',
            "reason": (
                "compression = {compression.name} with fragments = {fragments:g} of {name}: it "
                "acts on whole vectors"
            ),
            "remedy": "set fragments = 1, or outer_bits = 8 or 4 and compression = none",
        },
        {
            "rule": "compression x sync",
            "when": 'compression.name != "none" and outer_bits != 0',
            "reason": (
                "compression = {compression.name} with outer_bits = {outer_bits:g} of {name}: "
                "both act on the outer gradient"
            ),
            "remedy": "set outer_bits = 0, or compression = none",
        },
    )

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        self._comm = comm
        self._part = part
        self._recipe = recipe
        self._topology = topology

        self._rank = comm.rank
        self._num_workers = topology.num_workers

        # Global batches of the budget, and how many of them are done.
        self._steps = recipe.budget // recipe.global_batch
        self._step = 0

        self.events = {f"fragment {number}": 0 for number in range(self.fragments)}
        if isinstance(topology, ParameterServer) and self.outer_bits:
            topology.use_compression(Quantised(self.outer_bits), part.shapes, part.params.dtype)

        if comm.rank >= self._num_workers:
            return

        self._updater = Updater(part.params, recipe, shapes=part.shapes)

        self._fragments = [
            _Fragment(
                self,
                part.params[start:stop],
                topology,
                self._compression(compression, part.shapes, start, stop),
            )
            for start, stop in bounds(part.params.numel(), self.fragments)
        ]

        self._lane_topology: Topology | None = None

    def _compression(
        self, given: Compression, shapes: Shapes, start: int, stop: int
    ) -> Compression:
        """Gives the compression of one fragment: the cell's, or a quantiser of its own."""
        if not self.outer_bits:
            return given

        own: Compression = Quantised(self.outer_bits)
        own.start(_pieces(shapes, start, stop), seed=0)

        return own

    def make_updater(self, params: Tensor) -> Load:
        return Load(params)

    def next_index(self) -> Work | None:
        # Every worker has its own shard of the next global batch.
        if self._step == self._steps:
            return None

        return self._step, self._rank, self._num_workers

    def step(self, batch: Batch) -> float:
        """Makes an inner step, then what is due for each fragment."""
        loss = self._part.gradient(batch)
        assert loss is not None
        clip_part(self._part, self._recipe.clip_norm)
        self._updater.step(self._part.grad, samples=self._step * self._recipe.global_batch)
        self._step += 1

        # A fragment may be due to load the mean of its last turn, due to begin its next one, or
        # both. In the last step everything is brought to an end.
        last = self._step == self._steps

        for number, fragment in enumerate(self._fragments):
            started_at = fragment.started_at
            if started_at is not None and (last or self._step - started_at >= self.delay):
                fragment.load(self._step)

            if self._is_due(number) or (last and fragment.loaded_at != self._step):
                fragment.begin(self._step, wait=last or not self.delay)
                self.events[f"fragment {number}"] += 1

        return loss

    def _is_due(self, number: int) -> bool:
        """Says whether a fragment agrees after this step.

        Fragment f agrees H/F steps after fragment f-1, the last one at multiples of H.
        """
        turn = (number + 1) * (self.local_steps // self.fragments)
        return self._step % self.local_steps == turn % self.local_steps

    def beside(self, compression: Compression, flat: Tensor) -> Handle:
        """Starts the mean of a fragment on the second lane, while inner steps go on."""
        return self._comm.lane(self._on_lane, compression, flat)

    def _on_lane(self, lane: Comm, compression: Compression, flat: Tensor) -> None:
        """Makes, on the lane, the mean of a fragment by a topology of the lane's own."""
        if self._lane_topology is None:
            self._lane_topology = self._topology.second()
            self._lane_topology.start(lane)

        compression.mean(flat, self._lane_topology)

    def finish(self) -> None:
        self._fragments[0].average.goodbye()

    def snapshot(self) -> Tensor:
        return torch.cat([fragment.outer for fragment in self._fragments])

    def policy(self) -> ServerMean:
        return ServerMean(self._num_workers)

    def num_pushes(self) -> int:
        return (self._steps // self.local_steps + 1) * self._num_workers

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        events = {}
        for number in range(self.fragments):
            first = (number + 1) * (self.local_steps // self.fragments)
            turns = range(first, num_batches + 1, self.local_steps)
            once_more = not turns or num_batches - turns[-1] > self.delay
            events[f"fragment {number}"] = [len(turns) + once_more] * setting.num_workers

        return events

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        if server:
            return averaging_server_bytes(shapes, setting)

        # The outer copy, the outer gradient, and the outer momentum.
        return (3 if self.outer_momentum else 2) * numel(shapes) * setting.itemsize

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        compression = Quantised(self.outer_bits) if self.outer_bits else setting.compression
        # A server averages whole vectors, so there is one fragment.
        if setting.num_servers:
            each = [count(events, "fragment 0", 0)] * setting.num_workers
            return push_pull_traffic(
                shapes, setting, pushes=each, replies=each, compression=compression
            )

        each_fragment = []

        for number, (start, stop) in enumerate(bounds(numel(shapes), self.fragments)):
            one = compression.predicted_traffic(
                _pieces(shapes, start, stop) if self.fragments > 1 else shapes,
                setting.itemsize,
                setting.topology,
                num_workers=setting.num_workers,
            )

            each_fragment.append(one.times(count(events, f"fragment {number}", 0)))

        return Traffic.total(each_fragment)


class _Fragment:
    """A range of the vector that agrees as a whole.

    It has its outer copy theta, the outer optimiser, and the mean that is under way.
    """

    def __init__(
        self, strategy: Strategy, params: Tensor, topology: Topology, compression: Compression
    ) -> None:
        self._strategy = strategy
        self._params = params
        self._compression = compression
        self.average = Averager(topology, compression)
        self.outer = params.clone()  # theta (P/F,)
        self._gradient = torch.empty_like(params)  # d (P/F,)
        momentum = strategy.outer_momentum

        # The outer optimiser steps views of theta, whose gradients are views of d.
        chunks = in_chunks(self.outer)

        for chunk, gradient in zip(chunks, in_chunks(self._gradient), strict=True):
            chunk.grad = gradient

        self._optimizer = torch.optim.SGD(
            chunks, strategy.outer_lr, momentum, nesterov=momentum > 0
        )
        self._under_way: Handle | None = None

        # The steps after which it last set out (None = nothing is under way) and last loaded.
        self.started_at: int | None = None
        self.loaded_at = 0

    def begin(self, step: int, *, wait: bool) -> None:
        """Sends out its outer gradient; with `wait` it is also applied at once."""
        torch.sub(self.outer, self._params, out=self._gradient)  # theta - theta_i
        self.started_at = step
        if wait:
            self.average(self._gradient)
            self.load(step)
        else:
            self._under_way = self._strategy.beside(self._compression, self._gradient)

    def load(self, step: int) -> None:
        """Makes the outer step on theta, and lets the replica start from it."""
        if self._under_way is not None:
            self._under_way.wait()

        self._optimizer.step()
        self._params.copy_(self.outer)
        self._under_way = None
        self.started_at = None
        self.loaded_at = step


def _pieces(shapes: Shapes, start: int, stop: int) -> Shapes:
    """Gives the parts of tensors that lie in a range, as shapes of their own."""
    return {
        str(number): torch.Size([size])
        for number, size in enumerate(pieces_of(shapes, start, stop))
    }
