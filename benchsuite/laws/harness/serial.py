"""Serial loops of the strategies whose replicas differ: the references of the laws in
`replicas.py`.

All replicas live in one process and step one after the other, on torch's own modules and
optimisers. There are N flat vectors, N optimisers and the papers' equations between them; no comm,
no topology and nothing of `sync/` is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchsuite.laws.harness.runs import option, sync_of
from benchsuite.plan.cell import Cell
from benchsuite.topology import Graph
from benchsuite.worker import setup
from benchsuite.workload import seeded_layers, trained_parameters, views

Path = list[list[Tensor]]  # step, where 0 is the start -> worker -> its parameters (P,)
Exchange = Callable[[list[Tensor], Tensor], None]  # changes the replicas in place by W of the step


class Replicas:
    """N replicas of the cell's model, each with its own parameters and optimiser."""

    def __init__(self, cell: Cell) -> None:
        dtype = setup.DTYPES[cell.precision]
        self._workload = setup.start_workload(cell)
        self.recipe = setup.make_recipe(cell, self._workload)
        self._model = nn.Sequential(*seeded_layers(self._workload, cell.seed)).to(dtype)
        self.shapes = {name: p.shape for name, p in trained_parameters(self._model).items()}
        self._parameters = list(trained_parameters(self._model).values())
        start = nn.utils.parameters_to_vector(self._parameters).detach()
        self.num_workers = cell.num_workers
        self.params = [start.clone() for _ in range(self.num_workers)]
        self.fresh_optimizers()
        self.num_steps = self.recipe.budget // self.recipe.global_batch

    def fresh_optimizers(self) -> None:
        """Gives every replica a new optimiser, which forgets all momentum."""
        self.stepped = [
            {"": flat} if self.recipe.elementwise else views(flat, self.shapes)
            for flat in self.params
        ]
        self.optimizers = [self.recipe.optimizer_of(named) for named in self.stepped]

    def gradient(self, worker: int, step: int, at: Tensor | None = None) -> Tensor:
        """The gradient (P,) of the worker's shard of this global batch.

        It is taken at the worker's own parameters unless `at` gives others.
        """
        nn.utils.vector_to_parameters(self.params[worker] if at is None else at, self._parameters)
        batch = self._workload.batch(step, shard=worker, num_shards=self.num_workers)
        loss = self._workload.loss(self._model(batch.x), batch)
        return torch.cat([piece.flatten() for piece in torch.autograd.grad(loss, self._parameters)])

    def clip(self, gradient: Tensor) -> Tensor:
        """Clips the gradient in place by the recipe's norm, with torch's own function."""
        if self.recipe.clip_norm is not None:
            holder = nn.Parameter(torch.zeros_like(gradient))
            holder.grad = gradient
            nn.utils.clip_grad_norm_([holder], self.recipe.clip_norm)
        return gradient

    def update(self, worker: int, gradient: Tensor, step: int) -> None:
        """Makes one optimiser step of one replica, with the learning rate of this step."""
        optimizer = self.optimizers[worker]
        for group in optimizer.param_groups:
            group["lr"] = self.recipe.lr(step * self.recipe.global_batch / self.recipe.budget)
        cut = {"": gradient} if self.recipe.elementwise else views(gradient, self.shapes)
        for name, tensor in self.stepped[worker].items():
            tensor.grad = cut[name]
        optimizer.step()

    def step_alone(self, step: int) -> None:
        """Lets every replica make one step on its own shard."""
        for worker in range(self.num_workers):
            self.update(worker, self.clip(self.gradient(worker, step)), step)

    def mean(self) -> Tensor:
        """The mean of the replicas' parameters, (P,)."""
        return torch.stack(self.params).mean(0)

    def mean_gradient(self, step: int) -> Tensor:
        """The mean of all shards' gradients, each at its own replica's parameters; clipped."""
        rows = [self.gradient(worker, step) for worker in range(self.num_workers)]
        return self.clip(torch.stack(rows).mean(0))

    def record(self) -> list[Tensor]:
        """Copies of all replicas' parameters."""
        return [flat.clone() for flat in self.params]


def local_sgd(cell: Cell) -> Path:
    """Local SGD, Lin et al. 2020: warm-up steps are synchronous, then parameters are averaged every
    H.

    It is also the loop of `ddp` with the library's averaging hook, which leaves momentum to the
    replicas.
    """
    replicas = Replicas(cell)
    steps, warmup, form = (
        option(cell, sync_of(cell), name) for name in ("local_steps", "warmup_steps", "momentum")
    )
    path = [replicas.record()]
    for step in range(replicas.num_steps):
        if step < warmup:
            gradient = replicas.mean_gradient(step)
            for worker in range(replicas.num_workers):
                replicas.update(worker, gradient.clone(), step)
        else:
            replicas.step_alone(step)
            if (step - warmup + 1) % steps == 0:
                mean = replicas.mean()
                for flat in replicas.params:
                    flat.copy_(mean)
                if form == "averaged":
                    _average_states(replicas)
                elif form == "reset":
                    replicas.fresh_optimizers()
        path.append(replicas.record())
    return path


def _average_states(replicas: Replicas) -> None:
    """Replaces every vector of optimiser state that has its parameter's shape by its mean over
    replicas.
    """
    for tensor, of in replicas.stepped[0].items():
        pairs = zip(replicas.optimizers, replicas.stepped, strict=True)
        states = [optimizer.state[named[tensor]] for optimizer, named in pairs]
        for name, value in states[0].items():
            if isinstance(value, Tensor) and value.shape == of.shape:
                mean = torch.stack([state[name] for state in states]).mean(0)
                for state in states:
                    state[name].copy_(mean)


