"""The cells that laws are shown on: everything legal that stands in sync/, topology/ and compression/, on `tiny.py`.

A new file in one of the folders is in the grid without an edit here; what is legal, the rules decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchsuite import cell as cells
from benchsuite import plugins, rules
from benchsuite.cell import Cell
from benchsuite.laws import Law

TINY = str(Path(__file__).with_name("tiny.py"))
WORKERS = (1, 2, 3, 4)
Recipe = tuple[str, float, float]  # optimizer, lr, clip norm
Fields = dict[str, Any]  # of a cell

# Where pushes are stale, momentum takes a tenth of the rate: a run that diverges would amplify roundings. 0.5 clips
# every step of this workload.
RECIPES: tuple[Recipe, ...] = (
    ("sgd", 0.05, 0.0), ("sgd", 0.05, 0.5), ("momentum", 0.05, 0.0), ("nesterov", 0.05, 0.5), ("adam", 0.01, 0.0),
    ("adamw", 0.01, 0.5),
)  # fmt: skip
STALE_RECIPES: tuple[Recipe, ...] = (
    ("sgd", 0.05, 0.0), ("sgd", 0.05, 0.5), ("momentum", 0.005, 0.0), ("adam", 0.01, 0.0),
)  # fmt: skip

# Options worth a cell of their own; the budget is 10 steps. A compression is shown with a strategy's first ones.
VARIANTS: dict[str, tuple[Fields, ...]] = {
    "asynchronous": ({"lock": "exclusive"}, {"lock": "none"}),
    "k_sync": (
        *({"backup_workers": count} for count in range(3)),
        {"backup_workers": 1, "wait": False, "batch": False},
        {"backup_workers": 1, "wait": False, "batch": True},
        {"backup_workers": 1, "batch": True},
    ),
    "stale_synchronous": ({"slack": 0}, {"slack": 1}, {"slack": 3}, {"slack": -1, "apply": "per_push"}),
    "local_sgd": (
        {"local_steps": 2},
        {"local_steps": 1},
        {"local_steps": 5, "momentum": "averaged"},
        {"local_steps": 2, "warmup_steps": 4, "momentum": "reset"},
    ),
    "diloco": ({"local_steps": 2}, {"local_steps": 5}, {"local_steps": 5, "fragments": 2, "delay": 1}),
    "elastic_averaging": ({"period": 2}, {"period": 1}),
    "hogwild": ({"lock": "exclusive"}, {"lock": "none"}),
}


def tiny(recipe: Recipe = RECIPES[0], *, options: Fields | None = None, **fields: Any) -> Cell:
    """A resolved cell of `tiny.py` in float64."""
    optimizer, lr, clip_norm = recipe
    workload: Fields = {"optimizer": optimizer, "lr": lr, "clip_norm": clip_norm}
    fields = {"precision": "fp64", **fields}
    return cells.resolve(Cell(workload=TINY, options={"tiny": workload, **(options or {})}, **fields))


def shapes(
    *, sync: Sequence[str] = (), workers: Sequence[int] = WORKERS, by_library: bool = False, **fields: Any
) -> Iterator[Fields]:
    """Every legal sync x topology x options x N x S, then the compressions on a thinner grid, as fields of a cell.

    sync: names or paths, () = all in the folder. by_library: the strategies that call the library past `Comm` instead
    of all others; their ranks are processes. fields: what all of them have besides.
    """
    names = [name for name in sync or plugins.names("sync") if calls_library(name) == by_library]
    compressed = [name for name in plugins.names("compression") if name != "none"]
    for name in names:
        for topology in plugins.names("topology"):
            for variant in VARIANTS.get(name, ({},)):
                yield from _legal(_sized(name, topology, workers), {name: variant}, fields)
    for compression in compressed:
        for name in names:
            for topology in plugins.names("topology"):
                for variant in VARIANTS.get(compression, ({},)):
                    given = {name: VARIANTS.get(name, ({},))[0], compression: variant}
                    sized = _sized(name, topology, [n for n in workers if n in (2, 3)] or workers[:1], thin=True)
                    yield from _legal(sized, given, {"compression": compression, **fields})


def _sized(sync: str, topology: str, workers: Sequence[int], *, thin: bool = False) -> Iterator[Fields]:
    """N x S; thin: one S for each N."""
    for replicas in workers:
        counts = [0]
        if topology == "parameter_server":
            counts = [max(1, replicas - 1)] if thin else sorted({1, 2, replicas})
        for servers in counts:
            yield {"sync": sync, "topology": topology, "replicas": replicas, "servers": servers}


def _legal(sized: Iterator[Fields], options: Fields, fields: Fields) -> Iterator[Fields]:
    for size in sized:
        shape = {**size, "options": {name: given for name, given in options.items() if given}, **fields}
        alone = size["replicas"] == 1 and options.get("asynchronous", {}).get("lock") == "none"
        if not alone and not rules.validate(tiny(**shape)):  # one worker, one thread: that is the lock
            yield shape


def means(workers: Sequence[int]) -> list[Cell]:
    """Every topology x N, in segments too: for laws that need no training."""
    names = plugins.names("topology")
    cut = [name for name in names if "segment_kib" in plugins.find("topology", name).options]
    whole = [tiny(topology=name, replicas=n) for name in names for n in workers]
    return whole + [
        tiny(topology=name, replicas=n, options={name: {"segment_kib": 1}}) for name in cut for n in workers if n > 1
    ]


def calls_library(sync: str) -> bool:
    """Whether a strategy uses torch's default group, which thread ranks do not have."""
    return bool(plugins.find("sync", sync).constants.get("calls_library"))


