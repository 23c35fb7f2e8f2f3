"""The cells that the laws are shown on: everything legal that stands in sync/ and topology/, on the tiny workload.

A new file in one of the two folders is in the grid without an edit here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchsuite import cell as cells
from benchsuite import plugins, rules
from benchsuite.cell import Cell
from benchsuite.laws import Law, families
from benchsuite.laws.ranks import thread_ranks

torch.set_num_threads(1)

TINY = str(Path(__file__).parent / "workloads" / "tiny.py")
IN_PROCESSES = ("ddp",)  # these use torch's default group: tests/test_laws_processes.py
WORKERS = (1, 2, 3, 4)

# (optimizer, lr, clip norm). Where pushes are stale, momentum takes a tenth of the rate: a run that diverges would
# amplify roundings. 0.5 clips every step of this workload.
RECIPES = (
    ("sgd", 0.05, 0.0), ("sgd", 0.05, 0.5), ("momentum", 0.05, 0.0), ("nesterov", 0.05, 0.5), ("adam", 0.01, 0.0),
    ("adamw", 0.01, 0.5),
)  # fmt: skip
STALE_RECIPES = (("sgd", 0.05, 0.0), ("sgd", 0.05, 0.5), ("momentum", 0.005, 0.0), ("adam", 0.01, 0.0))
FORMS = ((True, True), (False, False), (False, True))  # (wait, batch) of k_sync, besides the plain one
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {  # options worth a cell of their own
    "asynchronous": ({"lock": "exclusive"}, {"lock": "none"}),
    "k_sync": (
        *({"backup_workers": count} for count in range(3)),
        *({"backup_workers": 1, "wait": wait, "batch": batch} for wait, batch in FORMS),
    ),
}


def tiny(recipe: tuple[str, float, float] = RECIPES[0], *, options: dict[str, Any] | None = None, **fields: Any) -> Cell:
    """A resolved cell on tests/workloads/tiny.py."""
    optimizer, lr, clip_norm = recipe
    workload = {"optimizer": optimizer, "lr": lr, "clip_norm": clip_norm}
    fields = {"precision": "fp64", **fields}
    return cells.resolve(Cell(workload=TINY, options={"tiny": workload, **(options or {})}, **fields))


def shapes() -> Iterator[dict[str, Any]]:
    """Every legal sync x topology x options x N x S, as fields of a cell."""
    for sync in plugins.names("sync"):
        for topology in plugins.names("topology"):
            for variant in VARIANTS.get(sync, ({},)):
                for replicas in WORKERS:
                    fields = {"sync": sync, "topology": topology, "replicas": replicas}
                    counts = sorted({1, 2, replicas}) if topology == "parameter_server" else [0]
                    if variant.get("lock") == "none" and replicas == 1:
                        continue  # one worker, one thread: that is the lock
                    for servers in counts:
                        shape = {**fields, "servers": servers, "options": {sync: variant} if variant else {}}
                        if sync not in IN_PROCESSES and not rules.validate(tiny(**shape)):
                            yield shape


def recipes(shape: dict[str, Any]) -> tuple[tuple[str, float, float], ...]:
    """What a shape is trained with. Stale pushes: all recipes for one worker and for three, one for the others."""
    if shape["sync"] == "synchronous":
        return RECIPES if shape["servers"] <= 2 else RECIPES[3:5]  # as many servers as workers: many ranks
    locked = shape["options"].get(shape["sync"], {}).get("lock") != "none"
    return STALE_RECIPES if locked and (shape["replicas"], shape["servers"]) in ((1, 1), (3, 1), (3, 2)) else RECIPES[:1]


def label(cell: Cell) -> str:
    """What tells the cells of the grid apart."""
    told = dict(cell.options["tiny"])
    options = [f"{key}={value}" for name in VARIANTS for key, value in cell.options.get(name, {}).items()]
    parts = [cell.sync, cell.topology, f"N={cell.replicas}", f"S={cell.num_servers}", told["optimizer"], cell.precision]
    return " ".join([*parts, *(["clip"] if told["clip_norm"] else []), *options])


@cache
def all_laws() -> dict[str, tuple[Law, ...]]:
    return families()


def cases(family: str, grid: list[Cell], *, only: Callable[[Law], bool] = lambda law: True) -> Iterator[Any]:
    """(law, cell) of a family, for pytest."""
    import pytest

    for law in all_laws()[family]:
        for cell in grid:
            if only(law) and law.applies(cell):
                yield pytest.param(law, cell, id=f"{law.name}: {label(cell)}")


def strict_ranks(size: int, body: Callable[[Any], Any], *, strict: str = "") -> list[Any]:
    """Thread ranks that refuse what NCCL cannot do."""
    return thread_ranks(size, body, strict="nccl")


def on(cell: Cell, **fields: Any) -> Cell:
    """The cell with other fields; options are added to its own."""
    options = {**cell.options, **fields.pop("options", {})}
    return dataclasses.replace(cell, options=options, **fields)
