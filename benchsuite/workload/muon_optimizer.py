"""Muon for hidden matrices beside AdamW for everything else, as one optimiser (Jordan et al. 2024;
Liu et al. 2025).

"Muon is Scalable for LLM Training", arXiv 2502.16982: the momentum of a matrix is made orthogonal
by five Newton-Schulz steps (in bf16) and scaled by 0.2 sqrt(max(rows, columns)), which is the size
of an AdamW step (section 2.2): one learning rate and one weight decay serve both. Embeddings,
heads, norms and biases take AdamW's step. It looks at whole matrices, by name: `Recipe.elementwise
= False`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchsuite.errors import UsageError


def muon(
    named: Iterable[tuple[str, Tensor]],
    is_hidden: Callable[[str], bool],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.Optimizer:
    """Makes Muon for the matrices whose names are hidden ones, and AdamW for all other tensors.

    UsageError before torch 2.9, which has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(
            f"optimizer = muon needs torch >= 2.9, this is {torch.__version__}: set optimizer = "
            "adamw"
        )

    tensors = list(named)
    matrices = [tensor for name, tensor in tensors if tensor.dim() == 2 and is_hidden(name)]
    others = [tensor for name, tensor in tensors if tensor.dim() != 2 or not is_hidden(name)]
    made: list[torch.optim.Optimizer] = []

    if matrices:
        made.append(torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"))

    # The first stage of a pipeline may hold no matrix, another one nothing else.
    if others:
        made.append(torch.optim.AdamW(others, lr, betas, weight_decay=weight_decay))

    return Together(made)


class Together(torch.optim.Optimizer):
    """Several optimisers of disjoint tensors as one: their groups in order, one state, one step."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self._optimizers = optimizers

        # Whoever forgets or averages the state does so for all.
        for each in optimizers:
            each.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss is computed again
        """Lets each optimiser step its own tensors."""
        for each in self._optimizers:
            each.step()
