"""V-trace estimates the returns of one policy from what another one did.

IMPALA, Espeholt et al. 2018, section 4.1. The learner's policy is some steps ahead of the actor's
that played; each step's surprise counts by the ratio of their probabilities, cut at 1. With equal
policies, and lambda = 1, v_s is the n-step return.
"""

from __future__ import annotations

import torch
from torch import Tensor


def vtrace(
    ratios: Tensor,
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    beyond: Tensor,
    *,
    discount: float,
    trace: float,
) -> tuple[Tensor, Tensor]:
    """Returns the targets v_s (equation 1) and the advantages r + gamma v_(s+1) - V, (B, T) each.

    ratios: (B, T), the learner's probabilities over the actor's; both rho and c are these, cut at
    1. rewards, ends: (B, T). values: (B, T + 1), of the learner's critic. beyond: (B, T), the value
    that stands for what comes after an end. trace: lambda of remark 2.
    """
    cut = ratios.clamp(max=1.0)  # rho and c, (B, T)

    # gamma, but 0 behind an end: nothing flows back from one episode into the one before it.
    going = discount * (1 - ends)  # (B, T)

    # delta_t V = rho (r + gamma V(x_(t+1)) - V(x_t))
    following = torch.where(ends == 1, beyond, values[:, 1:])
    errors = cut * (rewards + discount * following - values[:, :-1])  # (B, T)

    # v_s = V(x_s) + delta_s V + gamma lambda c_s (v_(s+1) - V(x_(s+1))), from the last step back.
    targets = values.clone()  # (B, T + 1)

    for time in reversed(range(ratios.shape[1])):
        ahead = targets[:, time + 1] - values[:, time + 1]
        targets[:, time] += errors[:, time] + going[:, time] * trace * cut[:, time] * ahead

    # The advantage looks one step ahead with the target in the place of the value.
    following = torch.where(ends == 1, beyond, targets[:, 1:])
    advantages = rewards + discount * following - values[:, :-1]

    return targets[:, :-1], advantages
