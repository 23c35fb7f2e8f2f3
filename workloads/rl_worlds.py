"""The worlds that `rl_agent.py` acts in: a pole on a cart, synthetic frames, Atari games.

A world is a batch of environments that are stepped together. Every environment has a random stream
of its own, so that what happens in it does not depend on which worker owns the others: the same
environments live the same lives for every number of workers.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

# Steps after which an episode of the pole ends, however well it stands.
TIME_LIMIT = 500

# Shape of one observation of a game: the last four frames, as the network sees them.
FRAMES = (4, 84, 84)


class World(Protocol):
    """n environments side by side, stepped together.

    An episode that is over goes on only after `restart`: `step` never begins a new one by itself,
    because the learner wants to see the last state first.
    """

    def observe(self) -> np.ndarray:
        """What the policy sees, (n, ..): float32, or bytes of frames.

        It is the caller's to keep: later steps do not change it.
        """

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Acts once in every environment; `actions` is (n,).

        Returns the rewards, whether the episode is over, and whether only its time is, (n,) each.
        The last two are never both true: an episode whose time is up would have gone on, so its
        last state still has a value.
        """

    def restart(self, which: np.ndarray) -> None:
        """Begins new episodes in the environments that `which` (n,) says."""


class CartPole:
    """CartPole-v1: a pole stands on a cart that is pushed left or right.

    Barto, Sutton and Anderson 1983. All poles are stepped at once, with the bits of gymnasium's
    environment, which steps one at a time in float64. Every step gives a reward of 1.

    `state` is (4, n): position, velocity, angle and angular velocity of each pole.
    """

    GRAVITY = 9.8  # m/s^2
    CART = 1.0  # mass in kg
    POLE = 0.1  # mass in kg
    LENGTH = 0.5  # of half the pole, in m
    FORCE = 10.0  # of one push to either side, in N
    TAU = 0.02  # seconds of one step

    # The episode is over beyond this distance (m) or this angle (rad).
    FAR = 2.4
    STEEP = 12 * 2 * math.pi / 360

    MASS = POLE + CART
    MOMENT = POLE * LENGTH

    def __init__(self, streams: Sequence[np.random.Generator]) -> None:
        count = len(streams)
        self._streams = streams
        self.state = np.empty((4, count))
        self.age = np.zeros(count, dtype=np.int64)  # steps of the episode so far

        # Scratch of `step`: a rollout has thousands of steps, each too short to allocate in.
        self._change = np.empty((4, count))
        self._temp = np.empty(count)
        self._bend = np.empty(count)
        self._trig = np.empty((2, count))

        self._rewards = np.ones(count)
        self._bounds = np.array([[self.FAR], [self.STEEP]])  # (2, 1)

        self.restart(np.ones(count, dtype=bool))

    def observe(self) -> np.ndarray:
        """(n, 4) float32: position, velocity, angle and angular velocity of each pole."""
        return self.state.T.astype(np.float32, order="C")

    def restart(self, which: np.ndarray) -> None:
        """Begins new episodes, each drawn from the stream of its own environment."""
        for number in np.flatnonzero(which).tolist():
            stream = self._streams[number]
            self.state[:, number] = stream.uniform(low=-0.05, high=0.05, size=(4,))

        self.age[which] = 0

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One step of Euler's method for all poles, action 1 pushes right and 0 left.

        Everything is written in place and in the order of gymnasium's own expressions: another
        order has other last bits, and the poles part from gymnasium's after some hundred steps.
        """
        state = self.state  # (4, n)
        change = self._change  # (4, n), the derivative of the state
        temp = self._temp  # (n,)
        bend = self._bend  # (n,), angular acceleration

        angle = state[2]
        turning = state[3]
        cosine, sine = self._trig
        np.cos(angle, out=cosine)
        np.sin(angle, out=sine)

        # temp = (force + moment turning^2 sine) / mass
        # It is what the force and the swinging pole would do to the cart alone.
        np.square(turning, out=temp)
        temp *= self.MOMENT
        temp *= sine
        temp += np.where(actions == 1, self.FORCE, -self.FORCE)
        temp /= self.MASS

        # bend = (gravity sine - cosine temp) / (length (4/3 - pole cosine^2 / mass))
        # `sine` is overwritten by the numerator: it is not needed again.
        np.square(cosine, out=bend)
        bend *= self.POLE
        bend /= self.MASS
        np.subtract(4.0 / 3.0, bend, out=bend)
        bend *= self.LENGTH
        sine *= self.GRAVITY
        sine -= cosine * temp
        np.divide(sine, bend, out=bend)

        # push = temp - moment bend cosine / mass
        # It is the acceleration of the cart, row 1 of the derivative; `sine` is scratch by now.
        np.multiply(bend, self.MOMENT, out=sine)
        sine *= cosine
        sine /= self.MASS
        np.subtract(temp, sine, out=change[1])

        # Euler: all four move by the derivative at the old state.
        change[0] = state[1]
        change[2] = turning
        change[3] = bend
        change *= self.TAU
        state += change
        self.age += 1

        # Rows 0 and 2 are position and angle. A pole that falls in its last step has fallen: the
        # two answers exclude each other.
        fallen = np.asarray((np.abs(state[::2]) > self._bounds).any(0))
        timed_out = (self.age >= TIME_LIMIT) & ~fallen

        return self._rewards, fallen, timed_out


class Frames:
    """Random frames, whatever the agent does: they are there for their volume, not for learning.

    An episode has 64 steps, and none ends before.
    """

    # Of an episode, which always ends by its time and never by what is done.
    STEPS = 64

    def __init__(self, streams: Sequence[np.random.Generator]) -> None:
        self._streams = streams

        # The last frames of each environment, the newest last.            (n, 4, 84, 84)
        self._frames = np.zeros((len(streams), *FRAMES), dtype=np.uint8)

        # Steps of each environment's episode so far.                                 (n,)
        self._age = np.zeros(len(streams), dtype=np.int64)
        self.restart(np.ones(len(streams), dtype=bool))

    def observe(self) -> np.ndarray:
        """(n, 4, 84, 84) bytes, a copy: the next step moves the frames in place."""
        return self._frames.copy()

    def restart(self, which: np.ndarray) -> None:
        """Begins new episodes, each drawn from the stream of its own environment."""
        for number in np.flatnonzero(which).tolist():
            self._frames[number] = self._draw(number)

        self._age[which] = 0

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shows the next random frame, whose first byte decides whether the reward is 1 or 0."""
        # The oldest frame leaves, the newest comes in behind.
        self._frames[:, :-1] = self._frames[:, 1:]
        for number in range(len(self._frames)):
            self._frames[number, -1] = self._draw(number)

        self._age += 1
        rewards = (self._frames[:, -1, 0, 0] > 127) * 1.0

        # No state is the last one by the game's own rules, only by the time.
        over = np.zeros(len(actions), dtype=bool)
        timed_out = self._age >= self.STEPS

        return rewards, over, timed_out

    def _draw(self, number: int) -> np.ndarray:
        """The next frame (84, 84) of one environment, from that environment's own stream."""
        drawn = self._streams[number].bytes(FRAMES[1] * FRAMES[2])
        return np.frombuffer(drawn, dtype=np.uint8).reshape(FRAMES[1:])


