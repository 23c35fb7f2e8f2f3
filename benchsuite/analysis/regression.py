"""Two stored sets of runs compared in what has no noise, so that one run of each is enough.

Counts (samples, updates, predicted and payload bytes, messages, pushes) are equal or they differ,
on every machine. Losses of a cell whose result does not depend on timing are compared exactly on
the same machine and torch version; elsewhere another CPU adds in another order, so relative to the
larger value: 1e-8 for an fp64 cell, 1e-3 for fp32. Of a cell with asynchronous updates only what
does not depend on timing is compared: no loss, no samples to target. Virtual seconds (whole ns) and
staleness are equal, or they differ. No wall-clock time is compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchsuite.plan import declared
from benchsuite.results.record import Run, Status

SAME = "same"
DIFFERS = "differs"
MISSING = "missing"
NEW = "new"
NOT_COMPARED = "not compared"
_FAILING = (DIFFERS, MISSING)

COUNTS = (
    "num_parameters",
    "samples",
    "steps",
    "updates",
    "predicted_bytes",
    "payload_bytes",
    "shm_bytes",
    "messages",
)
TIMING_FREE_COUNTS = (
    "num_parameters",
    "samples",
    "predicted_bytes",
    "payload_bytes",
    "shm_bytes",
    "messages",
)
TOLERANCE = {
    "fp64": 1e-8,
    "fp32": 1e-3,
    "bf16": 1e-2,
}  # relative, on another machine or torch version

SameBuild = Callable[[Run, Run], bool]


@dataclass(frozen=True)
class Finding:
    """One metric of one cell and seed in both sets."""

    cell_id: str
    label: str
    seed: int
    metric: str
    base: Any
    head: Any
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All findings, in the order of the cells' labels."""

    findings: Sequence[Finding]

    @property
    def exit_code(self) -> int:
        """1 where something differs or is missing in HEAD, else 0."""
        return int(any(finding.verdict in _FAILING for finding in self.findings))

    def to_json(self) -> dict[str, Any]:
        """`{"verdict", "counts", "findings"}`."""
        return {
            "verdict": "regression" if self.exit_code else "pass",
            "counts": dict(sorted(Counter(finding.verdict for finding in self.findings).items())),
            "findings": [asdict(finding) for finding in self.findings],
        }


def compare(
    base: Iterable[Run],
    head: Iterable[Run],
    *,
    same_build: SameBuild,
    loss_tolerance: float | None = None,
) -> Comparison:
    """Compares the newest run of each cell and seed.

    `same_build(a, b)`: whether both ran on the same machine with the same torch (the store knows
    the environments). `loss_tolerance`: relative, overrules both the exact comparison and
    `TOLERANCE`.
    """
    olds = _newest(base)
    news = _newest(head)
    findings: list[Finding] = []

    for key in sorted(
        olds.keys() | news.keys(), key=lambda key: ((olds.get(key) or news[key]).cell.label, *key)
    ):
        old = olds.get(key)
        new = news.get(key)

        if old is None or new is None:
            run = old or new
            assert run is not None
            verdict, note = (NEW, "only in HEAD") if old is None else (MISSING, "only in BASE")
            findings.append(
                _finding(run, "run", old and old.run_id, new and new.run_id, verdict, note)
            )
            continue

        findings += _compared(
            old, new, _tolerance(old, new, same_build=same_build, chosen=loss_tolerance)
        )

    return Comparison(findings)


def _newest(runs: Iterable[Run]) -> dict[tuple[str, int], Run]:
    """The newest ok run of each (cell id, seed); where there is none, the newest run."""
    newest: dict[tuple[str, int], Run] = {}
    for run in sorted(runs, key=lambda run: (run.status == Status.OK, run.started_at, run.run_id)):
        newest[run.cell_id or run.cell.id, run.cell.seed] = run
    return newest


