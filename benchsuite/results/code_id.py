"""`code_id`: a hash of the code that a cell's numbers come from. Editing it makes the cell's runs missing again.

Counted is every Python file of the project that the cell's run can reach by import: from its members, from the life of
a rank (under the virtual clock: from the simulator), from the cluster engine that starts the ranks, and from what makes
a run of the files that they leave. Imports are followed from file to file without running any of them: those at the top
of a file and those inside its functions, whether or not a run gets there. To import `a.b.c` executes `a/__init__.py` and
`a/b/__init__.py`, so these count too.

Three kinds of imports are not followed, because importing the file does not execute them:

- those under `if TYPE_CHECKING:`, which only type checkers read;
- those under `if __name__ == "__main__":`; which modules are started as a process is said in `ROOTS`;
- those of a module's `__getattr__`, unless somebody asks the module for a name that is not one of its files
  (`from benchsuite import run` asks, `from benchsuite import cell` does not).

Modules that are named by a string are not followed either. Members are loaded so, and the cell itself says which; all
others that a run needs are in `ROOTS`. Members that a cell does not use, reports, analyses and the command line
therefore do not count, unless a file that counts imports them. A file counts with all its bytes, comments included.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from benchsuite.plan import members, plugins
from benchsuite.plan.cell import AXES, Cell

# Where a run starts, beside the files of its members: modules that become processes, or that `api` calls.
ROOTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "rank": ("benchsuite.worker.main",),  # the life of a real rank
        "simulator": ("benchsuite.cluster.simulator",),  # all ranks of a cell of the virtual clock
        "assembly": ("benchsuite.results.assemble",),  # makes one run of the files of real ranks
        "tuning": ("benchsuite.run.tune",),  # how trials choose, for cells with tuning = per_strategy
        "rules": ("benchsuite.rules",),  # what refuses a cell
        # Of a cluster engine, by its name: what starts the ranks of a cell, and what says how they ended.
        "local": ("benchsuite.cluster.host",),
        "torchrun": ("benchsuite.cluster.supervisor", "benchsuite.cluster.collect"),
    }
)


def code_id(cell: Cell) -> str:
    """`Tree.code_id` of the files as they were when this process first asked for one."""
    return _first_tree().code_id(cell)


def rules_id(cell: Cell) -> str:
    """`Tree.rules_id` of the files as they were when this process first asked for one."""
    return _first_tree().rules_id(cell)


@functools.cache
def _first_tree() -> Tree:
    return Tree()


class Tree:
    """The project's files at one moment, joined by their imports. A file is read once, when it is first reached.

    read: gives the bytes of a file; a test may hand in other bytes.
    """

    def __init__(self, read: Callable[[Path], bytes] = Path.read_bytes) -> None:
        self._read = read
        self._paths = _project_files()
        self._files: dict[str, _File] = {}
        self._reached: dict[frozenset[str], frozenset[str]] = {}  # by the modules that a search began with
        self._digests: dict[frozenset[str], str] = {}  # by modules

    @property
    def paths(self) -> Mapping[str, Path]:
        """Module -> its file, of the whole project."""
        return MappingProxyType(self._paths)

    def code_id(self, cell: Cell) -> str:
        """First 12 hex digits of sha256 over names and contents of `reach(cell)`. No machine's path is in it."""
        return self._digest(self.reach(cell))

    def rules_id(self, cell: Cell) -> str:
        """What a refusal of the cell depends on; a refusal by older rules does not stand for a run.

        Over all that the rules import, and the files of the cell's members, whose class attributes the rules read.
        """
        return f"rules-{self._digest(self._reach(ROOTS['rules']) | set(self._members(cell)))}"

    def reach(self, cell: Cell) -> frozenset[str]:
        """The modules that the cell's run can reach by import. A user's file is named like `sync:its_name`."""
        begin = self._members(cell)
        if cell.clock == "virtual":
            begin += ROOTS["simulator"]
        else:
            begin += ROOTS["rank"] + ROOTS["assembly"] + ROOTS.get(plugins.stem(cell.cluster), ())
            begin += self._member("cluster", cell.cluster)
        if cell.tuning == "per_strategy":
            begin += ROOTS["tuning"]
        return self._reach(begin)

    def imports(self, module: str) -> frozenset[str]:
        """The modules of the project that one file imports, and the packages that they are in."""
        return frozenset(self._executed(self._file(module).imports)) - {module}

    # -- members -------------------------------------------------------------------------------

    def _members(self, cell: Cell) -> tuple[str, ...]:
        """Modules of the cell's members; a member that this version has no file for has none."""
        return tuple(name for axis in AXES for name in self._member(axis, getattr(cell, axis)))

    def _member(self, kind: str, reference: str) -> tuple[str, ...]:
        member = members.find(kind, reference)
        if member is None:
            return ()
        if not member.given_by_path:
            return (f"{plugins.KINDS[kind][1]}.{member.name}",)
        names = []
        for path in _files_of_user(member):
            name = f"{kind}:{path.stem}"
            self._files.setdefault(name, _File.parse(self._read(path), name, path))
            names.append(name)
        return tuple(names)

    # -- the graph -----------------------------------------------------------------------------

    def _reach(self, begin: Iterable[str]) -> frozenset[str]:
        """The given modules, their packages, and all that these import, and so on."""
        begin = frozenset(begin)
        if begin not in self._reached:
            # A name asked of a module with a `__getattr__` is a node of its own, `module.__getattr__`.
            found: set[str] = set()
            waiting = [package for module in begin for package in self._with_packages(module)]
            while waiting:
                name = waiting.pop()
                if name not in found:
                    found.add(name)
                    module = name.removesuffix(_ASKED)
                    file = self._file(module)
                    waiting += self._executed(file.imports if module == name else file.when_asked)
            self._reached[begin] = frozenset(name for name in found if not name.endswith(_ASKED))
        return self._reached[begin]

    def _with_packages(self, module: str) -> list[str]:
        """A module that something starts with, after the packages that it is in."""
        if module in self._files:
            return [module] if ":" in module else self._executed([module])
        if module not in self._paths:
            raise LookupError(
                f"{module} is no module of the project, and code_id starts with it: "
                f"name the one that took its place in ROOTS of {Path(__file__).name}"
            )
        return self._executed([module])

    def _executed(self, names: Iterable[str]) -> list[str]:
        """What importing dotted names executes: a module, the packages around it, a `__getattr__` that is asked."""
        executed = []
        for name in names:
            parts = name.split(".")
            prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            modules = [prefix for prefix in prefixes if prefix in self._paths]
            executed += modules
            if modules and modules[-1] != name and self._file(modules[-1]).when_asked:
                executed.append(modules[-1] + _ASKED)
        return executed

    def _file(self, module: str) -> _File:
        if module not in self._files:
            path = self._paths[module]
            self._files[module] = _File.parse(self._read(path), module, path)
        return self._files[module]

    def _digest(self, modules: frozenset[str]) -> str:
        if modules not in self._digests:
            digest = hashlib.sha256()
            for module in sorted(modules):
                digest.update(f"{module}\0{self._file(module).digest}\0".encode())
            self._digests[modules] = digest.hexdigest()[:12]
        return self._digests[modules]