def diloco(cell: Cell) -> Path:
    """DiLoCo and its streaming form, Douillard et al. 2023 and 2025.

    An outer Nesterov SGD steps on the mean way of the replicas, fragment by fragment; each
    fragment's outer step arrives `delay` inner steps after it set out.
    """
    names = ("local_steps", "outer_lr", "outer_momentum", "fragments", "delay")
    every, lr, momentum, fragments, delay = (option(cell, "diloco", name) for name in names)
    replicas = Replicas(cell)
    outer = replicas.params[0].clone()
    velocity = torch.zeros_like(replicas.params[0])
    base, extra = divmod(outer.numel(), fragments)
    sizes = [base + (number < extra) for number in range(fragments)]
    starts = [sum(sizes[:number]) for number in range(fragments)]
    under_way: dict[int, tuple[int, Tensor]] = {}
    path = [replicas.record()]
    total = replicas.num_steps

    def load(number: int) -> None:
        piece = slice(starts[number], starts[number] + sizes[number])
        gradient = under_way.pop(number)[1]
        velocity[piece] = momentum * velocity[piece] + gradient
        outer[piece] -= lr * (gradient + momentum * velocity[piece])
        for flat in replicas.params:
            flat[piece] = outer[piece]

    for step in range(1, total + 1):
        replicas.step_alone(step - 1)
        for number in range(fragments):
            piece = slice(starts[number], starts[number] + sizes[number])
            loaded = False
            if number in under_way and (step == total or step - under_way[number][0] >= delay):
                load(number)
                loaded = True
            turn = step % every == (number + 1) * (every // fragments) % every
            if turn or (step == total and not loaded):
                under_way[number] = (step, (outer - replicas.mean())[piece].clone())
                if step == total or not delay:
                    load(number)
        path.append(replicas.record())
    return path


def elastic_averaging(cell: Cell) -> Path:
    """Elastic averaging SGD in its synchronous form, Zhang et al. 2015.

    With d_i = moving_rate (x_i - c) an exchange is x_i -= d_i and c += sum over i of d_i.
    """
    replicas = Replicas(cell)
    period = option(cell, "elastic_averaging", "period")
    rate = option(cell, "elastic_averaging", "moving_rate")
    centre = replicas.params[0].clone()
    path = [replicas.record()]
    for step in range(replicas.num_steps):
        replicas.step_alone(step)
        if (step + 1) % period == 0:
            pulls = [rate * (flat - centre) for flat in replicas.params]
            for flat, pull in zip(replicas.params, pulls, strict=True):
                flat -= pull
            centre = centre + torch.stack(pulls).sum(0)
        path.append(replicas.record())
    return path


def gossip(cell: Cell) -> Path:
    """D-PSGD, Lian et al. 2017: x_i <- sum over j of W_ij x_j, minus lr g_i(x_i)."""
    return gossiping(cell, mix)


def mix(params: list[Tensor], weights: Tensor) -> None:
    """Replaces the replicas x by W x in place, computed in float64."""
    for flat, mixed in zip(params, weights @ torch.stack(params).double(), strict=True):
        flat.copy_(mixed)


def gossiping(cell: Cell, exchange: Exchange) -> Path:
    """Steps x_i <- exchanged x_i - lr g_i(x_i).

    `exchange` is whatever moves the replicas between their gradient and their update.
    """
    replicas = Replicas(cell)
    graphs = [seated(cell, worker) for worker in range(replicas.num_workers)]
    path = [replicas.record()]
    for step in range(replicas.num_steps):
        gradients = [
            replicas.clip(replicas.gradient(worker, step)) for worker in range(replicas.num_workers)
        ]
        exchange(replicas.params, mixing(graphs, step))
        for worker, gradient in enumerate(gradients):
            replicas.update(worker, gradient, step)
        path.append(replicas.record())
    return path


@dataclass(frozen=True)
class Seat:
    """The part of a comm that a graph looks at when it is started: its rank and the number of
    ranks.
    """

    rank: int
    size: int


def seated(cell: Cell, rank: int) -> Graph:
    """The cell's gossip graph, started as this rank sees it."""
    graph: Graph = setup.make("topology", cell.topology, setup.options_for(cell, "topology"))
    graph.start(Seat(rank, cell.num_workers))  # type: ignore[arg-type]
    return graph


def mixing(graphs: Sequence[Graph], step: int) -> Tensor:
    """The mixing matrix W (N, N) of a step in float64, from what each rank says of itself."""
    matrix = torch.eye(len(graphs), dtype=torch.float64)
    for rank, graph in enumerate(graphs):
        for source, weight in graph.neighbours(step):
            matrix[rank, source] += weight
            matrix[rank, rank] -= weight
    return matrix


def delayed(cell: Cell) -> Path:
    """Delayed synchronous SGD, Li et al. 2018 (Pipe-SGD).

    After step k the mean gradient of step k - 1 is applied; the last step waits for its own as
    well.
    """
    replicas = Replicas(cell)
    path = [replicas.record()]
    before: Tensor | None = None
    for step in range(replicas.num_steps):
        newest = torch.stack(
            [replicas.gradient(worker, step) for worker in range(replicas.num_workers)]
        ).mean(0)
        due = [] if before is None else [(before, step - 1)]
        if step == replicas.num_steps - 1:
            due.append((newest, step))
        for gradient, of in due:
            replicas.clip(gradient)
            for worker in range(replicas.num_workers):
                replicas.update(worker, gradient.clone(), of)
        before = newest
        path.append(replicas.record())
    return path


LOOPS = {
    "local_sgd": local_sgd,
    "diloco": diloco,
    "elastic_averaging": elastic_averaging,
    "gossip": gossip,
    "delayed": delayed,
    "ddp": local_sgd,
}
