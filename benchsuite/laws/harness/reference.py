"""The plain training loop on one process that strategies are compared with.

It uses torch alone and nothing of the suite's strategies: torch's own modules, optimiser and
clipping on the model's own tensors, with one whole batch per step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchsuite.plan.cell import Cell
from benchsuite.worker import setup
from benchsuite.worker.rollouts import Batches
from benchsuite.workload import seeded_layers, trained_parameters


def one_process(cell: Cell, *, clip_norm: float | None = None) -> list[Tensor]:
    """The flat parameters (P,) at the start and after every step of the budget.

    `clip_norm`, where given, takes the place of the recipe's.
    """
    dtype = setup.DTYPES[cell.precision]
    workload = setup.start_workload(cell)
    recipe = setup.make_recipe(cell, workload)
    model = nn.Sequential(*seeded_layers(workload, cell.seed)).to(dtype)
    named = trained_parameters(model)
    params = list(named.values())
    optimizer = recipe.optimizer_of(named)
    batches = Batches(workload)
    act = torch.no_grad()(model.forward)
    flat = [nn.utils.parameters_to_vector(params).detach().clone()]
    for step in range(recipe.budget // recipe.global_batch):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr(step * recipe.global_batch / recipe.budget)
        batch = batches.fetch((step, 0, 1), act)
        optimizer.zero_grad()
        workload.loss(model(batch.x), batch).backward()
        if (limit := clip_norm or recipe.clip_norm) is not None:
            torch.nn.utils.clip_grad_norm_(params, limit)
        optimizer.step()
        flat.append(nn.utils.parameters_to_vector(params).detach().clone())
    return flat
