"""How long a gradient takes under the virtual clock: distributions and their parameters.

`compute_time = { kind = "gamma", mean_s = 1.0, cv = 0.1 }`. The mean is `mean_s`, or, as measured
by `benchsuite calibrate`, a straight line over the batch of one worker: `overhead_s + per_sample_s
x samples`. `benchsuite/virtual/streams.py` draws from it. Imports neither torch nor numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan import plugins

Scalar = bool | int | float | str
DEFAULT: Mapping[str, Scalar] = MappingProxyType({"kind": "fixed", "mean_s": 1.0})
MOST_VALUES = 2000  # of a resampled distribution; a longer measurement is thinned out evenly


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kind: its range, in words and as a test."""

    low: float
    high: float
    said: str

    def holds(self, value: Any) -> bool:
        """A number in the range, its ends excluded where they are infinite or `said` says above."""

        # NaN passes no comparison, but infinity would pass one with an open end.
        number = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
        return number and self.low < value < self.high


LONGEST_S = 1e6  # of a mean or a measured time
_SPREAD = Parameter(0, 100, "above 0 and below 100")
_SHARE = Parameter(0, 1, "above 0 and below 1")
# kind -> its own parameters. All of them have mean 1 before scaling.
KINDS: Mapping[str, Mapping[str, Parameter]] = MappingProxyType(
    {
        "fixed": {},
        "exponential": {},
        "shifted_exponential": {
            "shift": _SHARE
        },  # this share of the mean is constant, the rest exponential
        "gamma": {"cv": _SPREAD},
        "log_normal": {"cv": _SPREAD},
        "pareto": {"shape": Parameter(1, math.inf, "above 1 (or there is no mean)")},
        # steps of a worker alternate between fast and slow spells; `enter`, `leave`: chances per
        # step
        "markov": {
            "slow_factor": Parameter(1, 1e6, "above 1 and below 1e6"),
            "enter": _SHARE,
            "leave": _SHARE,
        },
        "resampled": {},
    }
)
MEANS = ("mean_s", "overhead_s", "per_sample_s")
# of a resampled distribution: seconds in one line; a plan may name a file instead
VALUES = "values_s"
PATH = "path"


def problems(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what is wrong, what to do) of a table; [] = it can be drawn from.

    All problems at once, so that a table is corrected in one go.
    """
    if "kind" not in table:
        return [("compute_time without a kind", f"set kind to one of {', '.join(KINDS)}")]

    kind = str(table["kind"])
    if kind not in KINDS:
        return [
            (
                plugins.unknown("compute_time kind", kind, KINDS),
                f"set kind to one of {', '.join(KINDS)}",
            )
        ]

    own = KINDS[kind]
    resampled = (VALUES, PATH) if kind == "resampled" else ()
    known = ("kind", *MEANS, *own, *resampled)
    strange = [key for key in table if key not in known]
    found = [
        (plugins.unknown("compute_time key", key, known, of=kind), f"leave {key} out")
        for key in strange
    ]

    for name, parameter in own.items():
        if name not in table:
            found.append(
                (f"kind = {kind} without {name}", f"give {name}, a number {parameter.said}")
            )
        elif not parameter.holds(table[name]):
            found.append(
                (
                    f"{name} = {table[name]!r} of kind = {kind}",
                    f"set {name} to a number {parameter.said}",
                )
            )

    found += _mean_problems(table)
    if kind == "resampled":
        found += _value_problems(table)
    return found


def _mean_problems(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with the mean: out of range, given twice, or half a line."""
    found = []

    for name in MEANS:
        # The range excludes its ends, so the end lies a little below 0.
        low = -1e-300 if name == "overhead_s" else 0  # an overhead may be 0
        if name in table and not Parameter(low, LONGEST_S, "").holds(table[name]):
            said = f"{name} = {table[name]!r}: seconds, above 0 and below {LONGEST_S:g}"
            found.append((said, f"set e.g. {name} = 0.001"))

    line = [name for name in ("overhead_s", "per_sample_s") if name in table]
    if line and "mean_s" in table:
        found.append(
            (
                f"mean_s beside {' and '.join(line)}: two means",
                "give mean_s, or overhead_s and per_sample_s",
            )
        )
    elif len(line) == 1:
        missing = "per_sample_s" if line[0] == "overhead_s" else "overhead_s"
        found.append(
            (
                f"{line[0]} without {missing}",
                "give both: mean = overhead_s + per_sample_s x samples",
            )
        )

    return found


