"""Finds members (workloads, strategies, topologies ..) and reads their files without importing.

A member is one file that defines a class named after its folder (`Workload`, `Parallel`,
`Strategy`, `Topology`, `Compression`, `Cluster`). The fields of that class are its options: each
has a type, a literal default and one line of help under it. Its other literal attributes are what
the member declares (`benchsuite/plan/declared.py`). A workload's `presets` is a dict literal of the
module. All of that is read with `ast`, so that `list`, `plan` and cell ids need no torch; `load`
imports the file.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import math
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from types import MappingProxyType
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan.hashing import checksum

PACKAGE = Path(__file__).resolve().parents[1]

# Inside the package where it is installed; beside it in a clone.
WORKLOADS = next(
    path for path in (PACKAGE / "workloads", PACKAGE.parent / "workloads") if path.is_dir()
)

# kind -> (folder, module prefix, class name)
KINDS: Mapping[str, tuple[Path, str, str]] = MappingProxyType(
    {
        "workload": (WORKLOADS, "benchsuite.workloads", "Workload"),
        "parallel": (PACKAGE / "parallel", "benchsuite.parallel", "Parallel"),
        "sync": (PACKAGE / "sync", "benchsuite.sync", "Strategy"),
        "topology": (PACKAGE / "topology", "benchsuite.topology", "Topology"),
        "compression": (PACKAGE / "compression", "benchsuite.compression", "Compression"),
        "cluster": (PACKAGE / "cluster", "benchsuite.cluster", "Cluster"),
    }
)


class PluginError(UsageError):
    """An unknown member or option, or a file that is no plug-in; the message says what is known."""


@dataclass(frozen=True)
class Option:
    """One field of a plug-in's class."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class Plugin:
    """What can be known of a plug-in without importing it."""

    kind: str
    name: str
    path: Path
    summary: str
    options: Mapping[str, Option]
    presets: Mapping[str, Mapping[str, Any]]
    constants: Mapping[str, Any]  # literal class attributes without annotation, e.g. survives
    given_by_path: bool
    digest: str  # sha256 of the file's bytes

    def resolve_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every option with its value, defaults filled in.

        given: values as a plan or a preset states them. Raises PluginError for an unknown option,
        with the known ones, and for a value of another type.
        """
        for key in given:
            if key not in self.options:
                raise PluginError(unknown("option", key, self.options, of=self.name))

        values = {}

        for name, option in self.options.items():
            value = given.get(name, option.default)
            values[name] = _checked(self.name, option, value)

        return values


@lru_cache(maxsize=1024)
def stem(reference: str) -> str:
    """The member's name: a path's file name without `.py`, or the name itself.

    It is what options are given under, so a user's file is addressed as a member is.
    """
    return Path(reference).stem if is_path(reference) else reference


def unknown(what: str, value: object, known: Iterable[str], *, of: str = "") -> str:
    """`unknown option 'lok' of asynchronous; did you mean 'lock'? known: ...`, nearest first.

    what: the sort of thing that is not known. known: all that could have been meant. of: whose they
    are, "" = nobody's.
    """
    names = list(known)
    # A cutoff of 0 keeps every name; what matters here is their order.
    near = difflib.get_close_matches(str(value), names, n=len(names) or 1, cutoff=0.0)
    ordered = near + sorted(set(names) - set(near))
    owner = f" of {of}" if of else ""
    if not ordered:
        return f"unknown {what} {value!r}{owner}: it has none"

    # A guess is offered only where it is a near one: a far one reads like mockery.
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"unknown {what} {value!r}{owner}{hint} known: {', '.join(ordered)}"


def names(kind: str) -> list[str]:
    """Members of a kind that ship with the suite: the files of its folder that define its class.

    Sorted by name. A user's file stands in no list; it is given by its path.
    """
    folder, _, class_name = KINDS[kind]
    found = []
    for path in sorted(folder.glob("*.py")):
        # Helpers stand in the same folders; the class tells them apart.
        if not path.name.startswith("_") and _defines(path, class_name):
            found.append(path.stem)
    return found


def find(kind: str, reference: str) -> Plugin:
    """A member by file name (`ring`) or by path (`/home/me/my_net.py`).

    kind: one of `KINDS`. Raises PluginError where there is none, with the known names, and where
    the file defines no class of that kind. Nothing is imported.
    """
    by_path = is_path(reference)
    # The working directory is part of the question for paths: a cached answer must not outlive a
    # change of folder.
    folder = os.getcwd() if by_path else str(KINDS[kind][0])
    path = _place(reference, folder, by_path)

    # The time of the last change is part of the cache's key: an edited file is read anew, as in a
    # notebook.
    changed_ns = _changed_ns(path)
    if by_path and changed_ns is None:
        known = ", ".join(names(kind))
        raise PluginError(
            f"{kind} {reference!r}: no such file; give an existing .py file or one of: {known}"
        )

    if changed_ns is None or (reference.startswith("_") and not by_path):
        raise PluginError(unknown(kind, reference, names(kind)))
    return _read(kind, path, changed_ns, by_path)


def _changed_ns(path: Path) -> int | None:
    """When a file was last changed; None where there is no file. One look at it for both."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns if S_ISREG(status.st_mode) else None


