"""`code_id`: a hash of the code that a cell's numbers come from.

Editing that code makes the runs of the cell missing again. Counted is every Python file of the
project that the cell's run can reach by import: from its members, from the life of a rank (under
the virtual clock: from the simulator), from the cluster engine that starts the ranks, and from what
makes a run of the files that the ranks leave. Imports are followed from file to file without
running any of them: those at the top of a file and those inside its functions, whether or not a run
gets there. To import `a.b.c` executes `a/__init__.py` and `a/b/__init__.py`, so these count too.

Three kinds of imports are not followed, because importing the file does not execute them:

- those under `if TYPE_CHECKING:`, which only type checkers read;
- those under `if __name__ == "__main__":`, because no rank runs that file as a program (`ROOTS` has
  the modules that do become processes);
- those in a module's `__getattr__`, unless somebody asks that module for a name that is not one of
  its files: `from benchsuite import load_results` asks, `from benchsuite import plan` does not.

Modules that are named by a string are not followed either. Members are loaded in this way, and the
cell itself says which; a cluster engine says which modules it starts (`processes`), and all others
that a run needs are in `ROOTS`. So the members that a cell does not use, the reports, the analyses
and the command line do not count, unless a file that counts imports them. A file counts with all
its bytes, comments included.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from benchsuite.plan import declared, plugins
from benchsuite.plan.cell import AXES, Cell
from benchsuite.plan.hashing import checksum

# Where a run starts, beside the files of its members: modules that become processes, and those that
# make a run of what these leave.
ROOTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "rank": ("benchsuite.worker.main",),  # the life of a real rank
        # all ranks of a cell of the virtual clock
        "simulator": ("benchsuite.cluster.simulator_process",),
        "assembly": ("benchsuite.results.assemble",),  # makes one run of the files of real ranks
        # How trials choose, for cells with tuning = per_strategy.
        "tuning": ("benchsuite.running.tune",),
    }
)


RULES = "benchsuite.rules"  # the folder with all that refuses a cell
_ASKED = ".__getattr__"


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
    """The project's files at one moment, joined by their imports.

    A file is read once, when it is first reached. read: gives its bytes; a test may give others.
    """

    def __init__(self, read: Callable[[Path], bytes] = Path.read_bytes) -> None:
        self._read = read
        self._paths = _project_files()
        self._files: dict[str, _File] = {}
        self._user_nodes: dict[Path, str] = {}  # what a file given by path is called in the graph
        self._edges: dict[str, list[str]] = {}  # what a node of the graph imports
        self._reached: dict[frozenset[str], frozenset[str]] = {}  # by where the search began
        self._digests: dict[frozenset[str], str] = {}

    @property
    def paths(self) -> Mapping[str, Path]:
        """Module -> its file, of the whole project."""
        return MappingProxyType(self._paths)

    def code_id(self, cell: Cell) -> str:
        """First 12 hex digits of sha256 over the names and contents of `reach(cell)`.

        Names are those of modules, so that the id is the same in every clone and in a wheel.
        """
        return self._digest(self.reach(cell))

    def rules_id(self, cell: Cell) -> str:
        """The same for what a refusal of the cell depends on: the rules and all that they import.

        The files of the cell's members count too, since the rules read their class attributes. A
        refusal by older rules does not stand for a run.
        """
        # A rule is found by its file's name, so no import leads to it.
        rules = [name for name in self._paths if f"{name}.".startswith(f"{RULES}.")]
        return f"rules-{self._digest(self._reach(rules) | set(self._members(cell)))}"

    def reach(self, cell: Cell) -> frozenset[str]:
        """The modules that the cell's run can reach by import.

        A user's file is named by its kind, its own name and its content, like `sync:mine@1f0a..`.
        """
        begin = self._members(cell)

        if cell.clock == "virtual":
            begin += ROOTS["simulator"]
        else:
            begin += ROOTS["rank"] + ROOTS["assembly"] + self._engine(cell.cluster)

        if cell.tuning == "per_strategy":
            begin += ROOTS["tuning"]
        return self._reach(begin)

    def imports(self, module: str) -> frozenset[str]:
        """The modules of the project that one file imports, and the packages that they are in."""
        return frozenset(name for name in self._next(module) if not name.endswith(_ASKED))

    # -- members -------------------------------------------------------------------------------

    def _members(self, cell: Cell) -> tuple[str, ...]:
        """Modules of the cell's members."""
        found: tuple[str, ...] = ()
        for axis in AXES:
            found += self._member(axis, getattr(cell, axis))
        return found

    def _member(self, kind: str, reference: str) -> tuple[str, ...]:
        member = plugins.find(kind, reference)
        if not member.given_by_path:
            return (f"{plugins.KINDS[kind][1]}.{member.name}",)

        return tuple(self._user_node(kind, path) for path in _files_of_user(member))

    def _engine(self, reference: str) -> tuple[str, ...]:
        """The file of a cluster engine, and the modules that it says it starts as processes."""
        return (*self._member("cluster", reference), *declared.cluster(reference).processes)

    def _user_node(self, kind: str, path: Path) -> str:
        if path not in self._user_nodes:
            file = _File.parse(self._read(path), "", path)
            name = f"{kind}:{path.stem}@{file.digest[:16]}"
            self._user_nodes[path] = name
            self._files[name] = file

        return self._user_nodes[path]

    # -- the graph -----------------------------------------------------------------------------

    def _reach(self, begin: Iterable[str]) -> frozenset[str]:
        """The given modules, their packages, and all that these import, and so on."""
        begin = frozenset(begin)

        if begin not in self._reached:
            found: set[str] = set()
            waiting: list[str] = []
            for module in begin:
                waiting += self._start(module)

            while waiting:
                node = waiting.pop()
                if node not in found:
                    found.add(node)
                    waiting += self._next(node)

            self._reached[begin] = frozenset(node for node in found if not node.endswith(_ASKED))

        return self._reached[begin]

    def _start(self, module: str) -> list[str]:
        """A module that a run starts with, after the packages that it is in."""
        if ":" in module:  # a user's file, which is in no package of the project
            return [module]

        if module not in self._paths:
            raise LookupError(
                f"code_id starts with {module}, and the project has no such module: "
                f"put the one that took its place into ROOTS of {Path(__file__).name}"
            )

        return self._executed(module)

    def _next(self, node: str) -> list[str]:
        """What a node of the graph imports; `module.__getattr__` is a node of its own."""
        if node not in self._edges:
            module = node.removesuffix(_ASKED)
            file = self._file(module)
            names = file.imports if node == module else file.when_asked
            executed: set[str] = set()
            for name in names:
                executed.update(self._executed(name))
            self._edges[node] = sorted(executed - {node})

        return self._edges[node]

    def _executed(self, name: str) -> list[str]:
        """What importing a dotted name executes: its packages, the module, a `__getattr__`."""
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        executed = [prefix for prefix in prefixes if prefix in self._paths]
        if executed and executed[-1] != name and self._file(executed[-1]).when_asked:
            executed.append(executed[-1] + _ASKED)
        return executed

    def _file(self, module: str) -> _File:
        if module not in self._files:
            path = self._paths[module]
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            self._files[module] = _File.parse(self._read(path), package, path)

        return self._files[module]

    def _digest(self, modules: frozenset[str]) -> str:
        if modules not in self._digests:
            named = [f"{module}\0{self._file(module).digest}\0" for module in sorted(modules)]
            self._digests[modules] = checksum("".join(named).encode())[:12]

        return self._digests[modules]


