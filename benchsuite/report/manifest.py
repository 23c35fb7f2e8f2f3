"""MANIFEST.json: a checksum of everything that went into a page, and of what came out.

Inputs are the runs, their environments, the plan and the code that rendered; outputs are the page,
its figures and its tables. Each is named with its sha256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchsuite.analysis.select import Selection
from benchsuite.plan.hashing import checksum
from benchsuite.plan.plan import Plan
from benchsuite.results import record

NAME = "MANIFEST.json"
_FOLDERS = ("analysis", "report")  # of this package: the code between a run file and the page
_OUTPUTS = ("figures", "tables")
_CODE = (".py", ".html", ".css", ".js")


def write(
    plan: Plan,
    selection: Selection,
    environments: Mapping[str, Mapping[str, Any]],
    out_dir: Path,
    *,
    epoch: int,
) -> None:
    """Writes the manifest of what stands under `out_dir`.

    `epoch`: the one date, in seconds since 1970, that the outputs carry.
    """
    package = Path(__file__).resolve().parents[1]
    sources = sorted(
        p for folder in _FOLDERS for p in (package / folder).rglob("*") if p.suffix in _CODE
    )
    outputs = [
        out_dir / "index.html",
        *sorted(p for folder in _OUTPUTS for p in (out_dir / folder).iterdir()),
    ]
    document = {
        "plan": {"name": plan.name, "sha256": checksum(plan.text.encode())},
        "runs": {
            run.run_id: checksum(record.dumps(run.to_json()).encode()) for run in selection.runs
        },
        "environments": {
            run.environment_id: checksum(
                json.dumps(environments.get(run.environment_id, {}), sort_keys=True).encode()
            )
            for run in selection.runs
        },
        "code": {
            path.relative_to(package.parent).as_posix(): checksum(path.read_bytes())
            for path in sources
        },
        "outputs": {
            path.relative_to(out_dir).as_posix(): checksum(path.read_bytes()) for path in outputs
        },
        "epoch": epoch,
    }
    (out_dir / NAME).write_text(
        json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


def clear(out_dir: Path) -> None:
    """Removes what an earlier rendering wrote here, by its manifest.

    So no old figure stays beside new ones, and no file of somebody else's is touched.
    """
    try:
        listed = json.loads((out_dir / NAME).read_text(encoding="utf-8"))["outputs"]
    except (OSError, ValueError, KeyError):
        return

    for name in listed:
        path = (out_dir / name).resolve()
        if path.is_relative_to(out_dir.resolve()):
            path.unlink(missing_ok=True)
