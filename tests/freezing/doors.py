"""The doors through which answers are made, and the one table of internals where none is enough."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# What no door offers: name -> where it may stand, the newest place first, as "module:attribute"
# ("module:" is the module itself).
INTERNALS: Mapping[str, tuple[str, ...]] = {
    "plan.load": (
        "benchsuite.rules.plans:load",
        "benchsuite.plan.plan:load",
        "benchsuite.plan:load",
    ),
    "plan.available": ("benchsuite.plan.plan:available", "benchsuite.plan:available"),
    "Store": ("benchsuite.results.store:Store", "benchsuite.store:Store"),
    "code_id": ("benchsuite.results.code_id:code_id", "benchsuite.measure.code:code_id"),
    "render_stored": ("benchsuite.report.page:render_stored",),
    "verify": ("benchsuite.laws.verify:", "benchsuite.verify:"),  # the module itself
    "Asked": ("benchsuite.laws.harness.cases:Asked", "benchsuite.laws.grid:Asked"),
    "COLUMNS": ("benchsuite.results.columns:COLUMNS", "benchsuite.frame:COLUMNS"),
}

# An answer must not depend on how wide the terminal is, on colours, or on the day.
ENVIRONMENT: Mapping[str, str] = {
    "COLUMNS": "100",
    "LINES": "40",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "SOURCE_DATE_EPOCH": "1767225600",
}


def internal(name: str) -> Any:
    """The internal that `INTERNALS` lists, from the first place where it stands."""
    for place in INTERNALS[name]:
        module_name, _, attribute = place.partition(":")
        try:
            module = importlib.import_module(module_name)
            return getattr(module, attribute) if attribute else module
        except (ModuleNotFoundError, AttributeError):
            continue
    raise LookupError(
        f"{name} stands in none of {', '.join(INTERNALS[name])}: "
        "it has moved, so write its new place into INTERNALS of tests/freezing/doors.py"
    )


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """Works in the root of the repository, under a fixed terminal."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    os.environ.pop("FORCE_COLOR", None)
    try:
        with contextlib.chdir(ROOT):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def say(*arguments: str, allow: tuple[int, ...] = (0,)) -> str:
    """What `benchsuite ARGUMENTS` prints on standard output.

    It runs in this process, by the entry that pyproject.toml names.

    AssertionError where its exit code is none of `allow`.
    """
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "scripts"
    ]["benchsuite"]
    module_name, _, attribute = entry.partition(":")
    main = getattr(importlib.import_module(module_name), attribute)
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
    if code not in allow:
        told = complained.getvalue().strip()
        raise AssertionError(
            f"benchsuite {' '.join(arguments)} ended with {code}, not {allow}: {told}"
        )
    return printed.getvalue()


def relative(path: str | Path) -> str:
    """A path of the repository, as it reads on every machine."""
    return Path(path).resolve().relative_to(ROOT).as_posix()


def lines_of(document: Mapping[str, Any]) -> str:
    """JSON with sorted keys and a line for each entry of a list: a difference is a line."""
    shown = []
    for key in sorted(document):
        value = document[key]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = ",\n".join(f"  {json.dumps(each, sort_keys=True)}" for each in value)
            shown.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            shown.append(f" {json.dumps(key)}: {json.dumps(value, sort_keys=True)}")
    return "{\n" + ",\n".join(shown) + "\n}\n"
