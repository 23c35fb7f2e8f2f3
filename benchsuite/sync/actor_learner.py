"""Actors and a learner: who acts computes no gradient, who learns does not act (IMPALA, Espeholt et
al. 2018).

"IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures", arXiv
1802.01561, section 3.

Workers are actors: each plays a trajectory with its own parameters, sends it
to the one server, and goes on with the newest parameters that it has been sent. The server is the
learner: it takes trajectories in the order of their arrival, computes gradients on each (the
workload's loss corrects for the policy that acted by V-trace), steps, and answers with parameters
and their version. `ahead` trajectories of an actor may wait in the learner's queue while it plays
the next.

Sends per trajectory its states, actions, probabilities and rewards one way, with the version that
acted in front (8 bytes), and M bytes with the version behind them the other way. Keeps (ahead + 1)
trajectories and answers on an actor, one of each on the learner.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Handle, Traffic
from benchsuite.compression import Compression
from benchsuite.sync import Apply, Events, ServerPolicy, Setting, Work, count, hand_out
from benchsuite.topology import Topology
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.topology.parameter_server import sized_traffic
from benchsuite.update import Updater, clip
from benchsuite.workload import Batch, Part, Recipe, Shapes, TrajectoryShape, numel

HEADER_BYTES = 8  # the version that acted, one float64


@dataclass
class Strategy(sync.Strategy):
    """Actors send trajectories, and the learner answers with parameters."""

    batches_per_trajectory: int = 16
    """Global batches whose samples a trajectory stands for, an actor's share of each."""

    ahead: int = 1
    """Trajectories of an actor that may be under way while it plays another (0 = it waits for its
    own answer).
    """

    steps_per_trajectory: int = 8
    """Steps that the learner makes on a trajectory, one after the other; V-trace corrects the later
    ones too.
    """

    survives = "worker"
    snapshot_of = "servers"
    clips_mean = False
    goes_on = True  # the learner notices a divergence, and the actors wait for its answers
    alone_is_plain = False

    topologies = ("server",)
    topologies_why = "the learner is the server, actors push their trajectories to it"
    by_arrival = True
    model_parallel = False
    takes_votes = False
    refuses_compression = (
        "actor_learner exchanges trajectories and whole parameters with its learner"
    )
    wall_only = "compute_time tells how long a gradient takes, and its actors compute none"
    simulate_instead = "asynchronous"
    refuses = (
        {
            "rule": "actor_learner",
            "when": "not workload.collects",
            "reason": "sync = {name} with workload = {workload.name}: actors collect rollouts",
            "remedy": "set workload = rl_agent, or choose another sync",
        },
        {
            "rule": "actor_learner",
            "when": "parallel.num_micro_batches > 1",
            "reason": (
                "num_micro_batches = {parallel.num_micro_batches:g} with sync = {name}: a "
                "trajectory is not cut into pieces"
            ),
            "remedy": "set num_micro_batches = 1, or batches_per_trajectory lower",
        },
        {
            "rule": "actor_learner",
            "when": 'topology.kind == "server" and cell.num_servers != 1',
            "reason": (
                "servers = {cell.num_servers} with sync = {name}: the one server is the learner"
            ),
            "remedy": "set servers = 1",
        },
        {
            "rule": "trajectories",
            "when": "batches_per_trajectory < 1",
            "reason": (
                "batches_per_trajectory = {batches_per_trajectory:g} of {name}: at least 1 is "
                "needed"
            ),
            "remedy": "set options.{name}.batches_per_trajectory = 1 or more",
        },
        {
            "rule": "trajectories",
            "when": "batches_per_trajectory >= 1 and steps_per_trajectory < 1",
            "reason": (
                "steps_per_trajectory = {steps_per_trajectory:g} of {name}: at least 1 is needed"
            ),
            "remedy": "set options.{name}.steps_per_trajectory = 1 or more",
        },
        {
            "rule": "trajectories",
            "when": "batches_per_trajectory >= 1 and steps_per_trajectory >= 1 and ahead < 0",
            "reason": "ahead = {ahead:g} of {name}: at least 0 is needed",
            "remedy": "set options.{name}.ahead = 0 or more",
        },
        {
            "rule": "trajectories",
            "when": (
                "batches_per_trajectory >= 1 and steps_per_trajectory >= 1 and ahead >= 0 and "
                "cell.steps * cell.replicas % batches_per_trajectory != 0"
            ),
            "reason": (
                "steps({cell.steps}) x replicas({cell.replicas}) is not divisible by "
                "batches_per_trajectory({batches_per_trajectory:g}): a part of the budget would "
                "not be used"
            ),
            "remedy": "set batches_per_trajectory to a divisor, or the budget to a multiple",
        },
    )

    def expect(self, shape: TrajectoryShape) -> None:
        """Takes the shape of a trajectory, which is the same for every actor."""
        self._shape = shape

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        assert isinstance(topology, ParameterServer), "rules: actor_learner needs parameter_server"
        self._comm = comm
        self._part = part
        self._recipe = recipe
        self._topology = topology

        self._num_workers = topology.num_workers

        # Trajectories that make up the budget, and the one that this actor plays.
        self._num_pushes = (
            recipe.budget // recipe.global_batch * self._num_workers // self.batches_per_trajectory
        )
        self._index = 0
        self._version = 0  # of the parameters that act now

        # Oldest first: a trajectory that was sent, the vector for its answer, what to wait for.
        self._under_way: deque[tuple[Tensor, Tensor, list[Handle]]] = deque()

        # A push is a trajectory here, no slice of a vector.
        topology.push_bytes = HEADER_BYTES + self._shape.num_bytes

        self.events = {"pushes": 0, "replies": 0}

    def make_updater(self, params: Tensor) -> Updater:
        return Updater(params, self._recipe)

    def next_index(self) -> Work | None:
        """Takes the next trajectory, to be played with the newest parameters that are due.

        At most `ahead` answers may be missing: an older one is waited for before it is played.
        """
        self._wait(self.ahead)
        self._index, work = hand_out(self._comm, self._num_workers, self._num_pushes)

        return work

    def _wait(self, most: int) -> None:
        """Takes answers until at most so many are out.

        Each has a vector of its own, because it may come while the actor plays with the
        parameters.
        """
        while len(self._under_way) > most:
            _, answer, handles = self._under_way.popleft()
            for handle in handles:
                handle.wait()

            self._part.params.copy_(answer[:-1])
            self._version = int(answer[-1])
            self.events["replies"] += 1

    def step(self, batch: Batch) -> float:
        """Hands a trajectory over, and returns 0: the learner alone knows the loss."""
        params = self._part.params
        packed = pack(self._version, batch)
        answer = torch.empty(params.numel() + 1, dtype=params.dtype, device=packed.device)

        # NCCL runs the operations of a pair in posting order: there the receive is posted after
        # the push that it answers.
        receiving = self._topology.expect(answer) if self._comm.posts_ahead else []
        sending = self._topology.push(packed, tag=self._index)
        receiving = receiving or self._topology.expect(answer)

        self._under_way.append((packed, answer, [*sending, *receiving]))
        self.events["pushes"] += 1

        return 0.0

    def finish(self) -> None:
        self._wait(0)
        self._topology.goodbye()

    def snapshot(self) -> Tensor:
        return self._part.params

    def policy(self) -> Learner:
        learner = Learner(
            self._part, self._shape, self._recipe.clip_norm, steps=self.steps_per_trajectory
        )
        learner.reads_ahead = self.ahead  # so the log knows which version acted
        return learner

    def num_pushes(self) -> int:
        return self._num_pushes

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        total = num_batches * setting.num_workers // self.batches_per_trajectory
        # The first workers take one more where the total does not divide.
        each = [
            total // setting.num_workers + (worker < total % setting.num_workers)
            for worker in range(setting.num_workers)
        ]

        return {"pushes": each, "replies": each}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        # A trajectory, and the answer: parameters with their version behind them.
        one = HEADER_BYTES + setting.trajectory_bytes + (numel(shapes) + 1) * setting.itemsize
        return one if server else (self.ahead + 1) * one

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        workers = range(setting.num_workers)
        return sized_traffic(
            [HEADER_BYTES + setting.trajectory_bytes],
            [(numel(shapes) + 1) * setting.itemsize],
            pushes=[count(events, "pushes", worker) for worker in workers],
            replies=[count(events, "replies", worker) for worker in workers],
        )


