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

# Purposes of random streams: each number begins the seed of its own.
RESET = 1  # where episodes begin
ACT = 2  # which action is drawn
ORDER = 3  # in which order time steps go into minibatches
START = 4  # where the episodes of an evaluation begin


@dataclass
class Workload(workload.Workload):
    """The agent acts, and learns from what came of it; a sample is an environment step."""

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
        """The mean greedy return over fixed starts, and the values of it that count as reached.

        They count when two evaluations in a row reach them: an agent's return jumps, and a single
        one proves nothing.
        """
        # Random frames have nothing to reach, so they are not evaluated on the way.
        every = self.evaluate_every if self.environment != "frames" else 0
        easy, target, hard = (475.0, 475.0, 500.0)

        if self.environment == "atari":
            easy, target, hard = (0.0, 18.0, 20.0)

        return Target(
            "return", easy=easy, target=target, hard=hard, criterion="twice", evaluate_every=every
        )

    @property
    def per_rollout(self) -> int:
        """Minibatches that a rollout is trained on, each counted once per epoch."""
        return math.prod(PARTS[self.algorithm])

    @property
    def rollout_steps(self) -> int:
        """Time steps of each environment in a rollout."""
        return STEPS_PER_PART * self.per_rollout

    def start(self, *, seed: int, dtype: torch.dtype) -> None:
        """Checks the number of actions, which a game alone knows."""
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
        """The pole's two small networks side by side, or the network of Mnih et al. 2015."""
        if self.environment != "cartpole":
            return nature(self.num_actions)

        # Scores near 0 make the first policy nearly even, so that it tries both actions.
        root = math.sqrt(2)
        return [
            Pair(4, 64, 64, gains=(root, root), first=True),
            Pair(64, 64, 64, gains=(root, root)),
            Pair(64, 2, 1, gains=(0.01, 1.0), last=True),
        ]

    def tensor_plan(self) -> Mapping[str, str]:
        """Layers split in pairs: the first by its outputs, the second by its inputs."""
        pole = {"0.actor": "columns", "0.critic": "columns", "1.actor": "rows", "1.critic": "rows"}
        frames = {"0.0.convolution": "columns", "1.0": "rows", "2.0": "columns", "3.0": "rows"}

        return pole if self.environment == "cartpole" else frames

    def layer_flops(self) -> list[int]:
        """Counts the forward operations of each layer for one state.

        A multiply-add counts as 2. PPO trains on a state 4 times; this is one of them.
        """
        if self.environment == "cartpole":
            return [2 * 4 * 128, 2 * 2 * 64 * 64, 2 * 64 * 3]

        shapes = ((32 * 20 * 20, 4 * 64), (64 * 9 * 9, 32 * 16), (64 * 7 * 7, 64 * 9), (512, 3136))
        return [
            *(2 * outputs * inputs for outputs, inputs in shapes),
            2 * 512 * (self.num_actions + 1),
        ]

    def recipe(self) -> Recipe:
        """Adam, whose learning rate falls to 0 along a straight line."""

        def make_optimizer(params: Iterable[Tensor]) -> torch.optim.Optimizer:
            """Makes the optimiser; its learning rate is set anew before every step."""
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
        """Always a TypeError: there are no batches before somebody has acted."""
        raise TypeError("an agent's batches come from acting: collect(act, environments, number)")

    # -- acting ------------------------------------------------------------------------------------

    def environments(self, *, shard: int, num_shards: int) -> Own:
        """Makes the environments of one worker, at their first starts.

        Every environment has random streams of its own, by its number among all, so that it lives
        the same life for any number of workers.
        """
        count = self.global_batch // STEPS_PER_PART // num_shards
        names = range(shard * count, (shard + 1) * count)

        return Own(self._make([[RESET, self._seed, name] for name in names]), names)

    def collect(self, act: Infer, environments: Own, number: int) -> Rollout:
        """Plays rollout `number` of these environments by the policy `act`.

        Advantages are those of generalised advantage estimation (Schulman et al. 2016, equation
        16). Here E is the number of environments, T the time steps of each.
        """
        epochs, minibatches = PARTS[self.algorithm]
        steps = STEPS_PER_PART * epochs * minibatches
        played = self._play(act, environments, number, steps)
        values = played["values"]  # (E, T)
        ends = played["ends"]  # (E, T)

        # delta_t = r_t + gamma V(s_(t+1)) - V(s_t). At an end the next state is another episode's,
        # so what stands for it is 0, or its own value where only the time was up.
        following = np.concatenate([values[:, 1:], played["last"]], axis=1)
        following = np.where(ends == 1, played["beyond"], following)
        errors = played["rewards"] + self.discount * following - values  # (E, T)

        # A_t = delta_t + gamma lambda A_(t+1), from the last step back.
        going = self.discount * self.trace * (1 - ends)  # (E, T)
        advantages = np.empty_like(values)
        carried = np.zeros(len(values))  # (E,)

        for time in reversed(range(steps)):
            carried = errors[:, time] + going[:, time] * carried
            advantages[:, time] = carried

        # The return of a state is its advantage and its value together.              (E, T, 4)
        answers = np.stack(
            [played["actions"], played["logs"], advantages, advantages + values], axis=-1
        )

        # Each environment shuffles its own time steps, so that a minibatch takes as many from every
        # environment, whoever owns it.                                        (epochs, E, T)
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
        """Plays 2 steps of each environment per batch, and keeps them in order.

        x: (environments x (steps + 1), ..), the states and the one after the last step. y:
        (environments, steps, 5), the action, its log probability when it was taken, the reward,
        whether the episode ended, and where time ran out the value of the last state by the critic
        that acted.
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
        """Says how large the batch of `trajectory` is, without playing one."""
        count = self.global_batch // STEPS_PER_PART // num_shards
        steps = STEPS_PER_PART * batches
        seen, kind = (FRAMES, torch.uint8) if self.environment != "cartpole" else ((4,), dtype)

        return TrajectoryShape(
            (count * (steps + 1), *seen), (count, steps, 5), kind, dtype, count * steps
        )

    def _make(self, seeds: list[list[int]]) -> World:
        """Makes one environment for each seed."""
        if self.environment == "atari":
            return Atari(self.game, seeds)

        streams = [np.random.default_rng(seed) for seed in seeds]
        return CartPole(streams) if self.environment == "cartpole" else Frames(streams)

    def _tensor(self, states: np.ndarray) -> Tensor:
        """Makes states the network's input; frames stay bytes, which its first layer scales."""
        tensor = torch.from_numpy(states)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _play(
        self, act: Infer, environments: Own, number: int, steps: int
    ) -> dict[str, np.ndarray]:
        """Plays `steps` steps of each environment.

        Returns arrays of (environments, steps, ..), among them `states`; and `last`, the value of
        the state after the last step, (environments, 1).
        """
        world = environments.world
        names = environments.names

        # Drawn before anything happens: the stream of an environment then does not depend on how
        # often its episodes end.                                     (environments, steps)
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

            # Log probabilities of the actions: a softmax, shifted by its maximum against overflow.
            logs = out[:, :-1] - out[:, :-1].max(1, keepdims=True)
            logs -= np.log(np.exp(logs).sum(1, keepdims=True))

            # The action is the number of borders that the draw has passed. The last border, which
            # is 1 but for rounding, is left out, so there is no action behind it.
            borders = np.exp(logs).cumsum(1)[:, :-1]
            actions = (draws[:, time, None] > borders).sum(1)

            kept["actions"][:, time] = actions
            kept["values"][:, time] = out[:, -1]
            kept["logs"][:, time] = logs[rows, actions]
            rewards, over, late = world.step(actions)

            # Only the time is up: the episode would have gone on, so its state is worth something.
            if late.any():
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
        """The policy's loss plus the critic's squared error, minus a bonus for entropy.

        ppo: the clipped surrogate (PPO, equation 7); a2c: the plain policy gradient. Advantages
        come normalised (`Rollout.batch`): a mean over a shard's rows then stays a mean over all.
        """
        all_logs = output[:, :-1].log_softmax(-1)  # (B, actions)
        values = output[:, -1]  # (B,)

        # A trajectory keeps its time axis, a minibatch has none.
        if batch.y.dim() == 3:
            return self._corrected(all_logs, values, batch.y)

        actions, logs, advantages, returns = batch.y.unbind(-1)  # (B,) each
        new = all_logs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)  # (B,)

        if self.algorithm == "a2c":
            policy = -(new * advantages).mean()
        else:
            policy = self._clipped((new - logs).exp(), advantages)

        return self._whole(policy, all_logs, values - returns)

    def _clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """-mean min(r A, clip(r, 1 - epsilon, 1 + epsilon) A), where r is new over old."""
        clipped = ratio.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
        return -torch.minimum(ratio * advantages, clipped * advantages).mean()

    def _corrected(self, all_logs: Tensor, values: Tensor, y: Tensor) -> Tensor:
        """The same loss on trajectories of another policy, whose advantages V-trace estimates.

        They are normalised per trajectory. a2c: the policy gradient of IMPALA (section 4.2). ppo:
        the clipped surrogate against the policy that acted.
        """
        # The state after the last step has a value, but nobody acted in it.
        count, steps = y.shape[:2]
        all_logs = all_logs.view(count, steps + 1, -1)[:, :-1]  # (count, steps, actions)
        values = values.view(count, steps + 1)

        actions, logs, rewards, ends, beyond = y.unbind(-1)  # (count, steps) each
        new = all_logs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
        ratio = (new - logs).exp()

        # Targets are what the critic should have said: no gradient goes through them.
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
        """Adds to the policy's loss those of the critic and of the policy's entropy."""
        entropy = -(all_logs.exp() * all_logs).sum(-1).mean()
        return (
            policy
            + self.value_weight * 0.5 * errors.square().mean()
            - self.entropy_weight * entropy
        )

    def evaluate(self, infer: Infer) -> float:
        """Returns the mean return of the greedy policy over fixed starts.

        They are 32 of the pole, otherwise 4, and the same in every evaluation.
        """
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
    """A worker's own environments, and their numbers among those of all workers."""

    world: World
    names: range


