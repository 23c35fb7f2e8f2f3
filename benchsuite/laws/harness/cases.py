"""The cells that the laws are shown on: every legal combination of members, with the tiny workload.

A new file in `sync/`, `topology/` or `compression/` joins this grid without an edit here, because
the rules decide which combinations are legal.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchsuite import rules
from benchsuite.laws import Law
from benchsuite.laws.harness.variants import (
    APART_RECIPES,
    RECIPES,
    STALE_RECIPES,
    VARIANTS,
    Fields,
    Recipe,
)
from benchsuite.plan import plugins
from benchsuite.plan.cell import AXES, Budget, Cell, resolve
from benchsuite.plan.hashing import canonical
from benchsuite.rules import Problem

TINY = str(Path(__file__).with_name("tiny.py"))
WORKERS = (1, 2, 3, 4)
# A combination that one of these rules refuses is not a strategy at all. Every other rule refuses
# it for its clock or its numbers.
NO_STRATEGY = (
    "parallel x sync",
    "sync x topology",
    "compression",
    "compression x topology",
    "compression x sync",
    "compression x parallel",
    "outer bits",
    "actor_learner",
)

# Those of them that look at members only, never at numbers of workers or at options.
WHATEVER_THE_SIZE = ("sync x topology", "compression x topology")


def tiny(recipe: Recipe = RECIPES[0], *, options: Fields | None = None, **fields: Any) -> Cell:
    """A resolved cell of `tiny.py` in float64, with this recipe and other fields as given."""
    optimizer, lr, clip_norm = recipe
    workload: Fields = {"optimizer": optimizer, "lr": lr, "clip_norm": clip_norm}
    fields = {"precision": "fp64", **fields}
    return resolve(Cell(workload=TINY, options={"tiny": workload, **(options or {})}, **fields))


@dataclass(frozen=True)
class Asked:
    """What `verify` was asked to show: which members, which numbers of workers, which clock.

    Members are names or paths of files; an empty tuple stands for all members of the folder.
    """

    sync: tuple[str, ...] = ()
    topology: tuple[str, ...] = ()
    compression: tuple[str, ...] = ()
    workers: tuple[int, ...] = WORKERS
    clock: str = "wall"
    parallel: tuple[str, ...] = ()

    @property
    def is_everything(self) -> bool:
        """Whether all strategies are asked for, on replicas that are one rank each."""
        return not (self.sync or self.topology or self.compression) and self.undivided

    @property
    def undivided(self) -> bool:
        """Whether replicas that are one rank each (parallelism `data`) are asked for."""
        return not self.parallel or "data" in self.parallel

    def is_about(self, parallel: str) -> bool:
        """Whether all laws about replicas that are divided in this way are asked for."""
        return (
            self.clock == "wall"
            and not (self.sync or self.topology or self.compression)
            and self.includes(parallel=parallel)
        )

    def includes(self, **members: str) -> bool:
        """Whether each of these members is among those that are asked for."""
        return all(name in self.members(kind) for kind, name in members.items())

    def members(self, kind: str) -> tuple[str, ...]:
        """The members of this kind that are asked for, which are all of its folder unless some are
        named.
        """
        return getattr(self, kind) or tuple(plugins.names(kind))


@dataclass(frozen=True)
class Cells:
    """Where a family of laws is shown: its cells, and the name that a line of the table gives to
    each.
    """

    of: Callable[[Asked], Sequence[Cell]]
    subject: Callable[[Cell], str]  # the strategy that a cell is an instance of


@dataclass(frozen=True)
class Refused:
    """A strategy that cannot run as it was asked for, with the problem that a rule found."""

    subject: str
    problem: Problem


def shapes(asked: Asked = Asked(), *, by_library: bool = False) -> Iterator[Fields]:
    """The legal cells as fields: every strategy x topology x number of workers x number of servers.

    `synchronous` is shown on every topology with all its options and compressions. The other
    strategies show their first options on every topology; their further options and the
    compressions are shown on one collective, on servers and on every graph, with one number of
    servers for each number of workers.

    With `by_library` the answer is the strategies that call the library past `Comm` (their ranks
    are processes); without it the answer is all others.
    """
    for shape in _shapes(asked, by_library):
        yield {**shape, "options": copy.deepcopy(shape["options"])}


@cache
def _shapes(asked: Asked, by_library: bool) -> tuple[Fields, ...]:
    """`shapes`, found once: it asks the rules about thousands of cells."""
    return tuple(_found_shapes(asked, by_library))


def _found_shapes(asked: Asked, by_library: bool) -> Iterator[Fields]:
    shown: set[str] = set()
    for sized in _candidates(asked) if asked.undivided else ():
        if calls_library(sized[0]["sync"]) != by_library or _never_together(sized[0]):
            continue
        legal = [shape for shape in sized if not rules.validate(tiny(**shape))]
        once = _shown_once(sized[0])
        if legal and once not in shown:
            shown |= {once} - {""}
            yield from _thinned(legal) if _is_further(legal[0]) else legal


def _never_together(shape: Fields) -> bool:
    """Whether a rule refuses the members themselves, so that no other size need be asked about."""
    found = rules.validate(tiny(**shape))
    return any(problem.rule in WHATEVER_THE_SIZE for problem in found)


def refused(asked: Asked) -> Iterator[Refused]:
    """The strategies of which no size can run under this clock or with these numbers of workers."""
    for sized in _candidates(asked) if asked.undivided else ():
        found = [rules.validate(tiny(**shape)) for shape in sized]
        if all(found) and not any(problem.rule in NO_STRATEGY for problem in found[0]):
            yield Refused(
                subject_of(tiny(**sized[0]), told=sized[0]["options"]), min(found, key=len)[0]
            )


def _candidates(asked: Asked) -> Iterator[list[Fields]]:
    """All sizes of each combination of members and options, one list each, legal or not."""
    topologies = sorted(asked.members("topology"), key=lambda name: name != "native")
    for compression in sorted(asked.members("compression"), key=lambda name: name != "none"):
        workers: Sequence[int] = asked.workers
        if compression != "none":
            workers = [n for n in workers if n in (2, 3)] or workers[:1]
        for sync in asked.members("sync"):
            for topology in topologies:
                for options in _variants(sync, compression):
                    fields = {
                        "sync": sync,
                        "topology": topology,
                        "options": options,
                        "clock": asked.clock,
                    }
                    fields |= {"compression": compression} if compression != "none" else {}
                    if sized := [{**fields, **size} for size in _sizes(fields, workers)]:
                        yield sized


def _variants(sync: str, compression: str) -> list[Fields]:
    """The options that a strategy is shown with.

    Under a compression the strategy has its first options, and the compression varies.
    """
    own = [{sync: given} if given else {} for given in VARIANTS.get(sync, ({},))]
    if compression == "none":
        return own
    return [
        {**own[0], **({compression: given} if given else {})}
        for given in VARIANTS.get(compression, ({},))
    ]


def _is_further(shape: Fields) -> bool:
    """Whether this shape has a compression, or options that are not the strategy's first ones."""
    first = _variants(shape["sync"], "none")[0]
    return "compression" in shape or shape["options"] != first


