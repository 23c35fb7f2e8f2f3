"""The table that `benchsuite compare` prints."""

from __future__ import annotations

from typing import Any

from benchsuite.analysis.regression import Comparison
from benchsuite.report import text


def table(comparison: Comparison) -> str:
    """Plain text, one line per metric, and a closing line with the verdict."""
    rows = [("cell", "seed", "metric", "base", "head", "verdict")]

    for finding in comparison.findings:
        note = f" ({finding.note})" if finding.note else ""
        rows.append(
            (
                f"{finding.cell_id} {finding.label}",
                str(finding.seed),
                finding.metric,
                _value(finding.base),
                _value(finding.head),
                f"{finding.verdict}{note}",
            )
        )

    document = comparison.to_json()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in document["counts"].items())
    verdict = f"{document['verdict']}: {counts or 'nothing to compare'}"
    return "\n".join([*text.aligned(rows), "", verdict])


def _value(value: Any) -> str:
    """A float with all its digits: two values that differ never look alike."""
    if value is None:
        return "-"
    return repr(value) if isinstance(value, float) else str(value)
