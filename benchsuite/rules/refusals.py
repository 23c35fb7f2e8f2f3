"""What members refuse of themselves: the `refuses`, `at_least` and `smallest_replicas` of a file.

The sentences stand in the members' files (`benchsuite/plan/declared.py` says how they are written);
here they are evaluated. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from benchsuite.plan import declared
from benchsuite.plan.plugins import PluginError
from benchsuite.rules.names import Names, unknown
from benchsuite.rules.view import Problem, Problems, View

PLACE = 35  # after the numbers of the cell
ORDER = ("sync", "topology", "compression", "workload", "parallel")


def refused(view: View) -> Problems:
    """Every condition of a member that holds, with the member's own sentences."""
    for axis in ORDER:
        refusals = view.says(axis).refuses
        if refusals:
            _check_names(refusals, view.file(axis).path)

        # The names were checked before, so what is not known here is a number that this cell lacks.
        names = Names(view, axis)

        for refusal in refusals:
            if refusal.when.holds(names):
                yield Problem(refusal.rule, refusal.reason.said(names), refusal.remedy.said(names))


@lru_cache(maxsize=256)
def _check_names(refusals: tuple[declared.Refusal, ...], path: Path) -> None:
    """PluginError for a name that nobody has, whether its condition is reached or not."""
    for refusal in refusals:
        for owner, attribute in declared.names_in(refusal):
            problem = unknown(owner, attribute)
            if problem:
                raise PluginError(f"{path}: refuses {refusal.rule!r}: {problem}")


def at_least(view: View) -> Problems:
    """Options that count something: threads, periods, segments, micro-batches."""
    for axis in ORDER:
        for name, least in view.says(axis).at_least.items():
            value = view.number(axis, name)
            if value is not None and value < least:
                yield Problem(
                    "counts",
                    f"{name} = {value:g} of {view.label(axis)}: at least {least} is needed",
                    f"set options.{view.label(axis)}.{name} = {least} or more",
                )


def smallest(view: View) -> Problems:
    """The least number of replicas that a member makes sense with."""
    for axis in ORDER:
        least = view.says(axis).smallest_replicas
        if view.cell.replicas < least:
            yield Problem(
                "smallest",
                f"replicas = {view.cell.replicas} with {axis} = {view.label(axis)}: at least "
                f"{least} are needed",
                f"set replicas = {least} or more",
            )


RULES: tuple[Callable[[View], Problems], ...] = (refused, at_least, smallest)
