"""What all runs of one command share: machine, environment, code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchsuite.measure import environment
from benchsuite.plan.cell import Cell
from benchsuite.results.code_id import Tree
from benchsuite.results.store import CodeId, Store


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a command runs and with which code; every run that it stores says so."""

    machine: str
    environment_id: str
    code_id: Callable[[Cell], str]
    rules_id: CodeId  # stands for the code of a refused cell


def current(store: Store) -> Setting:
    """The setting of this process; its environment is stored.

    Read once per command: what runs later must be recorded with the code that its ranks have
    loaded, also where a file is edited meanwhile. StoreError where the environment cannot be
    stored.
    """
    store.check_writable()
    machine = environment.machine()
    code = Tree()  # read when the command starts, as its ranks' modules are

    return Setting(
        machine=machine,
        environment_id=store.write_environment(machine, environment.collect()),
        code_id=code.code_id,
        rules_id=code.rules_id,
    )
