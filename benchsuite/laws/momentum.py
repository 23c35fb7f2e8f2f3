"""Laws of momentum in asynchronous training: whose vector a gradient enters, who looks ahead.

From the push log alone the server's updates are computed again, line by line as in the paper (arXiv
1907.11612, algorithm 4), with a sum over all workers' vectors in the place of the server's running
one. With one worker DANA is Nesterov's momentum, which torch has. The laws speak about `momentum =
per_worker | dana`; `shared` is the recipe's optimiser (`replay.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases, twins
from benchsuite.laws.harness.runs import Change, Run, option, recipe_of, relative, run, worst
from benchsuite.plan.cell import Cell
from benchsuite.worker import setup
from benchsuite.workload import seeded_layers

FLOAT64 = 1e-10
NESTEROV = 1e-5  # holds for the parameters that workers are sent; float64 stays far below


def replays(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Every version of the server's parameters, and every answer, follow from the push log.

    Bound: a relative error of 1e-10. In the twins there is one vector for all workers, answers do
    not look ahead or only by the worker's own vector, or gradients are one batch late.
    """
    result = run(make_ranks, cell, change=change)
    versions, answers = _serial(result)
    figures = [
        (relative(mine - theirs, theirs), f"version {v}")
        for v, (mine, theirs) in enumerate(zip(result.servers[0].params, versions, strict=True))
    ]
    for worker, sent in zip(result.workers, answers, strict=True):
        figures += [
            (relative(mine - theirs, theirs), f"answer {k} to worker {worker.rank}")
            for k, (mine, theirs) in enumerate(zip(worker.params, sent, strict=True))
        ]
    value, where = worst(figures)
    stale = sum(result.logs[0].staleness)
    return Figure(
        value,
        FLOAT64,
        f"||difference|| / ||parameters||, {where}, staleness {stale} in all, {cell.label}",
    )