@lru_cache(maxsize=1024)
def _place(reference: str, folder: str, by_path: bool) -> Path:
    """Where a reference leads from a folder: the working directory for paths, a kind's for names.

    It is cached, because it is asked a hundred thousand times and follows symbolic links.
    """
    if by_path:
        return (folder / Path(reference).expanduser()).resolve()
    return Path(folder, f"{reference}.py")


def load(kind: str, reference: str) -> type[Any]:
    """Imports the file and returns its class.

    Raises PluginError where there is none; what the file itself raises passes through.
    """
    plugin = find(kind, reference)
    _, prefix, class_name = KINDS[kind]
    if not plugin.given_by_path:
        if kind == "workload":
            _make_workloads_importable()

        module = importlib.import_module(f"{prefix}.{plugin.name}")
    else:
        # With the digest in its name an edited file is a new module, and two users' files of one
        # name do not meet.
        module_name = f"benchsuite_user_{kind}_{plugin.name}_{plugin.digest[:8]}"
        module = _import_path(module_name, plugin.path)

    loaded: type[Any] = getattr(module, class_name)
    return loaded


def _make_workloads_importable() -> None:
    """In a clone that nobody installed, `benchsuite.workloads` is the folder beside the package."""
    name = KINDS["workload"][1]

    # Two threads that find the module missing would both execute it, and have two classes of one
    # name.
    with _importing:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            _execute(name, WORKLOADS / "__init__.py")


_importing = (
    threading.RLock()
)  # thread ranks load at once; one must not see another's half-imported module


def _import_path(module_name: str, path: Path) -> Any:
    """The module of a file, imported once per process."""
    with _importing:
        return sys.modules.get(module_name) or _execute(module_name, path)


def module_of(package: str, path: Path) -> Any:
    """The imported module of a file: of a package, or of a user's folder where `package` is "".

    package: its dotted name. For files beside the members that are plug-ins of another sort.
    """
    if package:
        return importlib.import_module(f"{package}.{path.stem}")
    digest = checksum(path.read_bytes())[:8]
    return _import_path(f"benchsuite_user_{path.stem}_{digest}", path)


