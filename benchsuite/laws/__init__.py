"""What strategies must obey: laws, each with broken twins that it must catch.

There is one file per family of laws; its `LAWS` are found by the file's name (`families`). A law is
called with ranks and a resolved cell and answers with a `Figure`: a value, and the bound that it
may not pass. Ranks are threads of this process (`harness/ranks.py`) or anything else that runs
`body(comm)` on so many ranks. Both the tests and `benchsuite verify` call the laws.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from benchsuite.comm.process import ProcessComm
from benchsuite.plan.cell import Cell

T = TypeVar("T")


class MakeRanks(Protocol):
    """Runs `body(comm)` on `size` ranks; returns what each returned or raises the first error."""

    def __call__(self, size: int, body: Callable[[ProcessComm], T], *, strict: str = "") -> list[T]:
        """With `strict = "nccl"` the ranks refuse on gloo what NCCL cannot do."""


@dataclass(frozen=True)
class Figure:
    """What a law found: it holds where the value is at most the bound.

    A bound of 0 means that the law is exact. A value that is NaN never holds.
    """

    value: float
    bound: float
    detail: str = ""  # where the value was found, with both numbers that were compared

    @property
    def holds(self) -> bool:
        """Whether the value is a number and at most the bound."""
        return not math.isnan(self.value) and self.value <= self.bound

    def __str__(self) -> str:
        relation = "<=" if self.holds else "is not <="
        return f"{self.value:.3g} {relation} {self.bound:.3g}" + (
            f": {self.detail}" if self.detail else ""
        )


Check = Callable[[MakeRanks, Cell], Figure]


@dataclass(frozen=True)
class Control:
    """A negative control, also called a broken twin: the law must not hold for something broken."""

    broken: str  # what is broken
    check: Check
    on: Mapping[str, Any] = field(default_factory=dict)  # fields of the cell that it is shown on
    # Whether it needs threads or processes: ranks of virtual time take turns and call no library.
    real_ranks: bool = False


@dataclass(frozen=True)
class Law:
    """A statement, how it is checked, the cells that it speaks about, and its negative controls.

    Which cells it is shown on stands in its file as `CELLS`, one of those in `harness/cases.py`;
    without `CELLS` it is shown on all strategies.
    """

    name: str
    check: Check
    applies: Callable[[Cell], bool]  # asked of resolved, legal cells only
    controls: tuple[Control, ...]
    # Whether the law changes what is run. It shares no run with other laws then, so that one recipe
    # of each shape is enough.
    own_run: bool = False

    # Functions of a module that its check hands to `runs.run` as `change` and `after`. Where ranks
    # are processes, those that are told here are started once for the runs of all laws.
    asks: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict, hash=False)


def families() -> dict[str, tuple[Law, ...]]:
    """Family, which is the name of its file -> its laws."""
    found = {}
    for module_info in pkgutil.iter_modules(__path__):
        laws = getattr(importlib.import_module(f"{__name__}.{module_info.name}"), "LAWS", None)
        if laws is not None:
            found[module_info.name] = tuple(laws)
    return found