def _value_problems(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with the measured times of a resampled table: none, two sources, no numbers."""
    if (VALUES in table) == (PATH in table):
        remedy = f'give {PATH} = "a run file", or {VALUES} = "0.011 0.012 .."'
        return [("kind = resampled needs measured times", remedy)]

    try:
        values(table) if VALUES in table else None
    except UsageError as error:
        return [
            (
                str(error),
                f'give {VALUES} as seconds separated by spaces, e.g. {VALUES} = "0.011 0.012"',
            )
        ]

    return []


def values(table: Mapping[str, Any]) -> list[float]:
    """The measured seconds of a resampled table.

    UsageError where they are none, or one of them is not positive: a gradient takes time.
    """
    try:
        found = [float(word) for word in str(table[VALUES]).split()]
    except ValueError as error:
        raise UsageError(f"{VALUES}: {error}") from error
    if not found or not all(math.isfinite(value) and value > 0 for value in found):
        raise UsageError(f"{VALUES}: at least one positive number of seconds is needed")
    return found


def mean_s(table: Mapping[str, Any], samples: float) -> float | None:
    """Mean seconds of one gradient on so many samples; None = as the measured values say.

    table: without problems, as `problems` finds them. samples: of one worker's batch.
    """
    if "per_sample_s" in table:
        return float(table["overhead_s"]) + float(table["per_sample_s"]) * samples
    if "mean_s" in table:
        return float(table["mean_s"])
    return None if table.get("kind") == "resampled" else 1.0


def resolved(table: Mapping[str, Any] | None, folder: Path | None = None) -> dict[str, Any] | None:
    """The table with the values of the file that it names, so that a cell alone rebuilds its run.

    folder: where a relative path is looked for, if not here. A copy; None stays None. Raises
    UsageError where the file cannot be used.
    """
    if table is None or PATH not in table:
        return None if table is None else dict(table)

    given = Path(str(table[PATH])).expanduser()
    path = given if given.is_file() or folder is None else folder / given
    measured = read(path)

    # Evenly, not the first ones: a machine warms up, and early steps are slower. The step is
    # rounded up, so that no more than MOST_VALUES are left; each of them stands in every run file.
    thin = measured[:: max(1, -(-len(measured) // MOST_VALUES))]
    rest = {key: value for key, value in table.items() if key != PATH}
    # Nine digits are nanoseconds, and the same text on every machine, so the same id.
    return rest | {VALUES: " ".join(f"{value:.9f}" for value in thin)}


def read(path: Path) -> list[float]:
    """Seconds per gradient from a file.

    A run file gives those of all workers (`raw.compute_s`), a text file one number per line. Raises
    UsageError where it holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"compute_time.path {str(path)!r} cannot be read: {error}") from error

    try:
        if text.lstrip().startswith("{"):
            found = [value for worker in json.loads(text)["raw"]["compute_s"] for value in worker]
        else:
            found = [float(word) for word in text.split()]

        return values({VALUES: " ".join(map(str, found))})
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"compute_time.path {str(path)!r} holds no measured compute times ({error}): give a "
            "run file of the wall "
            "clock (raw.compute_s), or a text file with one number of seconds per line"
        ) from error


def shown(table: Mapping[str, Any] | None) -> str | None:
    """Short canonical form for a column: measured values as their number.

    Two thousand numbers would fill the table; None stays None.
    """
    if table is None:
        return None
    document = dict(table)
    if VALUES in document:
        document[VALUES] = f"{len(str(document[VALUES]).split())} measured values"
    return json.dumps(document, sort_keys=True, separators=(",", ":"))