def _execute(module_name: str, path: Path) -> Any:
    """Runs a file as a module of the given name. A package's `__init__.py` finds its siblings."""
    folders = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(
        module_name, path, submodule_search_locations=folders
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up here

    try:
        spec.loader.exec_module(module)
    except BaseException:
        # Half a module must not be found by the next import, which would miss names without a
        # reason.
        del sys.modules[module_name]
        raise

    return module


def is_path(reference: str) -> bool:
    """Whether a reference is a path (`my_net.py`, `nets/mine.py`) rather than a member's name.

    The disk is not asked: what a reference means must not depend on which files lie about.
    """
    return reference.endswith(".py") or "/" in reference


@lru_cache(maxsize=256)
def _parse(path: Path, mtime_ns: int) -> ast.Module:
    """The syntax tree of a file, kept until the file changes. Raises PluginError with the line."""
    del mtime_ns  # part of the cache key only
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise PluginError(f"{path}: line {error.lineno}: {error.msg}") from error


def _defines(path: Path, class_name: str) -> bool:
    """Whether a file defines the class at its top level.

    Most files that do not are told by their text, which is cheaper than parsing them.
    """
    if f"\nclass {class_name}" not in "\n" + path.read_text(encoding="utf-8"):
        return False
    return _class_of(_parse(path, path.stat().st_mtime_ns), class_name) is not None


def _class_of(tree: ast.Module, class_name: str) -> ast.ClassDef | None:
    """The class of this name at the top level of a file; None where there is none."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return node
    return None


@lru_cache(maxsize=256)
def _read(kind: str, path: Path, mtime_ns: int, by_path: bool) -> Plugin:
    """What a member's file says, without importing it.

    mtime_ns and the other arguments are the key of the cache. Raises PluginError where the file
    does not say it as it should.
    """
    class_name = KINDS[kind][2]
    tree = _parse(path, mtime_ns)
    node = _class_of(tree, class_name)
    if node is None:
        raise PluginError(f"{path} defines no class {class_name}; a {kind} file needs one")

    # The first paragraph, on one line, is what lists show.
    document = ast.get_docstring(tree) or ast.get_docstring(node) or ""
    summary = " ".join(document.strip().split("\n\n")[0].split())
    options, constants = _fields(node, path)
    presets = _presets(tree, path)

    # Of the bytes, not of the tree: a comment may tell a reader of the results something.
    digest = checksum(path.read_bytes())

    return Plugin(
        kind=kind,
        name=path.stem,
        path=path,
        summary=summary,
        options=options,
        presets=presets,
        constants=constants,
        given_by_path=by_path,
        digest=digest,
    )


def _fields(node: ast.ClassDef, path: Path) -> tuple[dict[str, Option], dict[str, Any]]:
    """The options and the declarations of a class, by their names.

    An annotated field with a default is an option; a literal without annotation, or one that is a
    ClassVar, is declared. Raises PluginError for an option whose default is no literal.
    """
    options: dict[str, Option] = {}
    constants: dict[str, Any] = {}

    for position, item in enumerate(node.body):
        if (
            isinstance(item, ast.Assign)
            and len(item.targets) == 1
            and isinstance(item.targets[0], ast.Name)
        ):
            try:
                # What is computed is no declaration, and is not for us to know.
                constants[item.targets[0].id] = ast.literal_eval(item.value)
            except ValueError:
                continue

        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue

        name = item.target.id
        annotation = ast.unparse(item.annotation)

        if "ClassVar" in annotation and item.value is not None:
            with contextlib.suppress(ValueError):
                constants[name] = ast.literal_eval(item.value)

        if name.startswith("_") or "ClassVar" in annotation or item.value is None:
            continue

        try:
            # Refused rather than passed over: without a default in the cell's id, an edited default
            # would change runs and not their names.
            default = ast.literal_eval(item.value)
        except ValueError as error:
            text = ast.unparse(item.value)
            raise PluginError(
                f"{path}: option {name!r} needs a literal default, not {text}"
            ) from error

        # Python keeps no text of a field at run time; in the source it is the next statement.
        following = node.body[position + 1] if position + 1 < len(node.body) else None
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())

        options[name] = Option(name=name, type=annotation, default=default, help=text)

    return options, constants


def _presets(tree: ast.Module, path: Path) -> dict[str, dict[str, Any]]:
    """The presets of a workload, which have to be a literal; {} where the file has none."""
    for item in tree.body:
        target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", None)
        if (
            isinstance(item, (ast.Assign, ast.AnnAssign))
            and isinstance(target, ast.Name)
            and target.id == "presets"
        ):
            try:
                value: dict[str, dict[str, Any]] = (
                    ast.literal_eval(item.value) if item.value else {}
                )
            except ValueError as error:
                raise PluginError(f"{path}: presets must be a dict literal") from error

            return value

    return {}


_NUMBERS = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def _checked(owner: str, option: Option, value: Any) -> Any:
    """The value in the option's type; PluginError where it has another.

    A type that is none of the plain ones is not checked here: the member does it when it starts.
    """
    base = option.type.replace(" ", "").removesuffix("|None")
    if value is None and option.default is None:
        return None

    if base.startswith("Literal["):
        allowed = ast.literal_eval(base[len("Literal[") : -1] + ",")
        if value not in allowed:
            raise PluginError(
                unknown(
                    f"value of option {option.name!r}", value, [str(a) for a in allowed], of=owner
                )
            )

        return value

    allowed_types = _NUMBERS.get(base)
    if allowed_types is None:
        return value

    # True is an int for Python, and would pass for a number of workers.
    if isinstance(value, bool) != (base == "bool") or not isinstance(value, allowed_types):
        raise PluginError(
            f"option {option.name!r} of {owner} takes {base}, not {value!r} "
            f"({type(value).__name__})"
        )

    if isinstance(value, float) and not math.isfinite(value):
        raise PluginError(f"option {option.name!r} of {owner} takes a finite number, not {value!r}")

    # 1 and 1.0 are one value, and give one id.
    return float(value) if base == "float" else value
