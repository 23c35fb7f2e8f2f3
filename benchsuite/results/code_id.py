"""`code_id`: a hash of the code that a cell's numbers come from. Editing such a file makes its runs
missing again.

It covers the cell's plug-in files and what they import on their own axis (`hierarchical` may use
`ring`), what every rank shares (`loop.py`, `training.py`, `update.py`, `workload.py`, the protocols
of the four folders), and the world it ran in: `worker.py` and the process comm, or `virtual/` and
the virtual one; of a tuned cell also how it is tuned. It does not cover the members that a cell
does not use: editing `ring.py` leaves the runs of `native` valid.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from benchsuite.plan import plugins
from benchsuite.plan.cell import AXES, Cell

SHARED = (
    "worker/loop.py",
    "worker/build.py",
    "worker/rollouts.py",
    "update.py",
    "workload/__init__.py",
    "workload/muon_optimizer.py",
    "plan/target.py",
)
WALL = (
    "worker/main.py",
    "worker/rendezvous.py",
    "comm/process.py",
    "comm/groups.py",
    "comm/lane.py",
    "comm/shared_memory.py",
    "comm/staging.py",
    "worker/devices.py",
)
DIVIDED = (
    "worker/model_parallel.py",
    "plan/placement.py",
    "parallel/pieces.py",
    "parallel/replica.py",
)
VIRTUAL = (
    "virtual",
    "plan/compute_time.py",
)
COMM = ("comm/__init__.py", "comm/traffic.py")
MEASURES = (  # what stands around the loop
    "worker/clock.py",
    "worker/device_figures.py",
    "measure/device_time.py",
    "worker/evaluation.py",
    "measure/memory.py",
    "worker/snapshots.py",
    "worker/traffic_mode.py",
    "measure/wire.py",
)
FOLDERS = ("parallel", "sync", "topology", "compression")


def code_id(cell: Cell) -> str:
    """First 12 hex digits of sha256 over names and contents of the files (no machine's path is in
    it)."""
    digest = hashlib.sha256()
    for name, path in sorted(files(cell).items()):
        digest.update(f"{name}\0{_hash(path, path.stat().st_mtime_ns)}\0".encode())
    return digest.hexdigest()[:12]


def rules_id() -> str:
    """What a refusal depends on besides the cell: the rules. A refusal of an older version does not
    stand for a run."""
    package = plugins.PACKAGE
    digest = hashlib.sha256()
    for path in sorted([*(package / "rules").glob("*.py"), package / "plan" / "declared.py"]):
        digest.update(f"{path.name}\0{_hash(path, path.stat().st_mtime_ns)}\0".encode())
    return f"rules-{digest.hexdigest()[:12]}"


def files(cell: Cell) -> dict[str, Path]:
    """The files by a name that is the same on every machine. Members without a file have none."""
    package = plugins.PACKAGE
    fixed = [package / name for name in SHARED]
    fixed += [package / folder / "__init__.py" for folder in FOLDERS]
    fixed += [package / name for name in MEASURES]
    fixed += [package / name for name in DIVIDED if cell.parallel != "data"]
    fixed += [package / "run" / "tune.py"] if cell.tuning == "per_strategy" else []
    for name in (*COMM, *(VIRTUAL if cell.clock == "virtual" else WALL)):
        path = package / name
        fixed += sorted(path.glob("*.py")) if path.is_dir() else [path]
    found = {path.relative_to(package).as_posix(): path for path in fixed if path.is_file()}
    for axis in AXES:
        member = plugins.find(axis, getattr(cell, axis))
        found[f"{axis}/{member.name}.py"] = member.path
        for sibling in _siblings(axis, member.path):
            found.setdefault(f"{axis}/{sibling.name}", sibling)
    return found


def _siblings(axis: str, path: Path) -> Iterator[Path]:
    """Members of the same axis that a file imports, and those they import."""
    folder, prefix, _ = plugins.KINDS[axis]
    seen = {path}
    waiting = [path]
    while waiting:
        current = waiting.pop()
        for name in _imports(current, current.stat().st_mtime_ns):
            sibling = folder / f"{name.removeprefix(prefix + '.').split('.')[0]}.py"
            if name.startswith(prefix + ".") and sibling not in seen and sibling.is_file():
                seen.add(sibling)
                waiting.append(sibling)
                yield sibling


@functools.lru_cache(maxsize=256)
def _imports(path: Path, mtime_ns: int) -> tuple[str, ...]:
    """Dotted names that a file imports, `from a.b import c` as `a.b.c`."""
    del mtime_ns  # part of the cache key only
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


@functools.lru_cache(maxsize=512)
def _hash(path: Path, mtime_ns: int) -> str:
    del mtime_ns  # part of the cache key only
    return hashlib.sha256(path.read_bytes()).hexdigest()