def _shown_once(shape: Fields) -> str:
    """A key of which only the first topology is shown; the empty string means that every one is
    shown.
    """
    topology = plugins.load("topology", shape["topology"])
    if not _is_further(shape) or shape["sync"] == "synchronous" or hasattr(topology, "neighbours"):
        return ""
    return canonical(
        [shape["sync"], shape.get("compression"), shape["options"], hasattr(topology, "serve")]
    )


def _thinned(shapes: list[Fields]) -> list[Fields]:
    """One shape for each number of workers: the one with the most servers."""
    return list({shape["replicas"]: shape for shape in shapes}.values())


def _sizes(fields: Fields, workers: Sequence[int]) -> Iterator[Fields]:
    """The numbers of workers and servers that these fields are shown with."""
    for replicas in workers:
        if replicas == 1 and fields["options"].get("asynchronous", {}).get("lock") == "none":
            continue  # one worker has one thread, which is as good as the lock
        counts = [0]
        if fields["topology"] == "parameter_server":
            counts = (
                sorted({1, replicas - 1} - {0}) if _is_further(fields) else sorted({1, 2, replicas})
            )
        yield from ({"replicas": replicas, "servers": servers} for servers in counts)


@cache
def training(asked: Asked) -> tuple[Cell, ...]:
    """All strategies, each shape with all its recipes: what most laws are shown on."""
    made = []
    for by_library, budget in ((False, Budget()), (True, Budget(timeout_s=60.0))):
        for shape in shapes(asked, by_library=by_library):
            made += [tiny(recipe, budget=budget, **shape) for recipe in recipes(shape)]
    return tuple(made)


def once(asked: Asked) -> list[Cell]:
    """Every combination of members and options once, with the most workers and servers it has."""
    largest: dict[str, Cell] = {}
    for cell in training(asked):
        options = {name: given for name, given in cell.options.items() if name != "tiny"}
        largest[canonical([cell.sync, cell.topology, cell.compression, options])] = cell
    return list(largest.values())


def means(asked: Asked) -> list[Cell]:
    """A cell for every topology and number of workers, also with vectors cut into segments.

    The strategy of these cells does not matter: the laws of topologies call the mean alone.
    """
    if asked.sync or asked.compression or not asked.undivided:
        return []
    made = []
    for name in asked.members("topology"):
        made += [tiny(topology=name, replicas=n, clock=asked.clock) for n in asked.workers]
        if "segment_kib" in plugins.find("topology", name).options:
            cut = {plugins.stem(name): {"segment_kib": 1}}
            made += [
                tiny(topology=name, replicas=n, clock=asked.clock, options=cut)
                for n in asked.workers
                if n > 1
            ]
    return made


def subject_of(cell: Cell, *, told: Fields | None = None) -> str:
    """The name of a strategy in a table: sync, topology, compression and the options in `told`."""
    names = [
        plugins.stem(name)
        for name in (cell.sync, cell.topology, cell.compression)
        if name != "none"
    ]
    return " ".join(
        [
            *names,
            *(f"{key}={value}" for given in (told or {}).values() for key, value in given.items()),
        ]
    )


