"""V-trace: returns of one policy from what another did (IMPALA, Espeholt et al. 2018, section
4.1)."""

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
    """Targets v_s (equation 1 of IMPALA) and advantages r + gamma v_(s+1) - V, (B, T) each; rho and
    c cut at 1.

    values: (B, T + 1); ratios of the learner's to the actor's probabilities, rewards, ends, beyond
    (the value that stands for what comes after an end): (B, T). trace: lambda of remark 2.
    """
    cut = ratios.clamp(max=1.0)
    going = discount * (1 - ends)
    following = torch.where(ends == 1, beyond, values[:, 1:])
    errors = cut * (rewards + discount * following - values[:, :-1])
    targets = values.clone()

    for time in reversed(range(ratios.shape[1])):
        ahead = targets[:, time + 1] - values[:, time + 1]
        targets[:, time] += errors[:, time] + going[:, time] * trace * cut[:, time] * ahead

    following = torch.where(ends == 1, beyond, targets[:, 1:])
    return targets[:, :-1], rewards + discount * following - values[:, :-1]