def alone_is_nesterov(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """One worker is sent the parameters of torch's SGD with nesterov = True.

    Bound: a relative error of 1e-5. In the twin answers do not look ahead.
    """
    result = run(make_ranks, cell, change=change)
    model = _Model(result.cell)
    recipe = recipe_of(result.cell)
    momentum = recipe.make_optimizer([torch.zeros(1)]).param_groups[0]["momentum"]
    params = model.start.clone()
    optimizer = torch.optim.SGD([params], lr=1.0, momentum=momentum, nesterov=True)
    figures = []
    for step, mine in enumerate(result.workers[0].params[1:]):
        params.grad = model.gradient(params, step)
        optimizer.param_groups[0]["lr"] = recipe.lr(step * recipe.global_batch / recipe.budget)
        optimizer.step()
        figures.append((relative(mine - params, params), f"after step {step}"))
    value, where = worst(figures)
    return Figure(value, NESTEROV, f"||difference|| / ||parameters|| sent, {where}, {cell.label}")


class _Model:
    """Gradients of single pushes, computed by torch alone."""

    def __init__(self, cell: Cell) -> None:
        dtype = setup.DTYPES[cell.precision]
        self._workload = setup.start_workload(cell)
        self._num_workers = cell.num_workers
        self._module = nn.Sequential(*seeded_layers(self._workload, cell.seed)).to(dtype)
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self.start = nn.utils.parameters_to_vector(self._parameters).detach()

    def gradient(self, params: Tensor, tag: int) -> Tensor:
        """The gradient of batch number `tag` at these parameters (P,)."""
        nn.utils.vector_to_parameters(params, self._parameters)
        index, shard = divmod(tag, self._num_workers)
        batch = self._workload.batch(index, shard=shard, num_shards=self._num_workers)
        loss = self._workload.loss(self._module(batch.x), batch)
        flat: Tensor = torch.cat([g.flatten() for g in torch.autograd.grad(loss, self._parameters)])
        return flat


def _serial(result: Run) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The server's versions, and what each worker holds after each of its steps."""
    cell = result.cell
    log = result.logs[0]
    recipe = recipe_of(result.cell)
    model = _Model(cell)
    group = recipe.make_optimizer([torch.zeros(1)]).param_groups[0]
    momentum = group["momentum"]
    decay = group["weight_decay"]
    looks_ahead = option(cell, "asynchronous", "momentum") == "dana"
    theta = model.start.clone()
    v = [torch.zeros_like(theta) for _ in range(cell.num_workers)]
    versions = [theta.clone()]
    sent = [[theta.clone()] for _ in range(cell.num_workers)]
    for row, (worker, tag) in enumerate(zip(log.worker, log.tag, strict=True)):
        gradient = model.gradient(sent[worker][-1], tag) + decay * theta
        samples = int(row * recipe.global_batch / cell.num_workers)
        lr = recipe.lr(samples / recipe.budget)
        if option(cell, "asynchronous", "lr_rule") == "equal_sample":
            lr /= cell.num_workers
        v[worker] = momentum * v[worker] + gradient
        theta = theta - lr * v[worker]
        versions.append(theta)
        sent[worker].append(theta - lr * momentum * torch.stack(v).sum(0) if looks_ahead else theta)
    return versions, sent


class _OneForAll(twins.Policy):
    """A server policy in which every gradient enters the same vector."""

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        super().on_push(0, version, flat)
        return [worker]

    def answer(self, worker: int) -> Tensor:
        ahead: Tensor = self._whole.answer(worker)
        return ahead


class _LooksBack(_OneForAll):
    """A server policy that answers with where parameters are, not where they will be."""

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        return twins.Policy.on_push(self, worker, version, flat)

    def answer(self, worker: int) -> Tensor:
        return self._shard


class _AheadAlone(_LooksBack):
    """A server policy that looks ahead by the worker's own vector only."""

    def answer(self, worker: int) -> Tensor:
        whole = self._whole
        own: Tensor = whole._own[worker] * (whole._lr() * whole._momentum)
        return self._shard - own


def _is_own(cell: Cell) -> bool:
    """Whether each worker has a momentum vector of its own."""
    form = option(cell, "asynchronous", "momentum")
    return (
        cell.num_servers == 1
        and form in ("per_worker", "dana")
        and recipe_of(cell).clip_norm is None
    )


def _on(form: str, replicas: int) -> dict[str, Any]:
    """Fields of a cell with this form of momentum."""
    # In the tiny workload the first has no weight decay, and the second has.
    optimizer = "nesterov" if replicas == 1 else "momentum"
    recipe = {"optimizer": optimizer, "lr": 0.02, "schedule": False, "clip_norm": 0.0}
    options = {"asynchronous": {"momentum": form}, "tiny": recipe}
    place = {"topology": "parameter_server", "servers": 1, "replicas": replicas}
    return {"sync": "asynchronous", **place, "options": options}


def _twin(
    law: Callable[..., Figure], policy: Any, broken: str, form: str, replicas: int = 3
) -> Control:
    """A twin whose servers follow this policy."""
    return Control(broken, partial(law, change=twins.with_policy(policy)), _on(form, replicas))


def _cells(asked: cases.Asked) -> list[Cell]:
    """Both forms with both rules for the learning rate, by momentum.

    Alone, there is also one without decay of the rate and of the weights.
    """
    if not asked.includes(sync="asynchronous", topology="parameter_server", compression="none"):
        return []
    fields: dict[str, Any] = {
        "sync": "asynchronous",
        "topology": "parameter_server",
        "clock": asked.clock,
    }
    made = [
        cases.tiny(
            ("momentum", 0.005, 0.0),
            replicas=n,
            options={"asynchronous": {"momentum": form, "lr_rule": rule}},
            **fields,
        )
        for form in ("per_worker", "dana")
        for rule in ("equal_sample", "same")
        for n in asked.workers
    ]
    return made + [
        cases.on(cases.tiny(**fields), **_on("dana", 1)) for n in asked.workers if n == 1
    ]


CELLS = cases.Cells(_cells, cases.subject_of)
LAWS = (
    Law(
        "a worker's momentum is its own, and answers look ahead by all of them",
        replays,
        _is_own,
        (
            _twin(replays, _OneForAll, "one vector for all workers", "per_worker"),
            _twin(replays, _LooksBack, "answers do not look ahead", "dana"),
            _twin(replays, _AheadAlone, "answers look ahead by one worker's vector", "dana"),
            Control(
                "gradients are one batch late",
                partial(replays, change=twins.late_gradient),
                _on("dana", 3),
            ),
        ),
    ),
    Law(
        "alone, DANA is Nesterov's momentum",
        alone_is_nesterov,
        lambda cell: (
            _is_own(cell)
            and cell.replicas == 1
            and option(cell, "asynchronous", "momentum") == "dana"
            and not _decays_or_anneals(cell)
        ),
        (_twin(alone_is_nesterov, _LooksBack, "answers do not look ahead", "dana", 1),),
    ),
)


def _decays_or_anneals(cell: Cell) -> bool:
    """Whether rate or weights decay.

    Nesterov looks ahead with the next step's rate and decays where it looks, so it equals DANA only
    without both.
    """
    recipe = recipe_of(cell)
    decay = recipe.make_optimizer([torch.zeros(1)]).param_groups[0].get("weight_decay", 0.0)
    return bool(decay) or len({recipe.lr(k / 7) for k in range(8)}) > 1