class Rollout:
    """What a worker has collected, cut into the minibatches that it is trained on.

    states: (environments, T, ..); answers: (environments, T, 4), what `batch` gives as y; orders:
    (epochs, environments, T), in which order each environment's time steps are used.
    """

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

        # Minibatch -> the time steps of each environment; `_rows` picks the environments beside it.
        epochs, environments, _ = orders.shape
        times = orders.reshape(epochs, environments, minibatches, -1).swapaxes(1, 2)
        self._times = times.reshape(epochs * minibatches, environments, -1)
        self._rows = np.arange(environments)[:, None]

    def statistics(self) -> Tensor:
        """Returns the sum, the sum of squares and the number of each minibatch's advantages.

        (minibatches, 3) in float64: those of several workers can be added.
        """
        advantages = self._answers[self._rows, self._times, 2].reshape(len(self._times), -1)
        counts = np.full(len(advantages), advantages.shape[1])

        return torch.from_numpy(
            np.stack([advantages.sum(1), np.square(advantages).sum(1), counts], axis=1)
        )

    def batch(self, position: int, statistics: Tensor) -> Batch:
        """Returns minibatch `position`.

        x: its states (rows, ..). y: (rows, 4), action, log probability, advantage and return.
        statistics: (3,), of the advantages of all workers, by which these are normalised.
        """
        times = self._times[position]
        x = torch.from_numpy(self._states[self._rows, times]).flatten(0, 1)
        y = self._answers[self._rows, times].reshape(-1, 4)
        total, squares, count = statistics.tolist()
        mean = total / count

        # A difference of large numbers: rounding may take it below 0 where all are alike.
        variance = max(squares / count - mean**2, 0.0)
        y[:, 2] = (y[:, 2] - mean) / (math.sqrt(variance) + 1e-8)
        x = x.to(self._dtype) if x.is_floating_point() else x

        return Batch(x, torch.from_numpy(y).to(self._dtype), self._num_samples)
