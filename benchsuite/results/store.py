"""results/: one file per run, written once and atomically; resume; the tidy table.

    <root>/<machine>/<cell id>/<run id>.json      one run, never overwritten
    <root>/<machine>/env/<hash>.json              environment, once per host
    <root>/<machine>/calibration/<date>-<hash>.json    what `benchsuite calibrate` found
    <root>/gpu/gpu-check-<date>.json              what `make gpu-check` found
    <root>/.frame-cache.json                      derived: a row per run file, keyed by its name,
                                                  mtime and size

Folders of several machines merge by copying. A truncated or foreign file is skipped with a warning
that names it, once: the cache remembers it until it changes. A run that is deleted while others are
read counts as never listed. Imports no torch; pandas only inside `frame`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchsuite.plan.cell import Cell
from benchsuite.plan.hashing import canonical, checksum
from benchsuite.results import columns
from benchsuite.results.record import Run, Status, dumps, environment_id, new_run_id

if TYPE_CHECKING:
    import pandas as pd

CodeId = str | Callable[[Cell], str]

# How a run may have ended that is not made again. One that failed is.
DONE = (Status.OK, Status.TIMEOUT, Status.UNSUPPORTED)
CACHE = ".frame-cache.json"
# Folders that hold no runs.
ENVIRONMENTS = "env"
CALIBRATIONS = "calibration"
GPU_CHECKS = "gpu"
# The mtime in ns and the size of a file, which is read again where one of them has changed.
_Stamp = list[int]
# What file systems without hard links answer.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class StoreError(RuntimeError):
    """The results folder cannot be written. The message names folder, cause and remedy."""


class ForeignFile(UserWarning):
    """A file under results/ that is not a complete run file; it is skipped."""


@dataclasses.dataclass
class _Cache:
    """What `.frame-cache.json` holds, by file name relative to the root.

    files: {stamp, machine, environment_id, values} of a run. foreign: stamps of files that are no
    runs.
    """

    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    foreign: dict[str, _Stamp] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _NoRun:
    """A file that is skipped, and why.

    stamp: None where the file could not be read, which may be otherwise the next time.
    """

    path: Path
    why: str
    stamp: _Stamp | None

    def warn(self) -> None:
        """Tells the user, by a warning that names the file."""
        message = f"{self.path} skipped, not a complete run file: {self.why}"
        warnings.warn(message, ForeignFile, stacklevel=2)


class Store:
    """The runs under one results folder. Several processes may write to one folder at once."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def check_writable(self) -> None:
        """Raises StoreError now, rather than after the first cell has been computed."""
        # A folder that exists may still be read only: only a file tells.
        path = self.root / f".probe-{os.getpid()}-{secrets.token_hex(4)}"

        with self._one_clear_error():
            self.root.mkdir(parents=True, exist_ok=True)
            path.touch()
            path.unlink()

    def write(self, run: Run) -> Path:
        """Writes the run once, atomically; returns its path.

        A taken run id is replaced by a fresh one.
        """
        folder = self.root / run.machine / (run.cell_id or run.cell.id)

        while True:
            path = folder / f"{run.run_id}.json"
            if self._write_once(path, dumps(run.to_json())):
                return path

            run = dataclasses.replace(run, run_id=new_run_id())

    def write_environment(self, machine: str, environment: Mapping[str, Any]) -> str:
        """Writes the environment if it is not there yet; returns its id, a hash of its content."""
        # The name is a hash of the content: a file that is there already holds the same.
        name = environment_id(environment)
        document = json.loads(canonical(environment))
        self._write_once(self.root / machine / ENVIRONMENTS / f"{name}.json", dumps(document))

        return name

    def write_calibration(self, machine: str, document: Mapping[str, Any]) -> Path:
        """Writes what was calibrated, once; returns its path.

        `started_at` of the document names the file.
        """
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
        found: list[Run] = []
        foreign: list[_NoRun] = []

        for path in paths:
            stored = _read(path)
            if isinstance(stored, _NoRun):
                foreign.append(stored)
            elif stored is not None:
                found.append(stored.run)

        if foreign:
            self._warn_once(foreign)
        return sorted(
            (run for run in found if seeds is None or run.cell.seed in seeds),
            key=lambda run: run.run_id,
        )

    def missing(
        self, cells: Iterable[Cell], seeds: Sequence[int] | None, code_id: CodeId
    ) -> list[Cell]:
        """Cells with their seed that have no ok, timeout or unsupported run of this code.

        seeds: None = the cells carry theirs. code_id: a text, or a function of the cell, since it
        hashes the files that the cell uses.
        """
        done = set()
        for row in self.rows():
            if row["status"] in DONE:
                done.add((row["cell_id"], row["seed"], row["code_id"]))

        missing = []
        for cell in _with_seeds(cells, seeds):
            if (cell.id, cell.seed, code_of(code_id, cell)) not in done:
                missing.append(cell)
        return missing

    def stale(
        self, cells: Iterable[Cell], seeds: Sequence[int] | None, code_id: CodeId
    ) -> list[columns.Row]:
        """Rows of these cells and seeds that other code has written.

        They stay, and are never drawn with new ones.
        """
        now = {(cell.id, cell.seed): code_of(code_id, cell) for cell in _with_seeds(cells, seeds)}
        stale = []
        for row in self.rows():
            # A row of another cell or seed is as new as it is.
            current = now.get((row["cell_id"], row["seed"]), row["code_id"])
            if current != row["code_id"]:
                stale.append(row)
        return stale

    def rows(self) -> list[columns.Row]:
        """One row per run with the keys of `columns.COLUMNS`, in the order of the run ids."""
        environments: dict[tuple[str, str], dict[str, Any]] = {}
        rows = []

        for entry in self._indexed().values():
            machine = entry["machine"]
            environment_id = entry["environment_id"]
            if (machine, environment_id) not in environments:
                environments[machine, environment_id] = self.environment(machine, environment_id)
            environment = environments[machine, environment_id]
            values = dict(zip(columns.COLUMNS, entry["values"], strict=True))
            values["commit"] = environment.get("commit")
            values["dirty"] = environment.get("dirty")
            rows.append(values)

        return sorted(rows, key=lambda values: values["run_id"])

    def frame(self) -> pd.DataFrame:
        """The tidy table, one row per run, nullable types (Int64, Float64, string, boolean)."""
        import pandas as pd

        types = {"str": "string", "int": "Int64", "float": "Float64", "bool": "boolean"}
        rows = self.rows()
        series = {}

        for name, kind in columns.COLUMNS.items():
            column = [values[name] for values in rows]
            series[name] = pd.array(column, dtype=types[kind])  # type: ignore[call-overload]

        return pd.DataFrame(series)

    def _files(self) -> Iterator[Path]:
        """Candidates for run files: `<machine>/<cell id>/*.json`.

        Hidden names and folders without runs are left out.
        """
        for machine in _folders(self.root):
            for cell_folder in _folders(machine):
                if cell_folder.name in (ENVIRONMENTS, CALIBRATIONS, GPU_CHECKS):
                    continue
                for path in _entries(cell_folder):
                    if path.suffix == ".json" and not path.name.startswith("."):
                        yield path

    def _indexed(self) -> dict[str, dict[str, Any]]:
        """File name -> {stamp, machine, environment_id, values}.

        Only new or changed files are parsed; the cache holds the others.
        """
        cached = self._load_cache()
        now = _Cache()

        for path in self._files():
            name = str(path.relative_to(self.root))
            stamp = _stamp(path)
            if stamp is None:
                continue

            if cached.foreign.get(name) == stamp:
                now.foreign[name] = stamp
                continue

            # A file whose stamp is unchanged is not read again.
            entry = cached.files.get(name)

            if entry is None or entry["stamp"] != stamp:
                stored = _read(path)
                if stored is None:
                    continue

                if isinstance(stored, _NoRun):
                    stored.warn()
                    if stored.stamp is not None:
                        now.foreign[name] = stored.stamp
                    continue

                entry = {
                    "stamp": stored.stamp,
                    "machine": path.parts[-3],
                    "environment_id": stored.run.environment_id,
                    "values": stored.values,
                }

            now.files[name] = entry

        if now != cached:
            # Written only where something has changed: a read-only look leaves no trace.
            self._save_cache(now)
        return now.files

    def _warn_once(self, foreign: Sequence[_NoRun]) -> None:
        """Warns of those that the cache does not know as foreign, and remembers them there."""
        cache = self._load_cache()
        news = False

        for each in foreign:
            name = str(each.path.relative_to(self.root))
            if each.stamp is None or cache.foreign.get(name) != each.stamp:
                each.warn()

            if each.stamp is not None and cache.foreign.get(name) != each.stamp:
                cache.foreign[name] = each.stamp
                news = True

        if news:
            self._save_cache(cache)

    def _load_cache(self) -> _Cache:
        """The cache; an empty one where there is none, or where other code has written it."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            document = json.loads((self.root / CACHE).read_text(encoding="utf-8"))
            if document["key"] == _cache_key():
                return _Cache(document["files"], document["foreign"])

        return _Cache()

    def _save_cache(self, cache: _Cache) -> None:
        """The cache is a convenience: a folder that cannot be written is read without one."""
        document = {"key": _cache_key(), "files": cache.files, "foreign": cache.foreign}

        with contextlib.suppress(OSError):
            temporary = self.root / f"{CACHE}.{os.getpid()}-{secrets.token_hex(4)}"
            try:
                temporary.write_text(json.dumps(document), encoding="utf-8")
                temporary.replace(self.root / CACHE)
            finally:
                temporary.unlink(missing_ok=True)

    def _write_once(self, path: Path, text: str) -> bool:
        """Writes a file whole, once: False where the name is taken.

        A temporary file in the same folder is synchronised to disk and then linked to the name.
        """
        temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"

        with self._one_clear_error():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Hidden by its name until it is complete: readers leave out what begins with a dot.
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
        """Turns any OSError inside into a StoreError that says what to do."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"results folder {self.root} cannot be written: {os.strerror(error.errno or 0)}; "
                "nothing half-written was "
                "left. Free space or rights there, or choose another folder with --results DIR"
            ) from error


