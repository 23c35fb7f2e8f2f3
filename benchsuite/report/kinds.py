"""Kinds of figures and tables: one file each in figures/ and tables/, found by its file name.

A kind's file declares what a plan may say of it, and has one function that makes it:

    KIND = Kind(title="How stale are the gradients?", clock="wall", place=40)

    def draw(spec, material):      # figures: a list of drawings
    def tabulate(spec, material):  # tables: one `printed.Table`

The declaration holds literals only. It is read with `ast`, so that a plan is checked without
importing matplotlib or pandas; `load` imports the file. A plan may also name a file of its own by
path (`kind = "./my_figure.py"`), which is an equal of those here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan import plugins
from benchsuite.plan.hashing import checksum

_HERE = Path(__file__).resolve().parent
_FOLDERS = ("figures", "tables")
_CLOCKS = {
    "wall": frozenset({"wall"}),
    "virtual": frozenset({"virtual"}),
    "both": frozenset({"wall", "virtual"}),
}


@dataclass(frozen=True)
class Kind:
    """What a figure's or a table's file declares, in literals."""

    title: str
    """Its heading on the page, where the plan gives none."""
    clock: str = "wall"
    """Whose runs it shows: "wall", "virtual" or "both". It is handed the material of that clock;
    with "both" that of the wall clock, which knows the other."""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What a plan may say besides kind, title, name and where: key -> its possible values. Without
    the key it gets all of them."""
    only_asked: tuple[str, ...] = ()
    """Values that it gets only where the plan names them."""
    place: int | None = None
    """Where it stands on the page of a plan that names no figures; None: it does not."""
    not_where_all: Mapping[str, Any] = field(default_factory=dict)
    """Left out of such a page where every cell has this value in this field."""

    @property
    def clocks(self) -> frozenset[str]:
        """The clocks whose runs it shows."""
        return _CLOCKS[self.clock]


@dataclass(frozen=True)
class Declared:
    """A kind, the function that makes it, and the file in which both stand."""

    kind: Kind
    function: str  # "draw" or "tabulate"
    path: Path

    @property
    def is_table(self) -> bool:
        """Whether it makes a table, which has a row also for a cell without runs."""
        return self.function == "tabulate"


def names() -> list[str]:
    """The kinds that ship with the suite, by name."""
    files = (path for folder in _FOLDERS for path in (_HERE / folder).glob("*.py"))
    return sorted(path.stem for path in files if path.name != "__init__.py")


def of_a_plain_page() -> list[str]:
    """The kinds on the page of a plan that names no figures, in their order there."""
    places = {name: find(name).kind.place for name in names()}
    placed = {name: place for name, place in places.items() if place is not None}
    return sorted(placed, key=lambda name: placed[name])


def find(reference: str) -> Declared:
    """The kind of that name, or in the file at that path. UsageError names what is known."""
    if plugins.is_path(reference):
        path = Path(reference).expanduser().resolve()

        if not path.is_file():
            raise UsageError(
                f"figure kind {reference!r}: no such file; give an existing .py file or one of: "
                f"{', '.join(names())}"
            )

        return _read(path, path.stat().st_mtime_ns)

    for folder in _FOLDERS:
        path = _HERE / folder / f"{reference}.py"
        if reference in names() and path.is_file():
            return _read(path, path.stat().st_mtime_ns)

    raise UsageError(plugins.unknown("figure kind", reference, names()))


def load(reference: str) -> Callable[..., Any]:
    """Imports the kind's file and returns its `draw` or `tabulate`."""
    declared = find(reference)

    if plugins.is_path(reference):
        module = _import_path(declared.path)
    else:
        folder = declared.path.parent.name
        module = importlib.import_module(f"benchsuite.report.{folder}.{reference}")

    function: Callable[..., Any] = getattr(module, declared.function)
    return function


def _import_path(path: Path) -> Any:
    """A user's file, imported once for each content that it had."""
    digest = checksum(path.read_bytes())
    name = f"benchsuite_user_figure_{path.stem}_{digest[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here

    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise

    return module


@lru_cache(maxsize=256)
def _read(path: Path, mtime_ns: int) -> Declared:
    """The declaration in a file, without importing it."""
    del mtime_ns  # part of the cache key only

    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise UsageError(f"{path}: line {error.lineno}: {error.msg}") from error

    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    functions = sorted(defined & {"draw", "tabulate"})

    if len(functions) != 1:
        raise UsageError(
            f"{path} defines {' and '.join(functions) or 'neither draw nor tabulate'}; a figure "
            "kind has one function of the two, draw(spec, material) or tabulate(spec, material)"
        )

    return Declared(_kind(tree, path), functions[0], path)


def _kind(tree: ast.Module, path: Path) -> Kind:
    """`KIND = Kind(...)` of a file; UsageError where it is missing or not literal."""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "KIND"
            and isinstance(node.value, ast.Call)
        ):
            return _checked(_literals(node.value, path), path)

    raise UsageError(
        f'{path} declares no figure kind; write KIND = Kind(title="...", clock="wall") at its top'
    )


def _literals(call: ast.Call, path: Path) -> dict[str, Any]:
    """The keyword arguments of the declaration."""
    if call.args:
        raise UsageError(f"{path}: Kind takes keywords, not {ast.unparse(call.args[0])}")
    known = [each.name for each in fields(Kind)]
    values = {}

    for keyword in call.keywords:
        if keyword.arg not in known:
            raise UsageError(
                f"{path}: {plugins.unknown('argument', keyword.arg, known, of='Kind')}"
            )
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as error:
            text = ast.unparse(keyword.value)
            raise UsageError(f"{path}: {keyword.arg} needs a literal, not {text}") from error

    return values


def _checked(values: dict[str, Any], path: Path) -> Kind:
    if "title" not in values:
        raise UsageError(f"{path}: Kind needs a title, the kind's heading on a page")
    kind = Kind(**values)
    if kind.clock not in _CLOCKS:
        raise UsageError(f"{path}: {plugins.unknown('clock', kind.clock, _CLOCKS)}")
    return kind