def _compared(old: Run, new: Run, tolerance: float) -> list[Finding]:
    if old.status != new.status or old.status != Status.OK:
        verdict = SAME if old.status == new.status else DIFFERS
        return [
            _finding(old, "status", str(old.status), str(new.status), verdict, new.reason or "")
        ]

    by_arrival = _by_arrival(old) or _by_arrival(new)
    findings = _tuned(old, new, by_arrival=by_arrival)
    for metric in TIMING_FREE_COUNTS if by_arrival else COUNTS:
        findings.append(_exact(old, metric, old.result.get(metric), new.result.get(metric)))

    if old.cell.clock == "virtual":
        findings.append(
            _exact(old, "virtual_s", old.cost.get("virtual_s"), new.cost.get("virtual_s"))
        )
        findings.append(_exact(old, "staleness", _staleness(old), _staleness(new)))

    if _pushes(old) is not None or _pushes(new) is not None:
        findings.append(_exact(old, "pushes", _pushes(old), _pushes(new)))

    if by_arrival:
        note = "depends on timing"
        findings.append(_finding(old, "loss", _final(old), _final(new), NOT_COMPARED, note))
        return findings

    findings.append(_loss(old, new, tolerance))
    findings.append(_close(old, "final_loss", _final(old), _final(new), tolerance))

    if tolerance == 0:
        findings.append(_exact(old, "samples_to_target", _goal(old), _goal(new)))
    else:
        note = "a metric near its target may cross it elsewhere one evaluation later"
        findings.append(
            _finding(old, "samples_to_target", _goal(old), _goal(new), NOT_COMPARED, note)
        )

    return findings


def _tuned(old: Run, new: Run, *, by_arrival: bool) -> list[Finding]:
    """Compares the chosen learning rates: where they differ, losses differ for that reason."""
    a, b = ((run.result.get("tuning") or {}).get("lr_factor") for run in (old, new))
    if a is b is None:
        return []
    if by_arrival:
        return [_finding(old, "tuned_lr_factor", a, b, NOT_COMPARED, "depends on timing")]
    return [_exact(old, "tuned_lr_factor", a, b)]


def _loss(old: Run, new: Run, tolerance: float) -> Finding:
    """Compares the curve step by step.

    The finding names the first step that differs, with both its numbers.
    """
    a = list(old.result.get("loss", ()))
    b = list(new.result.get("loss", ()))
    if len(a) != len(b):
        return _exact(old, "loss (entries)", len(a), len(b))

    for step, (x, y) in enumerate(zip(a, b, strict=True)):
        if not _is_close(x, y, tolerance):
            return _close(old, f"loss at step {step}", x, y, tolerance)

    return _close(old, f"loss at {len(a)} steps", _digest(a), _digest(b), tolerance)


def _digest(loss: Sequence[float | None]) -> float | None:
    """One number to print for an equal curve: its mean (None where a loss was not finite)."""
    finite = [value for value in loss if value is not None]
    return math.fsum(finite) / len(finite) if finite and len(finite) == len(loss) else None


def _exact(run: Run, metric: str, a: Any, b: Any) -> Finding:
    return _finding(
        run, metric, a, b, SAME if a == b else DIFFERS, "" if a == b else "compared exactly"
    )


def _close(run: Run, metric: str, a: float | None, b: float | None, tolerance: float) -> Finding:
    how = f"relative {tolerance:g}" if tolerance else "compared exactly"
    close = _is_close(a, b, tolerance)
    return _finding(
        run, metric, a, b, SAME if close else DIFFERS, "" if close and not tolerance else how
    )


def _is_close(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=0.0)


def _tolerance(old: Run, new: Run, *, same_build: SameBuild, chosen: float | None) -> float:
    if chosen is not None:
        return chosen
    return 0.0 if same_build(old, new) else TOLERANCE[old.cell.precision]


def _by_arrival(run: Run) -> bool:
    """Whether the result depends on which message came first.

    A single worker has nobody to race with.
    """
    if run.cell.clock == "virtual" or run.cell.num_workers == 1:
        return False
    says = declared.where_known("sync", run.cell.sync)
    by_arrival = isinstance(says, declared.Strategy) and says.by_arrival
    return by_arrival or run.result.get("staleness") is not None


def _pushes(run: Run) -> int | None:
    pushes = (run.result.get("events") or {}).get("pushes")
    return sum(pushes) if isinstance(pushes, list) else pushes


def _staleness(run: Run) -> float | None:
    value: float | None = (run.result.get("staleness") or {}).get("mean")
    return value


def _goal(run: Run) -> int | None:
    value: int | None = (run.result.get("samples_to") or {}).get("target")
    return value


def _final(run: Run) -> float | None:
    value: float | None = run.result.get("final_loss")
    return value


def _finding(run: Run, metric: str, base: Any, head: Any, verdict: str, note: str = "") -> Finding:
    return Finding(
        run.cell_id or run.cell.id, run.cell.label, run.cell.seed, metric, base, head, verdict, note
    )
