"""The networks of `rl_agent.py`: chains that end in (B, actions + 1), a score per action and the
value of the state."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Pair(nn.Module):
    """One layer of the actor and of the critic, side by side. The first sees the state, the last
    gives scores and a value."""

    def __init__(
        self,
        inputs: int,
        actor: int,
        critic: int,
        *,
        gains: tuple[float, float],
        first: bool = False,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.actor = nn.Linear(inputs, actor)
        self.critic = nn.Linear(inputs, critic)

        for linear, gain in zip((self.actor, self.critic), gains, strict=True):
            _orthogonal(linear.weight, gain)
            nn.init.zeros_(linear.bias)

        self._first = first
        self._last = last

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) or (B, 128) -> (B, 128) or (B, 3)."""
        mine, theirs = (x, x) if self._first else x.chunk(2, dim=-1)
        out = torch.cat([self.actor(mine), self.critic(theirs)], dim=-1)

        return out if self._last else out.tanh()


def _orthogonal(weight: Tensor, gain: float) -> None:
    """Orthogonal rows. By way of float64: the last bits of a QR decomposition depend on the number
    of threads."""
    made = torch.empty_like(weight, dtype=torch.float64)
    nn.init.orthogonal_(made, gain)

    with torch.no_grad():
        weight.copy_(made)


class Scaled(nn.Module):
    """A convolution of bytes, scaled to [0, 1]."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4, 84, 84) -> (B, 32, 20, 20)."""
        out: Tensor = self.convolution(x.to(self.convolution.weight.dtype) / 255)
        return out


def nature(num_actions: int) -> list[nn.Module]:
    """The network of Mnih et al. 2015, with a value beside the scores: 1,687,719 parameters for six
    actions."""
    first = nn.Conv2d(4, 32, 8, stride=4)
    second = nn.Conv2d(32, 64, 4, stride=2)
    third = nn.Conv2d(64, 64, 3)
    wide = nn.Linear(3136, 512)
    last = nn.Linear(512, num_actions + 1)

    for layer in (first, second, third, wide, last):
        nn.init.kaiming_normal_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)

    with torch.no_grad():  # the policy starts even, the critic at its own scale
        last.weight[:-1] *= 0.01 / math.sqrt(2)
        last.weight[-1] /= math.sqrt(2)

    return [
        nn.Sequential(Scaled(first), nn.ReLU()),
        nn.Sequential(second, nn.ReLU()),
        nn.Sequential(third, nn.ReLU(), nn.Flatten()),
        nn.Sequential(wide, nn.ReLU()),
        last,
    ]
