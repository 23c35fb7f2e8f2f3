"""The worlds that `rl_agent.py` acts in: a pole on a cart, synthetic frames, Atari games. Batches
of environments.

Each has streams of its own per environment, so that what happens in it does not depend on who owns
the others.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

TIME_LIMIT = 500  # steps of a pole
FRAMES = (4, 84, 84)  # the last four, as the network sees them


class World(Protocol):
    """Environments side by side, n of them."""

    def observe(self) -> np.ndarray:
        """(n, ..): float32, or bytes of frames; the caller's to keep."""

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """actions (n,) -> rewards, whether the episode is over, whether only its time is, (n,)
        each."""

    def restart(self, which: np.ndarray) -> None:
        """New episodes where `which` (n,) says so."""


class CartPole:
    """CartPole-v1 (Barto, Sutton and Anderson 1983); to the bits gymnasium's, which steps one at a
    time in float64.

    `state` is (4, n): position, velocity, angle, angular velocity. Every step gives a reward of 1.
    """

    GRAVITY = 9.8
    CART = 1.0
    POLE = 0.1
    LENGTH = 0.5
    FORCE = 10.0
    TAU = 0.02
    FAR = 2.4
    STEEP = 12 * 2 * math.pi / 360
    MASS = POLE + CART
    MOMENT = POLE * LENGTH

    def __init__(self, streams: Sequence[np.random.Generator]) -> None:
        count = len(streams)
        self._streams = streams
        self.state = np.empty((4, count))
        self._change = np.empty((4, count))
        self.age = np.zeros(count, dtype=np.int64)
        self._temp = np.empty(count)
        self._bend = np.empty(count)
        self._trig = np.empty((2, count))
        self._rewards = np.ones(count)
        self._bounds = np.array([[self.FAR], [self.STEEP]])
        self.restart(np.ones(count, dtype=bool))

    def observe(self) -> np.ndarray:
        return self.state.T.astype(np.float32, order="C")

    def restart(self, which: np.ndarray) -> None:
        for number in np.flatnonzero(which).tolist():
            self.state[:, number] = self._streams[number].uniform(low=-0.05, high=0.05, size=(4,))

        self.age[which] = 0

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        state = self.state
        change = self._change
        temp = self._temp
        bend = self._bend
        angle = state[2]
        turning = state[3]
        cosine, sine = self._trig
        np.cos(angle, out=cosine)
        np.sin(angle, out=sine)
        # temp = (force + moment turning^2 sine) / mass
        np.square(turning, out=temp)
        temp *= self.MOMENT
        temp *= sine
        temp += np.where(actions == 1, self.FORCE, -self.FORCE)
        temp /= self.MASS
        # bend = (gravity sine - cosine temp) / (length (4/3 - pole cosine^2 / mass))
        np.square(cosine, out=bend)
        bend *= self.POLE
        bend /= self.MASS
        np.subtract(4.0 / 3.0, bend, out=bend)
        bend *= self.LENGTH
        sine *= self.GRAVITY
        sine -= cosine * temp
        np.divide(sine, bend, out=bend)
        # push = temp - moment bend cosine / mass
        np.multiply(bend, self.MOMENT, out=sine)
        sine *= cosine
        sine /= self.MASS
        np.subtract(temp, sine, out=change[1])
        change[0], change[2], change[3] = state[1], turning, bend
        change *= self.TAU
        state += change
        self.age += 1
        fallen = np.asarray((np.abs(state[::2]) > self._bounds).any(0))

        return self._rewards, fallen, (self.age >= TIME_LIMIT) & ~fallen


class Frames:
    """Random frames, whatever is done: for volume, not for learning. An episode has 64 steps."""

    STEPS = 64

    def __init__(self, streams: Sequence[np.random.Generator]) -> None:
        self._streams = streams
        self._frames = np.zeros((len(streams), *FRAMES), dtype=np.uint8)
        self._age = np.zeros(len(streams), dtype=np.int64)
        self.restart(np.ones(len(streams), dtype=bool))

    def observe(self) -> np.ndarray:
        return self._frames.copy()

    def restart(self, which: np.ndarray) -> None:
        for number in np.flatnonzero(which).tolist():
            self._frames[number] = self._draw(number)

        self._age[which] = 0

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._frames[:, :-1] = self._frames[:, 1:]
        for number in range(len(self._frames)):
            self._frames[number, -1] = self._draw(number)

        self._age += 1
        return (
            (self._frames[:, -1, 0, 0] > 127) * 1.0,
            np.zeros(len(actions), dtype=bool),
            self._age >= self.STEPS,
        )

    def _draw(self, number: int) -> np.ndarray:
        return np.frombuffer(
            self._streams[number].bytes(FRAMES[1] * FRAMES[2]), dtype=np.uint8
        ).reshape(FRAMES[1:])


class Atari:
    """A game by the ale-py package, seen as by Mnih et al. 2015.

    Every fourth frame (the brighter of two), grey, 84 x 84, the last four of them; rewards cut to
    their sign; up to 30 idle steps at the start; 27,000 steps at most.
    """

    SKIP = 4
    IDLE = 30
    STEPS = 27_000

    def __init__(self, game: str, seeds: Sequence[Sequence[int]]) -> None:
        self._games = []
        for seed in seeds:
            number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0] >> 1)  # a C int
            self._games.append(_game(game, number))

        self._streams = [np.random.default_rng(list(seed)) for seed in seeds]
        self._actions = [made.getMinimalActionSet() for made in self._games]
        self._frames = np.zeros((len(seeds), *FRAMES), dtype=np.uint8)
        self._age = np.zeros(len(seeds), dtype=np.int64)
        self.restart(np.ones(len(seeds), dtype=bool))

    @staticmethod
    def num_actions(game: str) -> int:
        """Size of the game's minimal action set."""
        return len(_game(game, 0).getMinimalActionSet())

    def observe(self) -> np.ndarray:
        return self._frames.copy()

    def restart(self, which: np.ndarray) -> None:
        for number in np.flatnonzero(which).tolist():
            game = self._games[number]
            game.reset_game()

            for _ in range(int(self._streams[number].integers(self.IDLE + 1))):
                game.act(self._actions[number][0])

            self._frames[number] = _small(game.getScreenGrayscale())

        self._age[which] = 0

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rewards = np.zeros(len(actions))
        over = np.zeros(len(actions), dtype=bool)
        self._frames[:, :-1] = self._frames[:, 1:]

        for number, (game, action) in enumerate(zip(self._games, actions, strict=True)):
            screens: list[np.ndarray] = []
            for skipped in range(self.SKIP):
                rewards[number] += game.act(self._actions[number][action])
                if skipped >= self.SKIP - 2:
                    screens.append(game.getScreenGrayscale())

            self._frames[number, -1] = _small(np.maximum(*screens))
            over[number] = game.game_over()

        self._age += 1
        return np.sign(rewards), over, (self._age >= self.STEPS) & ~over


def _game(name: str, seed: int) -> Any:
    """A running game. ValueError where the package, or the game, is not there."""
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

    package.ALEInterface.setLoggerMode(package.LoggerMode.Error)
    game = package.ALEInterface()
    game.setInt("random_seed", seed)
    game.setFloat("repeat_action_probability", 0.0)
    game.loadROM(path)
    game.reset_game()

    return game


def _small(screen: np.ndarray) -> np.ndarray:
    """(210, 160) -> (84, 84) by areas."""
    whole = torch.from_numpy(screen.astype(np.float32))[None, None]
    return (
        nn.functional.interpolate(whole, FRAMES[1:], mode="area")[0, 0]
        .round()
        .to(torch.uint8)
        .numpy()
    )
