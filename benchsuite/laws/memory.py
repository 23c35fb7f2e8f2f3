"""The law of memory: a strategy keeps what its file's formula says.

It counts what is kept beside parameters, gradient and optimiser: the tensors that can be reached
from the strategy (on a server from its policy), each memory once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases, twins
from benchsuite.laws.harness.runs import Change, both, run
from benchsuite.laws.traffic import described
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell
from benchsuite.update import Updater
from benchsuite.worker.setup import Training

EXACT_TO = 64  # bytes for scalars, such as the step counter of an outer optimiser


def held_is_predicted(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """The bytes that a strategy keeps are those of its `state_bytes`.

    On the fullest worker they are equal, up to 64 bytes of scalars. On the fullest server, whose
    room grows as needed, they are at most as many. The twin keeps one more copy of the parameters.
    """
    result = run(make_ranks, cell, change=both(_with_policy_kept, change), after=_held)
    strategy, setting = described(result.cell)
    shapes = result.workers[0].shapes
    told = strategy.state_bytes(shapes, setting)
    held = max(worker.after for worker in result.workers)
    gap = abs(held - told)
    text = f"{held} bytes held by a worker, {told} predicted"
    if plugins.find("sync", cell.sync).constants.get("state_is_a_bound"):
        gap = max(0, held - told)
    if result.servers:
        told = strategy.state_bytes(shapes, setting, server=True)
        held = max(server.after for server in result.servers)
        gap = gap + max(0, held - told)
        text = f"{text}; {held} by a server, at most {told} predicted"
    return Figure(gap, EXACT_TO, f"{text}, {cell.label}")


def _with_policy_kept(training: Training) -> Training:
    """The change that makes the server's policy available afterwards."""
    if training.is_server:
        training.strategy = twins.OtherPolicy(training.strategy, lambda whole: whole)
    return training


def _held(training: Training) -> int:
    """The bytes that this rank's strategy, or server policy, holds."""
    known = [training.part.params, training.part.grad]
    skipped = {tensor.untyped_storage().data_ptr() for tensor in known}
    root = getattr(training.strategy, "made", None) if training.is_server else training.strategy
    leave = (training.topology, training.compression, training.comm, training.part, training.recipe)
    memories = {
        tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.element_size()
        for tensor in _tensors(root, {id(each) for each in leave})
    }
    return sum(size for memory, size in memories.items() if memory not in skipped)


def _tensors(root: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors of the suite's own objects and of the containers in them.

    Those of an optimiser that a strategy keeps besides the recipe's count too.
    """
    if id(root) in seen or isinstance(root, Updater):
        return
    seen.add(id(root))
    if isinstance(root, Tensor):
        yield root
    elif isinstance(root, torch.optim.Optimizer):
        yield from _tensors(list(root.state.values()), seen)
    elif isinstance(root, Mapping):
        for value in root.values():
            yield from _tensors(value, seen)
    elif isinstance(root, (list, tuple, set)):
        for value in root:
            yield from _tensors(value, seen)
    elif type(root).__module__.startswith(
        ("benchsuite.sync", "benchsuite.laws", "benchsuite_user")
    ):
        for value in vars(root).values():
            yield from _tensors(value, seen)


def _hoarding(training: Training) -> Training:
    """The change that keeps one more copy of the parameters."""
    training.strategy.hoard = training.part.params.clone()  # type: ignore[attr-defined]
    return training


def _applies(cell: Cell) -> bool:
    """Whether memory can be counted: no compression, and no library that keeps its own."""
    return cell.compression == "none" and not plugins.find("sync", cell.sync).constants.get(
        "calls_library"
    )


CELLS = cases.ONCE
LAWS = (
    Law(
        "a strategy keeps the bytes that its formula says",
        held_is_predicted,
        _applies,
        (
            Control(
                "one copy more is kept",
                partial(held_is_predicted, change=_hoarding),
                {
                    "sync": "local_sgd",
                    "topology": "ring",
                    "replicas": 2,
                    "options": {"local_sgd": {"local_steps": 5}},
                },
            ),
        ),
    ),
)