def _files_of_user(member: plugins.Plugin) -> tuple[Path, ...]:
    """The files of a member that is given by path: that file alone.

    What it imports of the project is followed; its own neighbours are not.
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
    """What is known of a file.

    Imports are dotted names: `from a.b import c` is `a.b.c`, `import a.b` is `a.*` and `a.b.*` (any
    name of a and of a.b may be asked for).
    """

    digest: str
    imports: tuple[str, ...]
    when_asked: tuple[str, ...]  # those of a `__getattr__` of the module

    @classmethod
    def parse(cls, content: bytes, package: str, path: Path) -> _File:
        """A file by its bytes and the package that it is in. PluginError where it is no Python."""
        try:
            return _parsed(content, package)
        except SyntaxError as error:
            raise plugins.PluginError(f"{path}: line {error.lineno}: {error.msg}") from error


@functools.lru_cache(maxsize=1024)
def _parsed(content: bytes, package: str) -> _File:
    """Remembered by content, so that the next tree of this process parses only what has changed."""
    at_import: list[ast.stmt] = []
    when_asked: list[ast.stmt] = []

    for statement in ast.parse(content).body:
        is_getattr = isinstance(statement, ast.FunctionDef) and statement.name == "__getattr__"
        (when_asked if is_getattr else at_import).append(statement)

    return _File(
        digest=checksum(content),
        imports=tuple(_imported(at_import, package)),
        when_asked=tuple(_imported(when_asked, package)),
    )


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
        else:  # an import is a statement: expressions, most of the tree, are not looked at
            for field in ("body", "orelse", "handlers", "finalbody", "cases"):
                yield from _imported(getattr(node, field, ()), package)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that names are imported from: one dot is the package, two the one around it."""
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
