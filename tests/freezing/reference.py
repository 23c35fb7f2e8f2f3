"""What a fresh run of the reference plan differs in from the stored one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from tests.freezing.doors import ROOT, say
from tests.freezing.golden import Part

# Given, so that the verdict is the same on the machine of the stored runs and on any other.
TOLERANCE = "1e-8"


def compared() -> str:
    """`benchsuite compare results/reference FRESH`, a line per finding."""
    with tempfile.TemporaryDirectory() as fresh:
        say("run", "reference", "--results", fresh)
        arguments = (
            "compare",
            str(ROOT / "results" / "reference"),
            fresh,
            "--loss-tolerance",
            TOLERANCE,
            "--json",
        )
        document = json.loads(say(*arguments, allow=(0, 1)))
    counts = ", ".join(
        f"{count} {verdict}" for verdict, count in sorted(document["counts"].items())
    )
    return "\n".join(
        [*map(_line, document["findings"]), "", f"{document['verdict']}: {counts}", ""]
    )


def _line(finding: Mapping[str, Any]) -> str:
    """A fresh float is a loss, told by its verdict: its last digits are those of the machine."""
    base, head = finding["base"], finding["head"]
    if finding["metric"] not in ("virtual_s", "staleness") and isinstance(head, float):
        base, head = f"{base:.6g}" if finding["verdict"] != "not compared" else "a loss", "a loss"
    note = f" ({finding['note']})" if finding["note"] else ""
    return (
        f"{finding['cell_id']} {finding['label']}, seed {finding['seed']}, {finding['metric']}: "
        f"{base} -> {head}, {finding['verdict']}{note}"
    )


PARTS = (Part("compare", "compare.txt", compared, slow=True),)
