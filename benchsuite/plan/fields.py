"""What may stand in each field of a cell, for values that a user wrote: a plan, `--set`, a flag.

Every check names the value, what the field takes, and the known values where there are any. Imports
no torch.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan import plugins
from benchsuite.plan.cell import AXES, CHOICES, Budget, Cell

_TYPES = {f.name: f.type for f in dataclasses.fields(Cell)}
_EXAMPLES = {
    "compute_time": 'kind = "gamma", mean_s = 1.0, cv = 0.1',
    "receive_cost": "copy_s_per_gib = 0.2, incast = 1.1",
}
BUDGET = tuple(f.name for f in dataclasses.fields(Budget))
# What a user may write: everything but the seed (`seeds`) and the hashes of path plug-ins
# (computed).
FIELDS = tuple(name for name in _TYPES if name not in ("seed", "sources"))


def known(name: str) -> str:
    """The name itself, where it is a field of a cell.

    UsageError otherwise, with the fields of a cell, the nearest first.
    """
    if name not in FIELDS:
        raise UsageError(plugins.unknown("key", name, FIELDS, of="a cell"))
    return name


def check(name: str, value: Any) -> Any:
    """One value of one field in the field's type. Path plug-ins stay as written.

    Raises UsageError with the name, the value and what the field takes.
    """
    if name in AXES or name in ("cluster", "preset") or name in CHOICES:
        if not isinstance(value, str):
            raise UsageError(f"{name} takes a name, not {value!r}")
        if name in CHOICES and value not in CHOICES[name]:
            raise UsageError(plugins.unknown(name, value, CHOICES[name]))
        return value

    if name == "straggler":
        return _straggler(value)

    # TOML has no null: a plan that takes back what it said writes "none".
    if name in _EXAMPLES:
        if isinstance(value, str) and value == "none":
            return None
        return dict(_table(name, value, _EXAMPLES[name]))

    if name == "faults":
        return tuple(
            _table(name, item, 'rank = 1, phase = "compute", step = 5') for item in listed(value)
        )

    return number(name, value, kind=str(_TYPES[name]))


def checked(cell: Cell) -> Cell:
    """A cell made in Python, with every value in its field's type.

    Raises UsageError where a value has another type. From Python anything may come, e.g. numpy's
    numbers, which would make the canonical JSON fail far from here.
    """
    if not isinstance(cell, Cell):
        raise UsageError(f"a Cell is asked for, not {cell!r}")

    values = {name: getattr(cell, name) for name in FIELDS}
    # Both are checked below: they are no single values.
    table = values.pop("options")
    limits = values.pop("budget")

    if not isinstance(table, Mapping) or not all(
        isinstance(each, Mapping) for each in table.values()
    ):
        raise UsageError(
            f"options takes tables, not {table!r}: write options={{'ring': {{'segment_kib': 64}}}}"
        )

    if not isinstance(limits, Budget):
        raise UsageError(f"budget takes a Budget, not {limits!r}")

    for name in _EXAMPLES:
        if values[name] is None:
            del values[name]  # None is its default; a plan says "none"

    given: dict[str, Any] = {name: check(name, value) for name, value in values.items()}

    given["seed"] = number("seed", cell.seed, kind="int")
    return dataclasses.replace(cell, **given, budget=budget(dataclasses.asdict(limits)))


def budget(values: Mapping[str, Any]) -> Budget:
    """A budget from its table. UsageError for an unknown key, or a value that is no number."""
    for key in values:
        if key not in BUDGET:
            raise UsageError(plugins.unknown("key", key, BUDGET, of="budget"))

    kinds = {f.name: str(f.type) for f in dataclasses.fields(Budget)}
    checked: dict[str, Any] = {
        key: number(f"budget.{key}", value, kind=kinds[key]) for key, value in values.items()
    }
    return Budget(**checked)


def number(name: str, value: Any, *, kind: str) -> int | float | None:
    """An int or float as the annotation says; `none` where it may be None.

    name: for the message. kind: the annotation's text, e.g. `float | None`. Raises UsageError
    otherwise.
    """
    optional = kind.endswith("| None")
    if optional and (value is None or value == "none"):
        return None

    # 4.0 is taken for 4, because TOML and JSON writers do not agree on it; True is not taken for 1.
    wanted = "an integer" if kind.startswith("int") else "a number"
    bad = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    if bad or (kind.startswith("int") and value != int(value)):
        raise UsageError(f"{name} takes {wanted}{' or none' if optional else ''}, not {value!r}")
    return int(value) if kind.startswith("int") else float(value)


def listed(value: Any) -> list[Any]:
    """A list as it is, anything else as a list of one.

    TOML writes a single value without brackets, and every field may have several.
    """
    return list(value) if isinstance(value, (list, tuple)) else [value]


def read(text: str) -> Any:
    """A TOML scalar, list or inline table; `a,b` is a list; anything else is the text itself.

    So a shell's user need not quote twice: `sync=ring`, not `sync='"ring"'`.
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass

    # With brackets or quotes it was meant as TOML and has a mistake: cut at its commas it would
    # become a list of fragments.
    if "," in text and not set(text) & set("[]{}\"'"):
        return [read(item.strip()) for item in text.split(",") if item.strip()]
    return text


def assignment(text: str) -> tuple[Sequence[str], Any, str]:
    """The parts of an assignment: keys, value, and the value's text.

    `options.k.lock=none` gives (("options", "k", "lock"), "none", "none"). The text is for fields
    that take names: a member called `1e3` would be read as a number. Raises UsageError without `=`.
    """
    key, equals, value = text.partition("=")
    parts = tuple(part.strip() for part in key.split("."))
    if not equals or not all(parts):
        raise UsageError(
            f"--set {text!r} is not KEY=VALUE; write e.g. replicas=4 or "
            "options.asynchronous.lock=none"
        )

    return parts, read(value.strip()), value.strip()


def _straggler(value: Any) -> dict[str, float]:
    """Worker -> slow-down factor; "00" and "0" are one worker."""
    table = _table("straggler", value, "0 = 4.0")
    factors: dict[str, float] = {}

    for worker, factor in table.items():
        if not str(worker).isdigit():
            raise UsageError(
                f"straggler.{worker}: the key is a worker's number, e.g. straggler = {{ 0 = 4.0 }}"
            )

        factors[str(int(worker))] = float(
            number(f"straggler.{worker}", factor, kind="float") or 0.0
        )

    return factors


def _table(name: str, value: Any, example: str) -> Mapping[str, Any]:
    """The value, which has to be a table of finite numbers and words; "none" is the empty one.

    example: what to write, for the message.
    """
    if value == "none":
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} takes a table, not {value!r}: write {name} = {{ {example} }}")

    for key, each in value.items():
        if not isinstance(each, (bool, int, float, str)) or (
            isinstance(each, float) and not math.isfinite(each)
        ):
            raise UsageError(
                f"{name}.{key} takes a finite number or a word, not {each!r}: {name} = {{ "
                f"{example} }}"
            )

    return value