class Learner(ServerPolicy):
    """A server that learns from trajectories, in the order in which they come."""

    several_steps = True

    # Trajectories that an actor has sent beyond those whose answers it has read.
    reads_ahead = 0

    def __init__(
        self, part: Part, shape: TrajectoryShape, clip_norm: float | None, *, steps: int
    ) -> None:
        self._part = part
        self._shape = shape
        self._clip_norm = clip_norm
        self._steps = steps
        self.losses: list[float] = []  # of each trajectory, before its first step

    def start(self, shard: Tensor, apply: Apply) -> None:
        self._shard = shard
        self._apply = apply
        self._version = 0

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        """Makes `steps` optimiser steps on a trajectory.

        `version` is the one that by the log has acted; the trajectory says so itself. Both must
        agree, or V-trace would correct for the wrong policy without a sign.
        """
        acted, batch = unpack(flat, self._shape)
        if acted != version:
            raise RuntimeError(
                f"a trajectory of version {acted} from worker {worker}, whose log says {version}"
            )

        for step in range(self._steps):
            loss = self._part.gradient(batch)
            assert loss is not None
            if step == 0:
                self.losses.append(loss)

            clip(self._part.grad, self._clip_norm)
            self._apply(self._part.grad)
            self._version += 1

        return [worker]

    def on_goodbye(self, worker: int) -> list[int]:
        return []

    def answer(self, worker: int) -> Tensor:
        """Gives the parameters with their version behind them, (P + 1,).

        The version is exact up to 2^24, to which float32 counts.
        """
        return torch.cat([self._shard, self._shard.new_tensor([self._version])])

    def snapshot(self) -> Tensor:
        return self._shard


def pack(version: int, batch: Batch) -> Tensor:
    """Packs a trajectory into bytes: the version that acted, then `batch.y`, then `batch.x`."""
    pieces = [
        torch.tensor([float(version)], dtype=torch.float64, device=batch.x.device),
        batch.y,
        batch.x,
    ]

    return torch.cat([piece.contiguous().flatten().view(torch.uint8) for piece in pieces])


def unpack(flat: Tensor, shape: TrajectoryShape) -> tuple[int, Batch]:
    """Takes apart what `pack` made: returns the version that acted, and the batch.

    The tensors of the batch are views of `flat`.
    """
    # y lies between the header and x.
    middle = HEADER_BYTES + math.prod(shape.y) * shape.y_dtype.itemsize
    version = int(flat[:HEADER_BYTES].view(torch.float64))
    y = flat[HEADER_BYTES:middle].view(shape.y_dtype)
    x = flat[middle:].view(shape.x_dtype)

    return version, Batch(x.view(shape.x), y.view(shape.y), shape.num_samples)
