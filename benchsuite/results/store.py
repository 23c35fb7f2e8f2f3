"""results/: one file per run, written once and atomically; resume; the tidy table.

    <root>/<machine>/<cell id>/<run id>.json      one run, never overwritten
    <root>/<machine>/env/<hash>.json              environment, once per host
    <root>/<machine>/calibration/<date>-<hash>.json    what `benchsuite calibrate` found
    <root>/gpu/gpu-check-<date>.json              what `make gpu-check` found, here and where a root
    lies in another <root>/.frame-cache.json                      derived: one row per run file,
    keyed by its name, mtime and size

Folders of several machines merge by copying. A truncated or foreign file is skipped with a warning
that names it. Imports no torch; pandas only inside `frame`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchsuite.plan.cell import Cell, canonical
from benchsuite.results import columns as table
from benchsuite.results.record import Run, Status, dumps, environment_id, new_run_id

if TYPE_CHECKING:
    import pandas as pd

CodeId = str | Callable[[Cell], str]

DONE = (Status.OK, Status.TIMEOUT, Status.UNSUPPORTED)  # not run again; `failed` is
CACHE = ".frame-cache.json"
# folders that hold no runs
ENVIRONMENTS = "env"
CALIBRATIONS = "calibration"
GPU_CHECKS = "gpu"
_NO_LINKS = (
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
)  # file systems without hard links


class StoreError(RuntimeError):
    """The results folder cannot be written. The message names folder, cause and remedy."""


class ForeignFile(UserWarning):
    """A file under results/ that is not a complete run file; it is skipped."""


class Store:
    """The runs under one results folder. Several processes may write to one folder at once."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def check_writable(self) -> None:
        """Raises StoreError now, rather than after the first cell has been computed."""
        path = self.root / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
        with self._one_clear_error():
            self.root.mkdir(parents=True, exist_ok=True)
            path.touch()
            path.unlink()

    def write(self, run: Run) -> Path:
        """Writes the run once, atomically; returns its path. A taken run id is replaced by a fresh
        one."""
        folder = (
            self.root / run.machine / run.cell_id
            if run.cell_id
            else self.root / run.machine / run.cell.id
        )
        while True:
            path = folder / f"{run.run_id}.json"
            if self._write_once(path, dumps(run.to_json())):
                return path
            run = dataclasses.replace(run, run_id=new_run_id())

    def write_environment(self, machine: str, environment: Mapping[str, Any]) -> str:
        """Writes the environment if it is not there yet; returns its id, a hash of its content."""
        name = environment_id(environment)
        document = json.loads(canonical(environment))
        self._write_once(self.root / machine / ENVIRONMENTS / f"{name}.json", dumps(document))
        return name

    def write_calibration(self, machine: str, document: Mapping[str, Any]) -> Path:
        """Writes what was calibrated, once; returns its path. `started_at` of the document names
        the file."""
        started = "".join(letter for letter in str(document["started_at"]) if letter not in "-:")
        path = self.root / machine / CALIBRATIONS / f"{started}-{environment_id(document)[:8]}.json"
        self._write_once(path, dumps(document))
        return path

    def environment(self, machine: str, environment_id: str) -> dict[str, Any]:
        """The stored environment; {} where the file is missing or broken."""
        path = self.root / machine / ENVIRONMENTS / f"{environment_id}.json"
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(document, dict):
                return document
        return {}

    def runs(
        self, cells: Iterable[Cell] | None = None, *, seeds: Sequence[int] | None = None
    ) -> list[Run]:
        """All runs, or those of some cells and seeds, in the order of their run ids."""
        wanted = None if cells is None else {cell.id for cell in cells}
        paths = [path for path in self._files() if wanted is None or path.parent.name in wanted]
        found = [run for path in paths for run, _ in _read(path)]
        return sorted(
            (run for run in found if seeds is None or run.cell.seed in seeds),
            key=lambda run: run.run_id,
        )

    def missing(
        self, cells: Iterable[Cell], seeds: Sequence[int] | None, code_id: CodeId
    ) -> list[Cell]:
        """Cells with their seed that have no ok, timeout or unsupported run of this code.

        `seeds = None`: the cells carry theirs. `code_id` may be a function of the cell (it hashes
        the files used).
        """
        done = {(r["cell_id"], r["seed"], r["code_id"]) for r in self.rows() if r["status"] in DONE}
        return [
            cell
            for cell in _with_seeds(cells, seeds)
            if (cell.id, cell.seed, code_of(code_id, cell)) not in done
        ]

    def stale(
        self, cells: Iterable[Cell], seeds: Sequence[int] | None, code_id: CodeId
    ) -> list[table.Row]:
        """Rows of these cells and seeds that other code has written. They stay, and are never drawn
        with new ones."""
        now = {(cell.id, cell.seed): code_of(code_id, cell) for cell in _with_seeds(cells, seeds)}
        return [
            r
            for r in self.rows()
            if now.get((r["cell_id"], r["seed"]), r["code_id"]) != r["code_id"]
        ]

    def rows(self) -> list[table.Row]:
        """One row per run with the keys of `frame.COLUMNS`, in the order of the run ids."""
        environments: dict[tuple[str, str], dict[str, Any]] = {}
        rows = []
        for entry in self._indexed().values():
            machine = entry["machine"]
            environment_id = entry["environment_id"]
            if (machine, environment_id) not in environments:
                environments[machine, environment_id] = self.environment(machine, environment_id)
            environment = environments[machine, environment_id]
            values = dict(zip(table.COLUMNS, entry["values"], strict=True))
            values["commit"], values["dirty"] = environment.get("commit"), environment.get("dirty")
            rows.append(values)
        return sorted(rows, key=lambda values: values["run_id"])

    def frame(self) -> pd.DataFrame:
        """The tidy table, one row per run, nullable types (Int64, Float64, string, boolean)."""
        import pandas as pd

        types = {"str": "string", "int": "Int64", "float": "Float64", "bool": "boolean"}
        rows = self.rows()
        columns = {
            name: pd.array([values[name] for values in rows], dtype=types[kind])  # type: ignore[call-overload]
            for name, kind in table.COLUMNS.items()
        }
        return pd.DataFrame(columns)

    def _files(self) -> Iterator[Path]:
        """Candidates for run files: `<machine>/<cell id>/*.json`, hidden names and folders without
        runs left out."""
        for machine in _folders(self.root):
            for cell_folder in _folders(machine):
                if cell_folder.name not in (ENVIRONMENTS, CALIBRATIONS, GPU_CHECKS):
                    for path in sorted(cell_folder.glob("*.json")):
                        if not path.name.startswith("."):
                            yield path

    def _indexed(self) -> dict[str, dict[str, Any]]:
        """File name -> {mtime_ns, size, machine, environment_id, values}; only new or changed files
        are parsed."""
        cached = self._load_cache()
        index: dict[str, dict[str, Any]] = {}
        parsed = 0
        for path in self._files():
            name = str(path.relative_to(self.root))
            status = path.stat()
            entry = cached.get(name)
            if (
                entry is None
                or entry["mtime_ns"] != status.st_mtime_ns
                or entry["size"] != status.st_size
            ):
                parsed += 1
                found = _read(path)
                if not found:
                    continue  # warned about every time: it is never cached
                entry = {
                    "mtime_ns": status.st_mtime_ns,
                    "size": status.st_size,
                    "machine": path.parts[-3],
                    "environment_id": found[0][0].environment_id,
                    "values": found[0][1],
                }
            index[name] = entry
        if parsed or len(index) != len(cached):
            self._save_cache(index)
        return index

    def _load_cache(self) -> dict[str, dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            document = json.loads((self.root / CACHE).read_text(encoding="utf-8"))
            if document.get("key") == _cache_key():
                files: dict[str, dict[str, Any]] = document["files"]
                return files
        return {}

    def _save_cache(self, index: Mapping[str, Any]) -> None:
        """The cache is a convenience: a folder that cannot be written is read without one."""
        with contextlib.suppress(OSError):
            temporary = self.root / f"{CACHE}.{os.getpid()}-{secrets.token_hex(4)}"
            try:
                temporary.write_text(
                    json.dumps({"key": _cache_key(), "files": index}), encoding="utf-8"
                )
                temporary.replace(self.root / CACHE)
            finally:
                temporary.unlink(missing_ok=True)

    def _write_once(self, path: Path, text: str) -> bool:
        """Temporary file in the same folder, fsync, hard link to the name. False where the name is
        taken."""
        temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        with self._one_clear_error():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "x", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
                return _publish(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _one_clear_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"results folder {self.root} cannot be written: {os.strerror(error.errno or 0)}; "
                "nothing half-written "
                "was left. Free space or rights there, or choose another folder with --results DIR"
            ) from error


def _publish(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False
        temporary.replace(path)  # run ids carry 32 random bits: two writers do not meet here
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the name survives a power cut too
    finally:
        os.close(descriptor)
    return True


def _folders(root: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(
            entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
    return []


def _read(path: Path) -> list[tuple[Run, list[Any]]]:
    """The run in a file with its row, as a list of one; an empty list and a warning where it is
    none."""
    try:
        run = Run.parse(json.loads(path.read_text(encoding="utf-8")))
        values = table.row(run)
        return [(run, [table.typed(column, values[column]) for column in table.COLUMNS])]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        warnings.warn(
            f"{path} skipped, not a complete run file: {error}", ForeignFile, stacklevel=2
        )
        return []


def _with_seeds(cells: Iterable[Cell], seeds: Sequence[int] | None) -> list[Cell]:
    return (
        list(cells) if seeds is None else [cell.with_seed(seed) for cell in cells for seed in seeds]
    )


def code_of(code_id: CodeId, cell: Cell) -> str:
    """The code id of a cell."""
    return code_id if isinstance(code_id, str) else code_id(cell)


def _cache_key() -> str:
    """Changes with the code that makes rows, so that an old cache is never read by new code."""
    from benchsuite.plan import cell
    from benchsuite.results import record

    sources = (table.__file__, record.__file__, cell.__file__)
    return hashlib.sha256(
        b"".join(Path(str(source)).read_bytes() for source in sources)
    ).hexdigest()[:16]