def recipes(shape: Fields) -> tuple[Recipe, ...]:
    """What a shape is trained with. `synchronous`: all recipes; other strategies: all for three workers over `native` or
    one or two servers, one for the others."""
    if shape.get("compression", "none") != "none":
        return RECIPES[:1]
    if shape["sync"] == "synchronous":
        return RECIPES if shape["servers"] <= 2 else RECIPES[3:5]  # as many servers as workers: many ranks
    whole = (shape["replicas"], shape["servers"]) in ((1, 1), (3, 1), (3, 2)) or (
        shape["replicas"] == 3 and shape["topology"] == "native"
    )
    if plugins.find("sync", shape["sync"]).constants.get("timing_free"):
        return RECIPES if whole else RECIPES[2:3]
    locked = shape["options"].get(shape["sync"], {}).get("lock") != "none"
    return STALE_RECIPES if whole and locked else RECIPES[:1]


def label(cell: Cell) -> str:
    """What tells the cells of the grid apart."""
    told: Fields = dict(cell.options["tiny"])
    options = [f"{key}={value}" for name in _members(cell) for key, value in _variant(cell, name).items()]
    parts = [plugins.stem(cell.sync), cell.topology, *([cell.compression] if cell.compression != "none" else [])]
    parts += [f"N={cell.replicas}", f"S={cell.num_servers}", told["optimizer"], cell.precision]
    return " ".join([*parts, *(["clip"] if told["clip_norm"] else []), *options])


def _members(cell: Cell) -> list[str]:
    return [plugins.stem(name) for name in (cell.sync, cell.topology, cell.compression)]


def _variant(cell: Cell, name: str) -> Fields:
    """The member's options that some variant names."""
    named = {key for variant in VARIANTS.get(name, ()) for key in variant}
    return {key: value for key, value in cell.options.get(name, {}).items() if key in named}


def cases(
    laws: Sequence[Law], grid: Sequence[Cell], *, only: Callable[[Law], bool] = lambda law: True
) -> Iterator[tuple[Law, Cell]]:
    """Each law on the cells that it speaks about."""
    for law in laws:
        for cell in grid:
            if only(law) and law.applies(cell):
                yield law, cell


def on(cell: Cell, **fields: Any) -> Cell:
    """The cell with other fields; options are added to its own, those of members that it has no more are dropped."""
    options = {**cell.options, **fields.pop("options", {})}
    changed = dataclasses.replace(cell, **fields)
    used = {plugins.stem(getattr(changed, axis)) for axis in cells.AXES}
    return dataclasses.replace(changed, options={name: given for name, given in options.items() if name in used})
