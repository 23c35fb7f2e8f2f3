"""RL agent: an actor and a critic learn by acting (PPO, Schulman et al. 2017; A2C, Mnih et al.
2016).

`cartpole`: CartPole-v1 (Barto, Sutton and Anderson 1983) as a batch of environments in numpy, with
gymnasium's bits; 9,155 parameters. A rollout is 32 steps of each of 16 environments, trained on in
4 epochs of 4 minibatches; one minibatch is one step of a strategy, and stands for 32 of the
rollout's 512 environment steps. A worker of N has 16 / N environments of its own and acts with its
own current parameters; a minibatch takes 8 of the 32 time steps of each environment, so the union
over the workers is the same for every N. `cluster`: 64 environments. `comm`: the network of Mnih et
al. 2015 on synthetic frames. `atari`: a game by the ale-py package, which the user installs (its
licence is GPL-2.0). The worlds stand in `rl_worlds.py`, the networks in `rl_networks.py`.

A sample is an environment step. Actor-learner training (sync/actor_learner.py) takes whole
trajectories instead of minibatches, and corrects for the policy that acted by V-trace (Espeholt et
al. 2018, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchsuite import workload
from benchsuite.workload import Batch, Infer, Recipe, Target, TrajectoryShape

from .rl_networks import Pair, nature
from .rl_vtrace import vtrace
from .rl_worlds import FRAMES, Atari, CartPole, Frames, World

presets = {
    "cartpole": {
        "global_batch": 32,
        "num_layers": 3,
        "budget_samples": 65_536,
        "num_environments": 16,
    },
    "smoke": {"global_batch": 32, "num_layers": 3, "budget_samples": 8_192, "num_environments": 16},
    "comm": {
        "global_batch": 32,
        "num_layers": 5,
        "budget_samples": 1_024,
        "num_environments": 16,
        "environment": "frames",
        "num_actions": 6,
        "lr": 2.5e-4,
        "reward_scale": 1.0,
    },
    "atari": {
        "global_batch": 32,
        "num_layers": 5,
        "budget_samples": 10_485_760,
        "num_environments": 16,
        "environment": "atari",
        "num_actions": 6,
        "lr": 2.5e-4,
        "clip_ratio": 0.1,
        "entropy_weight": 0.01,
        "reward_scale": 1.0,
        "evaluate_every": 524_288,
    },
    "cluster": {
        "global_batch": 128,
        "num_layers": 3,
        "budget_samples": 262_144,
        "num_environments": 64,
        "evaluate_every": 8_192,
    },
}

BUDGET = 65_536  # environment steps; a preset or the cell's budget comes first
PARTS = {"ppo": (4, 4), "a2c": (1, 1)}  # epochs of a rollout, minibatches of each
STEPS_PER_PART = 2  # a rollout has so many steps of an environment per minibatch trained on
# purposes of random streams
RESET = 1
ACT = 2
ORDER = 3
START = 4


@dataclass
class Workload(workload.Workload):
    """Acting and learning; a sample is an environment step."""

    environment: Literal["cartpole", "frames", "atari"] = "cartpole"
    """The pole, random frames of 84 x 84 x 4, or a game of the ale-py package."""

    game: str = "pong"
    """The game of `environment = atari`."""

    num_actions: int = 2
    """2 of the pole; in a game the size of its minimal action set, 6 in pong."""

    algorithm: Literal["ppo", "a2c"] = "ppo"
    """Clipped ratios over 4 epochs of 32 steps, or the plain policy gradient, once, over 2
    steps."""

    lr: float = 1.5e-3
    """Learning rate at the start of Adam; it falls to 0. 3e-3 for a2c."""

    clip_ratio: float = 0.2
    """PPO's epsilon."""

    discount: float = 0.99
    """gamma."""

    trace: float = 0.95
    """lambda of generalised advantages (Schulman et al. 2016) and of V-trace."""

    value_weight: float = 0.5
    """Weight of the critic's loss."""

    entropy_weight: float = 0.0
    """Weight of the policy's entropy."""

    reward_scale: float = 0.02
    """Rewards are multiplied by it: returns of up to 100 make the critic's loss drown the
    actor's."""

    num_environments: int = 16
    """Environments of all workers together; the number of workers divides it."""

    global_batch: int = 32
    """Environment steps that a minibatch stands for: 2 x num_environments."""

    clip_norm: float = 0.5
    """Largest norm of the mean gradient (0 = not clipped)."""

    evaluate_every: int = 2048
    """Environment steps between two evaluations."""

    collects = True  # batches come from acting
    tensor_divides = (32,)  # channels and hidden units
    refuses = (
        {
            "rule": "environments",
            "when": (
                "num_environments > 0 and global_batch > 0 and global_batch != 2 * num_environments"
            ),
            "reason": (
                "global_batch({global_batch:g}) is not 2 x "
                "num_environments({num_environments:g}): a minibatch stands for 2 steps of each "
                "environment"
            ),
            "remedy": "set options.{name}.global_batch = {2 * num_environments:g}",
        },
    )

    @property
    def target(self) -> Target:
        """Mean greedy return over fixed starts, in two evaluations in a row: a single one proves
        nothing."""
        every = self.evaluate_every if self.environment != "frames" else 0
        easy, target, hard = (
            (0.0, 18.0, 20.0) if self.environment == "atari" else (475.0, 475.0, 500.0)
        )

        return Target(
            "return", easy=easy, target=target, hard=hard, criterion="twice", evaluate_every=every
        )

    @property
    def per_rollout(self) -> int:
        """Minibatches that a rollout is trained on."""
        return math.prod(PARTS[self.algorithm])

    @property
    def rollout_steps(self) -> int:
        """Time steps of a rollout."""
        return STEPS_PER_PART * self.per_rollout

    def start(self, *, seed: int, dtype: torch.dtype) -> None:
        known = 2 if self.environment == "cartpole" else self.num_actions
        if self.environment == "atari":
            known = Atari.num_actions(self.game)

        if self.num_actions != known:
            what = self.game if self.environment == "atari" else self.environment
            raise ValueError(
                f"num_actions = {self.num_actions}, but {what} has {known}: set num_actions = "
                f"{known}"
            )

        self._seed = seed
        self._dtype = dtype

    def layers(self) -> list[nn.Module]:
        if self.environment != "cartpole":
            return nature(self.num_actions)

        root = math.sqrt(2)
        return [
            Pair(4, 64, 64, gains=(root, root), first=True),
            Pair(64, 64, 64, gains=(root, root)),
            Pair(64, 2, 1, gains=(0.01, 1.0), last=True),
        ]

    def tensor_plan(self) -> Mapping[str, str]:
        pole = {"0.actor": "columns", "0.critic": "columns", "1.actor": "rows", "1.critic": "rows"}
        frames = {"0.0.convolution": "columns", "1.0": "rows", "2.0": "columns", "3.0": "rows"}

        return pole if self.environment == "cartpole" else frames

    def layer_flops(self) -> list[int]:
        """Forward operations of each layer for one state: 2 per multiply-add. PPO trains 4 times on
        a state."""
        if self.environment == "cartpole":
            return [2 * 4 * 128, 2 * 2 * 64 * 64, 2 * 64 * 3]

        shapes = ((32 * 20 * 20, 4 * 64), (64 * 9 * 9, 32 * 16), (64 * 7 * 7, 64 * 9), (512, 3136))
        return [
            *(2 * outputs * inputs for outputs, inputs in shapes),
            2 * 512 * (self.num_actions + 1),
        ]

    def recipe(self) -> Recipe:
        def make_optimizer(params: Iterable[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.Adam(params, lr=self.lr, eps=1e-5)

        clip = self.clip_norm or None
        return Recipe(
            make_optimizer,
            lr=lambda progress: self.lr * (1 - progress),
            global_batch=self.global_batch,
            budget=BUDGET,
            clip_norm=clip,
        )

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        raise TypeError("an agent's batches come from acting: collect(act, environments, number)")

    # -- acting ------------------------------------------------------------------------------------

    def environments(self, *, shard: int, num_shards: int) -> Own:
        """A worker's own, at their first starts. Every environment has streams of its own: the same
        for any N."""
        count = self.global_batch // STEPS_PER_PART // num_shards
        names = range(shard * count, (shard + 1) * count)

        return Own(self._make([[RESET, self._seed, name] for name in names]), names)

    def collect(self, act: Infer, environments: Own, number: int) -> Rollout:
        """Rollout `number` of these environments by the policy `act`, to be trained on in
        minibatches."""
        epochs, minibatches = PARTS[self.algorithm]
        steps = STEPS_PER_PART * epochs * minibatches
        played = self._play(act, environments, number, steps)
        values = played["values"]
        ends = played["ends"]
        following = np.concatenate([values[:, 1:], played["last"]], axis=1)
        errors = (
            played["rewards"]
            + self.discount * np.where(ends == 1, played["beyond"], following)
            - values
        )

        going = self.discount * self.trace * (1 - ends)
        advantages = np.empty_like(values)
        carried = np.zeros(len(values))

        for time in reversed(range(steps)):
            advantages[:, time] = carried = errors[:, time] + going[:, time] * carried

        answers = np.stack(
            [played["actions"], played["logs"], advantages, advantages + values], axis=-1
        )

        times = np.tile(np.arange(steps), (epochs, 1))
        orders = [
            np.random.default_rng([ORDER, self._seed, name, number]).permuted(times, axis=1)
            for name in environments.names
        ]

        share = STEPS_PER_PART * len(values)
        return Rollout(
            played["states"], answers, np.stack(orders, axis=1), minibatches, share, self._dtype
        )

    def trajectory(self, act: Infer, environments: Own, number: int, batches: int) -> Batch:
        """2 steps of each environment per batch, and the state after them: x is (environments x
        (steps + 1), ..).

        y keeps its time axis, (environments, steps, 5): action, its log probability when it was
        taken, reward, whether the episode ended, and where time ran out the value of the last state
        by the critic that acted.
        """
        steps = STEPS_PER_PART * batches
        played = self._play(act, environments, number, steps)
        states = np.concatenate([played["states"], environments.world.observe()[:, None]], axis=1)
        answers = np.stack(
            [played[name] for name in ("actions", "logs", "rewards", "ends", "beyond")], axis=-1
        )

        x = self._tensor(states.reshape(-1, *states.shape[2:]))
        return Batch(x, torch.from_numpy(answers).to(self._dtype), len(answers) * steps)

    def trajectory_shape(
        self, batches: int, *, num_shards: int, dtype: torch.dtype
    ) -> TrajectoryShape:
        count = self.global_batch // STEPS_PER_PART // num_shards
        steps = STEPS_PER_PART * batches
        seen, kind = (FRAMES, torch.uint8) if self.environment != "cartpole" else ((4,), dtype)

        return TrajectoryShape(
            (count * (steps + 1), *seen), (count, steps, 5), kind, dtype, count * steps
        )

    def _make(self, seeds: list[list[int]]) -> World:
        if self.environment == "atari":
            return Atari(self.game, seeds)

        streams = [np.random.default_rng(seed) for seed in seeds]
        return CartPole(streams) if self.environment == "cartpole" else Frames(streams)

    def _tensor(self, states: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(states)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor  # frames stay bytes

    def _play(
        self, act: Infer, environments: Own, number: int, steps: int
    ) -> dict[str, np.ndarray]:
        """`steps` steps of each environment: arrays of (environments, steps, ..), and `last`, the
        value after them."""
        world = environments.world
        names = environments.names
        draws = np.stack(
            [np.random.default_rng([ACT, self._seed, name, number]).random(steps) for name in names]
        )

        seen = world.observe()
        rows = np.arange(len(names))
        states = np.empty((len(names), steps, *seen.shape[1:]), dtype=seen.dtype)
        kept = {
            name: np.zeros(draws.shape)
            for name in ("actions", "logs", "values", "rewards", "ends", "beyond")
        }

        for time in range(steps):
            states[:, time] = seen
            out = act(self._tensor(seen)).double().cpu().numpy()  # (environments, actions + 1)
            logs = out[:, :-1] - out[:, :-1].max(1, keepdims=True)
            logs -= np.log(np.exp(logs).sum(1, keepdims=True))
            actions = (draws[:, time, None] > np.exp(logs).cumsum(1)[:, :-1]).sum(1)
            kept["actions"][:, time], kept["values"][:, time] = actions, out[:, -1]
            kept["logs"][:, time] = logs[rows, actions]
            rewards, over, late = world.step(actions)

            if late.any():  # not over, so the state is worth something
                beyond = act(self._tensor(world.observe())).double().cpu().numpy()[:, -1]
                kept["beyond"][:, time] = np.where(late, beyond, 0.0)

            kept["rewards"][:, time] = self.reward_scale * rewards
            ended = over | late
            if ended.any():
                kept["ends"][:, time] = ended
                world.restart(ended)

            seen = world.observe()

        last = act(self._tensor(seen)).double().cpu().numpy()[:, -1:]
        return {**kept, "states": states, "last": last}

    # -- learning ----------------------------------------------------------------------------------

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Clipped surrogate (PPO, equation 7) or the plain policy gradient, plus the critic's
        squared error.

        Advantages come normalised (`Rollout.batch`): a mean over a shard's rows then stays a mean
        over all.
        """
        all_logs = output[:, :-1].log_softmax(-1)
        values = output[:, -1]
        if batch.y.dim() == 3:
            return self._corrected(all_logs, values, batch.y)

        actions, logs, advantages, returns = batch.y.unbind(-1)
        new = all_logs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
        if self.algorithm == "a2c":
            return self._whole(-(new * advantages).mean(), all_logs, values - returns)

        return self._whole(
            self._clipped((new - logs).exp(), advantages), all_logs, values - returns
        )

    def _clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        clipped = ratio.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
        return -torch.minimum(ratio * advantages, clipped * advantages).mean()

    def _corrected(self, all_logs: Tensor, values: Tensor, y: Tensor) -> Tensor:
        """The same on trajectories of another policy: V-trace's targets and advantages, normalised
        per trajectory.

        a2c: the policy gradient of IMPALA (section 4.2). ppo: the clipped surrogate against the
        policy that acted.
        """
        count, steps = y.shape[:2]
        all_logs = all_logs.view(count, steps + 1, -1)[:, :-1]
        values = values.view(count, steps + 1)
        actions, logs, rewards, ends, beyond = y.unbind(-1)
        new = all_logs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
        ratio = (new - logs).exp()

        with torch.no_grad():
            targets, advantages = vtrace(
                ratio, rewards, values, ends, beyond, discount=self.discount, trace=self.trace
            )

            advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)

        if self.algorithm == "a2c":
            policy = -(ratio.detach().clamp(max=1.0) * advantages * new).mean()
        else:
            policy = self._clipped(ratio, advantages)

        return self._whole(policy, all_logs, values[:, :-1] - targets)

    def _whole(self, policy: Tensor, all_logs: Tensor, errors: Tensor) -> Tensor:
        entropy = -(all_logs.exp() * all_logs).sum(-1).mean()
        return (
            policy
            + self.value_weight * 0.5 * errors.square().mean()
            - self.entropy_weight * entropy
        )

    def evaluate(self, infer: Infer) -> float:
        """Mean return of the greedy policy over fixed starts (32 of the pole, else 4), the same in
        every evaluation."""
        count = 32 if self.environment == "cartpole" else 4
        world = self._make([[START, number] for number in range(count)])
        alive = np.ones(count, dtype=bool)
        returns = np.zeros(count)

        while alive.any():
            out = infer(self._tensor(world.observe()))
            rewards, over, late = world.step(out[:, :-1].argmax(-1).cpu().numpy())
            returns += alive * rewards
            alive &= ~(over | late)

        return float(returns.mean())


@dataclass
class Own:
    """A worker's environments, and their numbers among all."""

    world: World
    names: range


class Rollout:
    """What a worker has collected. states: (environments, T, ..), answers: (environments, T, 4),
    orders: (epochs, environments, T)."""

    def __init__(
        self,
        states: np.ndarray,
        answers: np.ndarray,
        orders: np.ndarray,
        minibatches: int,
        num_samples: int,
        dtype: torch.dtype,
    ) -> None:
        self._states = states
        self._answers = answers
        self._num_samples = num_samples
        self._dtype = dtype
        epochs, environments, _ = orders.shape
        times = orders.reshape(epochs, environments, minibatches, -1).swapaxes(1, 2)
        self._times = times.reshape(epochs * minibatches, environments, -1)
        self._rows = np.arange(environments)[:, None]

    def statistics(self) -> Tensor:
        """Of each minibatch's advantages: sum, sum of squares, number; (minibatches, 3) in
        float64."""
        advantages = self._answers[self._rows, self._times, 2].reshape(len(self._times), -1)
        counts = np.full(len(advantages), advantages.shape[1])

        return torch.from_numpy(
            np.stack([advantages.sum(1), np.square(advantages).sum(1), counts], axis=1)
        )

    def batch(self, position: int, statistics: Tensor) -> Batch:
        """Minibatch `position`: states, and (rows, 4) of action, log probability, advantage,
        return.

        statistics: (3,), of the advantages that these are normalised by.
        """
        times = self._times[position]
        x = torch.from_numpy(self._states[self._rows, times]).flatten(0, 1)
        y = self._answers[self._rows, times].reshape(-1, 4)
        total, squares, count = statistics.tolist()
        mean = total / count
        y[:, 2] = (y[:, 2] - mean) / (math.sqrt(max(squares / count - mean**2, 0.0)) + 1e-8)
        x = x.to(self._dtype) if x.is_floating_point() else x

        return Batch(x, torch.from_numpy(y).to(self._dtype), self._num_samples)
