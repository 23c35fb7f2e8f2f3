"""The networks of `rl_agent.py`: chains of layers that hold the actor and the critic at once.

Each chain ends in (B, actions + 1): a score per action and, in the last column, the value of the
state. The pole's two networks stand side by side (`Pair`), a game's share all but their last layer
(`nature`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Pair(nn.Module):
    """One layer of the actor and one of the critic, side by side.

    In between, activations are the actor's half and the critic's half of one vector. The first
    layer gives the whole state to both; the last one puts scores and value together and bends
    nothing.
    """

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
        """Maps (B, 4) or (B, 128) to (B, 128), or to (B, 3) in the last layer."""
        if self._first:
            of_actor = x
            of_critic = x
        else:
            of_actor, of_critic = x.chunk(2, dim=-1)

        out = torch.cat([self.actor(of_actor), self.critic(of_critic)], dim=-1)
        return out if self._last else out.tanh()


def _orthogonal(weight: Tensor, gain: float) -> None:
    """Fills a matrix with orthogonal rows of norm `gain`, in place.

    It is made in float64 and then cast. The last bits of a QR decomposition depend on the number of
    threads, so in float32 two ranks would not have started from the same parameters.
    """
    made = torch.empty_like(weight, dtype=torch.float64)
    nn.init.orthogonal_(made, gain)

    with torch.no_grad():
        weight.copy_(made)


class Scaled(nn.Module):
    """A convolution whose input is bytes, which are scaled to [0, 1] first."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        """Maps bytes (B, 4, 84, 84) to (B, 32, 20, 20)."""
        out: Tensor = self.convolution(x.to(self.convolution.weight.dtype) / 255)
        return out


def nature(num_actions: int) -> list[nn.Module]:
    """Makes the network of Mnih et al. 2015, with a value beside the scores of the actions.

    It has 1,687,719 parameters for six actions.
    """
    first = nn.Conv2d(4, 32, 8, stride=4)
    second = nn.Conv2d(32, 64, 4, stride=2)
    third = nn.Conv2d(64, 64, 3)
    wide = nn.Linear(3136, 512)
    last = nn.Linear(512, num_actions + 1)

    for layer in (first, second, third, wide, last):
        nn.init.kaiming_normal_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)

    # Scores near 0 make the first policy nearly even, so that it tries everything; the critic's
    # row keeps the scale of a layer that no ReLU follows.
    with torch.no_grad():
        last.weight[:-1] *= 0.01 / math.sqrt(2)
        last.weight[-1] /= math.sqrt(2)

    return [
        nn.Sequential(Scaled(first), nn.ReLU()),
        nn.Sequential(second, nn.ReLU()),
        nn.Sequential(third, nn.ReLU(), nn.Flatten()),
        nn.Sequential(wide, nn.ReLU()),
        last,
    ]