_ASKED = ".__getattr__"


def _files_of_user(member: plugins.Plugin) -> tuple[Path, ...]:
    """The files of a member that is given by path: that file alone.

    What it imports of the project is followed. What it imports from elsewhere, its own neighbours included, is not.
    """
    return (member.path,)


def _project_files() -> dict[str, Path]:
    """Module -> file of the package and of the folders of its members, wherever these are."""
    folders = {plugins.PACKAGE.name: plugins.PACKAGE}
    folders |= {prefix: folder for folder, prefix, _ in plugins.KINDS.values()}
    found = {}
    for prefix, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return found


class _File(NamedTuple):
    """One file. Imports are dotted names: `from a.b import c` is `a.b.c`, `import a.b` is `a.*` and `a.b.*`."""

    digest: str
    imports: tuple[str, ...]
    when_asked: tuple[str, ...]  # those of a `__getattr__` of the module

    @classmethod
    def parse(cls, content: bytes, module: str, path: Path) -> _File:
        """Reads the imports of a file. PluginError where it is no Python."""
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        try:
            return _parsed(content, package)
        except SyntaxError as error:
            raise plugins.PluginError(f"{path}: line {error.lineno}: {error.msg}") from error


@functools.lru_cache(maxsize=1024)
def _parsed(content: bytes, package: str) -> _File:
    """Remembered by content, so that the next tree of this process parses only what has changed."""
    asked, others = [], []
    for statement in ast.parse(content).body:
        is_getattr = isinstance(statement, ast.FunctionDef) and statement.name == "__getattr__"
        (asked if is_getattr else others).append(statement)
    names = (tuple(_imported(statements, package)) for statements in (others, asked))
    return _File(hashlib.sha256(content).hexdigest(), *names)


def _imported(statements: Sequence[ast.AST], package: str) -> Iterator[str]:
    """Names that the statements, and those inside them, import when they are executed."""
    for node in statements:
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield from (".".join([*parts[:end], "*"]) for end in range(1, len(parts) + 1))
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, package)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and _is_false_on_import(node.test):
            yield from _imported(node.orelse, package)
        else:  # import is a statement, so expressions are not looked at: that is most of the tree
            for field in ("body", "orelse", "handlers", "finalbody", "cases"):
                yield from _imported(getattr(node, field, ()), package)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that names are imported from; one dot in front is the package, each further one the next outer."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - (node.level - 1)]
    return ".".join([*base, node.module] if node.module else base)


def _is_false_on_import(test: ast.expr) -> bool:
    """Whether a condition is `TYPE_CHECKING` or `__name__ == "__main__"`."""
    if isinstance(test, ast.Compare) and getattr(test.left, "id", "") == "__name__":
        return ast.unparse(test) == "__name__ == '__main__'"
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"