def _publish(temporary: Path, path: Path) -> bool:
    """Gives a complete temporary file its name; False where the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False

        # Another writer of the same name would be lost here; run ids have 32 random bits.
        temporary.replace(path)

    descriptor = os.open(path.parent, os.O_RDONLY)

    try:
        os.fsync(descriptor)  # the name survives a power cut too
    finally:
        os.close(descriptor)

    return True


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; nothing where it cannot be read or is gone."""
    with contextlib.suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _folders(root: Path) -> list[Path]:
    """The folders inside a folder, hidden ones left out."""
    return [entry for entry in _entries(root) if entry.is_dir() and not entry.name.startswith(".")]


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A run, its row in the order of `columns.COLUMNS`, and its file's stamp before the reading."""

    run: Run
    values: list[Any]
    stamp: _Stamp


def _stamp(path: Path) -> _Stamp | None:
    """The mtime and size of a file; None where it was deleted after it was listed."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None

    return [status.st_mtime_ns, status.st_size]


def _read(path: Path) -> _Stored | _NoRun | None:
    """The run in a file with its row; None where the file is gone."""
    stamp = None

    try:
        stamp = _stamp(path)
        if stamp is None:
            return None

        run = Run.parse(json.loads(path.read_text(encoding="utf-8")))
        row = columns.row(run)
        values = [columns.typed(name, row[name]) for name in columns.COLUMNS]
        return _Stored(run, values, stamp)
    except FileNotFoundError:
        return None
    except OSError as error:
        return _NoRun(path, str(error), None)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        return _NoRun(path, str(error), stamp)


def _with_seeds(cells: Iterable[Cell], seeds: Sequence[int] | None) -> list[Cell]:
    """The cells with each of the seeds; as they are where no seeds are given."""
    if seeds is None:
        return list(cells)
    seeded = []
    for cell in cells:
        seeded += [cell.with_seed(seed) for seed in seeds]
    return seeded


def code_of(code_id: CodeId, cell: Cell) -> str:
    """The code id of a cell."""
    return code_id if isinstance(code_id, str) else code_id(cell)


def _cache_key() -> str:
    """A hash of the code that makes rows and writes the cache.

    An old cache is so never read by new code.
    """
    from benchsuite.plan import cell, hashing
    from benchsuite.results import record

    modules = (columns, record, cell, hashing)
    sources = [__file__, *(str(module.__file__) for module in modules)]
    return checksum(b"".join(Path(source).read_bytes() for source in sources))[:16]