TRAINING = Cells(training, subject_of)
ONCE = Cells(once, subject_of)
MEANS = Cells(means, lambda cell: f"a mean over {plugins.stem(cell.topology)}")
RANKS = Cells(
    lambda asked: [
        tiny(replicas=n, clock=asked.clock) for n in asked.workers if n > 1 and asked.is_everything
    ],
    lambda cell: "ranks",
)
ONE_REPLICA = Cells(
    lambda asked: [
        tiny(clock=asked.clock, precision=name) for name in ("fp64", "fp32") if asked.is_everything
    ],
    lambda cell: "a replica",
)


def cells_of(family: str) -> Cells:
    """The place that a family's file names as its `CELLS`, which is all strategies unless it names
    one.
    """
    found: Cells = getattr(importlib.import_module(f"benchsuite.laws.{family}"), "CELLS", TRAINING)
    return found


def calls_library(sync: str) -> bool:
    """Whether the strategy uses torch's default group, which ranks that are threads do not have."""
    return bool(plugins.find("sync", sync).constants.get("calls_library"))


def in_processes(cell: Cell) -> bool:
    """Whether the ranks of this cell must be processes of their own.

    They must where a strategy or a divided replica lets the library use torch's default group, of
    which a process has only one.
    """
    return calls_library(cell.sync) or cell.parallel != "data"


def recipes(shape: Fields) -> tuple[Recipe, ...]:
    """The recipes that a shape is trained with.

    All of its kind are used where one or three workers run over `native` or over at most two
    servers, a few of them elsewhere. A strategy that is given by path is trained with all recipes
    everywhere.
    """
    if "compression" in shape:
        return RECIPES[:1]
    if calls_library(shape["sync"]):
        return RECIPES[0], RECIPES[1], RECIPES[5]
    free = plugins.find("sync", shape["sync"]).constants.get("timing_free")
    if plugins.is_path(shape["sync"]):
        return APART_RECIPES if free else STALE_RECIPES
    plain = shape["topology"] in ("native", "parameter_server") and shape["servers"] <= 2
    whole = plain and shape["replicas"] in (1, 3)
    if shape["sync"] == "synchronous":
        return RECIPES if whole and not _is_further(shape) else RECIPES[1:3]
    if free:
        together = APART_RECIPES[2:5:2] if _is_further(shape) else APART_RECIPES
        return together if whole and shape["replicas"] == 3 else APART_RECIPES[2:3]
    locked = shape["options"].get(shape["sync"], {}).get("lock") != "none"
    return STALE_RECIPES if whole and locked and not _is_further(shape) else STALE_RECIPES[:1]


def label(cell: Cell) -> str:
    """A text that tells the cells of the grid apart, for the names of tests and the details of
    figures.
    """
    told: Fields = dict(cell.options.get("tiny", {}))
    options = [
        f"{key}={value}" for name in _members(cell) for key, value in _variant(cell, name).items()
    ]
    parts = [
        plugins.stem(cell.sync),
        cell.topology,
        *([cell.compression] if cell.compression != "none" else []),
    ]
    if cell.parallel != "data":
        parts.insert(
            0, f"{plugins.stem(cell.workload)} {plugins.stem(cell.parallel)}({cell.model_parallel})"
        )
    parts += [
        f"N={cell.replicas}",
        f"S={cell.num_servers}",
        told.get("optimizer", ""),
        cell.precision,
    ]
    return " ".join([*filter(None, parts), *(["clip"] if told.get("clip_norm") else []), *options])


def _members(cell: Cell) -> list[str]:
    return [
        plugins.stem(name) for name in (cell.parallel, cell.sync, cell.topology, cell.compression)
    ]


def _variant(cell: Cell, name: str) -> Fields:
    """Those of the member's options that some variant of it sets."""
    named = {key for variant in VARIANTS.get(name, ()) for key in variant}
    return {key: value for key, value in cell.options.get(name, {}).items() if key in named}


def cases(
    laws: Iterable[Law], grid: Sequence[Cell], *, only: Callable[[Law], bool] = lambda law: True
) -> Iterator[tuple[Law, Cell]]:
    """Each law paired with the cells that it speaks about.

    A law that shares no run with other laws is shown on one recipe of each shape only.
    """
    for law in laws:
        seen: set[str] = set()
        for cell in grid:
            if not only(law) or not law.applies(cell):
                continue
            shape = canonical(on(cell, options={"tiny": {}}).to_json()) if law.own_run else ""
            if not law.own_run or shape not in seen:
                seen.add(shape)
                yield law, cell


def on(cell: Cell, **fields: Any) -> Cell:
    """The cell with other fields.

    Options are added to those that the cell has; options of members that the changed cell no longer
    has are dropped.
    """
    options = {**cell.options, **fields.pop("options", {})}
    changed = dataclasses.replace(cell, **fields)
    used = {plugins.stem(getattr(changed, axis)) for axis in AXES}
    return dataclasses.replace(
        changed, options={name: given for name, given in options.items() if name in used}
    )