class Atari:
    """A game of the ale-py package, seen as Mnih et al. 2015 let their agent see it.

    An observation is the last four frames, each grey and of 84 x 84 bytes. An action lasts four
    frames of the game, of which one is kept. Rewards are cut to their sign, so that one learning
    rate serves all games. An episode begins with up to 30 idle frames, so that not all are alike,
    and has at most 27,000 actions.
    """

    SKIP = 4  # frames that one action lasts
    IDLE = 30  # the most frames that pass before the first action
    STEPS = 27_000  # actions of an episode, half an hour of play

    def __init__(self, game: str, seeds: Sequence[Sequence[int]]) -> None:
        self._games = []

        for seed in seeds:
            # The emulator takes a C int: 31 bits of the 32.
            state = np.random.SeedSequence(list(seed)).generate_state(1)
            self._games.append(_game(game, int(state[0] >> 1)))

        self._streams = [np.random.default_rng(list(seed)) for seed in seeds]
        self._actions = [made.getMinimalActionSet() for made in self._games]

        self._frames = np.zeros((len(seeds), *FRAMES), dtype=np.uint8)
        self._age = np.zeros(len(seeds), dtype=np.int64)
        self.restart(np.ones(len(seeds), dtype=bool))

    @staticmethod
    def num_actions(game: str) -> int:
        """Number of actions that do something in the game, which the policy chooses among.

        The network's size depends on it, so it is asked before there are environments.
        """
        return len(_game(game, 0).getMinimalActionSet())

    def observe(self) -> np.ndarray:
        """(n, 4, 84, 84) bytes, a copy: the next step moves the frames in place."""
        return self._frames.copy()

    def restart(self, which: np.ndarray) -> None:
        """Begins new episodes, each drawn from the stream of its own environment."""
        for number in np.flatnonzero(which).tolist():
            game = self._games[number]
            game.reset_game()

            # The first action of every game is to do nothing.
            idle = int(self._streams[number].integers(self.IDLE + 1))
            for _ in range(idle):
                game.act(self._actions[number][0])

            self._frames[number] = _small(game.getScreenGrayscale())

        self._age[which] = 0

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Repeats each action for four frames, and shows the brighter of the last two.

        A game may draw some of its objects in every other frame only; the maximum of two shows all.
        """
        rewards = np.zeros(len(actions))
        over = np.zeros(len(actions), dtype=bool)

        # The oldest frame leaves, the newest comes in behind.
        self._frames[:, :-1] = self._frames[:, 1:]

        for number, (game, action) in enumerate(zip(self._games, actions, strict=True)):
            screens: list[np.ndarray] = []  # (210, 160) each

            for skipped in range(self.SKIP):
                rewards[number] += game.act(self._actions[number][action])
                if skipped >= self.SKIP - 2:
                    screens.append(game.getScreenGrayscale())

            self._frames[number, -1] = _small(np.maximum(*screens))
            over[number] = game.game_over()

        self._age += 1
        timed_out = (self._age >= self.STEPS) & ~over

        return np.sign(rewards), over, timed_out


def _game(name: str, seed: int) -> Any:
    """Starts a game in an emulator of its own.

    ValueError where the ale-py package, or the game in it, is not there.
    """
    try:
        package = importlib.import_module("ale_py")
        path = importlib.import_module("ale_py.roms").get_rom_path(name)
    except ImportError as error:
        raise ValueError(
            "environment = atari needs the ale-py package, which is not installed (its licence is "
            "GPL-2.0, so it is no "
            "dependency of this suite): pip install ale-py"
        ) from error

    if path is None:
        raise ValueError(f"game = {name!r}: ale-py has no such game; set game = pong, breakout ..")

    # Without this the emulator prints a greeting for every environment.
    package.ALEInterface.setLoggerMode(package.LoggerMode.Error)

    # Settings count from the next `loadROM`. No sticky actions: Mnih et al. 2015 had none.
    game = package.ALEInterface()
    game.setInt("random_seed", seed)
    game.setFloat("repeat_action_probability", 0.0)
    game.loadROM(path)
    game.reset_game()

    return game


def _small(screen: np.ndarray) -> np.ndarray:
    """Shrinks a screen of (210, 160) bytes to a frame of (84, 84), by the mean over areas."""
    whole = torch.from_numpy(screen.astype(np.float32))[None, None]  # (1, 1, 210, 160)
    shrunk = nn.functional.interpolate(whole, FRAMES[1:], mode="area")[0, 0]  # (84, 84)

    frame: np.ndarray = shrunk.round().to(torch.uint8).numpy()
    return frame
