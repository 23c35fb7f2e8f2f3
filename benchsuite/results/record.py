"""The run file: one strict-JSON document that alone rebuilds a run, and the status words.

Sections: `cell` (whole, resolved), `result` (deterministic where the cell is: byte-identical when
repeated), `cost` (times, load, memory, bytes on the wire), `raw` (samples in the order measured),
`environment_id` (the environment itself is stored once per host). `schema/run.schema.json` is the
checked-in JSON Schema. Imports no torch.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from benchsuite.plan.cell import Cell, from_json
from benchsuite.plan.hashing import canonical, checksum

SCHEMA = 1


class Status(StrEnum):
    """How a run ended. Absence of a run is `not run`, a fifth word that no file carries."""

    OK = "ok"
    FAILED = "failed"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"


# Flags that travel into every table and figure.
OVERSUBSCRIBED = "oversubscribed"  # (workers + servers) x threads > cores
CONTENDED = "contended"  # foreign CPU share above 5 %
LOST_WORKER = "lost_worker"  # a worker died and the strategy went on
DIVERGED = "diverged"  # the loss was not finite
TIMING_ONLY = "timing_only"  # a simulation without gradients: it says nothing about convergence


@dataclass(frozen=True)
class Outcome:
    """How the ranks of one cell ended, as the host that waited for them saw it."""

    status: Status
    reason: str | None = None
    culprit: Mapping[str, Any] | None = None  # {rank, role, how, phase, step}
    flags: tuple[str, ...] = ()
    started_at: str = ""
    seconds: float = 0.0  # from the first process start to the last process end


@dataclass(frozen=True)
class Run:
    """One run of one cell with one seed, as its file holds it."""

    cell: Cell
    code_id: str
    status: Status
    reason: str | None = None
    culprit: Mapping[str, Any] | None = None
    flags: tuple[str, ...] = ()
    started_at: str = ""
    machine: str = ""
    environment_id: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: new_run_id())
    cell_id: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)  # unknown keys of a newer writer, kept

    def to_json(self) -> dict[str, Any]:
        """The document of the run file.

        Raises ValueError for NaN or infinity (write null plus a reason).
        """
        document = {
            "schema": SCHEMA,
            "run_id": self.run_id,
            "cell_id": self.cell_id or self.cell.id,
            "seed": self.cell.seed,
            "code_id": self.code_id,
            "started_at": self.started_at,
            "machine": self.machine,
            "environment_id": self.environment_id,
            "status": str(self.status),
            "reason": self.reason,
            "culprit": dict(self.culprit) if self.culprit is not None else None,
            "flags": sorted(self.flags),
            "cell": self.cell.to_json(),
            "result": dict(self.result),
            "cost": dict(self.cost),
            "raw": dict(self.raw),
        }
        return {**self.extra, **document}

    @staticmethod
    def parse(document: Mapping[str, Any]) -> Run:
        """A run from its document.

        ValueError where it is not one, or of a newer schema than this code reads.
        """
        schema = document.get("schema")
        if not isinstance(schema, int) or "run_id" not in document or "cell" not in document:
            raise ValueError("not a run file")
        if not 1 <= schema <= SCHEMA:
            raise ValueError(f"schema {schema}, this version reads 1 to {SCHEMA}")

        for section in ("cell", "result", "cost", "raw"):
            if not isinstance(document.get(section, {}), Mapping):
                raise ValueError(f"{section} is {document[section]!r:.60}, not an object")

        known = {"schema", "seed"} | {f for f in Run.__dataclass_fields__ if f != "extra"}
        return Run(
            cell=from_json(document["cell"]),
            code_id=document["code_id"],
            status=Status(document["status"]),
            reason=document.get("reason"),
            culprit=document.get("culprit"),
            flags=tuple(document.get("flags", ())),
            started_at=document.get("started_at", ""),
            machine=document.get("machine", ""),
            environment_id=document.get("environment_id", ""),
            result=document.get("result", {}),
            cost=document.get("cost", {}),
            raw=document.get("raw", {}),
            run_id=document["run_id"],
            cell_id=document["cell_id"],
            extra={key: value for key, value in document.items() if key not in known},
        )


def new_run_id() -> str:
    """A fresh id, sortable by time and unique across machines: `20261123T131500Z-1f3a9c02`."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def environment_id(environment: Mapping[str, Any]) -> str:
    """The hash of an environment's content: the first 12 hex digits over its canonical JSON."""
    return checksum(canonical(environment).encode())[:12]


def now_iso() -> str:
    """The present time in UTC, to the second."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def dumps(document: Mapping[str, Any]) -> str:
    """Strict JSON with sorted keys. ValueError for NaN or infinity."""
    return json.dumps(document, sort_keys=True, allow_nan=False, separators=(",", ":")) + "\n"


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """The plain form of an outcome: one line from the cell host to the command."""
    document = asdict(outcome)
    document["status"] = str(outcome.status)
    document["flags"] = list(outcome.flags)

    return document
