"""Rooms import in one direction, files in no circle; read with `ast`, lazy and TYPE_CHECKING imports counted."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "benchsuite").rglob("*.py"), *(ROOT / "workloads").glob("*.py")])

# A room may import the rooms before it, never one after it.
ROOMS = (
    "errors",
    "plan",
    "rules",
    "measure",
    "comm",
    "workload",
    "update",
    "topology",
    "compression",
    "parallel",
    "sync",
    "workloads",
    "worker",
    "results",
    "virtual",
    "cluster",
    "analysis",
    "report",
    "running",
    "laws",
    "programs",
    "cli",
)
# Nobody imports these: the package's face, and what `python -m` starts.
DOORS = ("benchsuite", "benchsuite.__main__", "benchsuite.gpu_check", "benchsuite.worker.__main__")

# Siblings that do not know each other, and rooms that know less than all that is before them.
ONLY = {
    "workloads": {"errors", "workload", "workloads"},
    "sync": {"errors", "plan", "comm", "workload", "update", "topology", "compression", "sync"},
    "topology": {"errors", "measure", "comm", "workload", "update", "topology"},
    "compression": {"errors", "comm", "workload", "topology", "compression"},
    "analysis": {"errors", "plan", "results", "analysis"},
    "report": {"errors", "plan", "rules", "results", "analysis", "report"},
}
NO_TORCH = ("plan", "rules", "results", "analysis", "report", "running", "cli")
ONLY_STANDARD = ("comm", "worker", "sync", "topology", "parallel", "compression", "measure")
STANDARD = sys.stdlib_module_names | {"torch", "numpy", "benchsuite"}
# Used where they are found, with a fallback or `unsupported` where they are not.
OPTIONAL = {"sklearn", "gymnasium", "greenlet", "scipy"}
TORCH_DISTRIBUTED = ("comm", "parallel", "cluster", "laws")  # laws: groups of thread ranks
# The library's own strategy, hand-written loops, and who watches the library.
TORCH_DISTRIBUTED_FILES = (
    "benchsuite.sync.ddp",
    "benchsuite.programs.selfcheck.baseline_loops",
    "benchsuite.programs.selfcheck.parallel_loops",
    "benchsuite.worker.rendezvous",
    "benchsuite.worker.traffic_mode",
)


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"benchsuite.{name}" if name.startswith("workloads") else name


MODULES = {module_name(path): path for path in FILES}


def room(module: str) -> str:
    """The room of a dotted name of this package; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(module: str, source: str) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import: at the top, lazy, for types, and by a literal name."""
    package = (
        module if MODULES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    )
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            base = ".".join(filter(None, [start if node.level else "", node.module]))
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif is_import_by_name(node):
            yield str(node.args[0].value), node.lineno


def is_import_by_name(node: ast.AST) -> bool:
    """Whether a node is `import_module("...")` of a literal name."""
    if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("import_module"):
        return False
    return bool(node.args) and isinstance(node.args[0], ast.Constant)


def known_module(name: str, modules: Mapping[str, object]) -> str:
    """The longest front part of a dotted name that is a module of ours, else ""."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def offences(module: str, source: str) -> list[str]:
    """What a module imports and may not, one line each."""
    found = []
    here = room(module)
    for name, line in imports(module, source):
        where = f"{module}:{line} imports {name}"
        top = name.partition(".")[0]
        if top == "torch" and here in NO_TORCH:
            found.append(f"{where}: no torch in {here}")
        inside = here in TORCH_DISTRIBUTED or module in TORCH_DISTRIBUTED_FILES
        if name.startswith("torch.distributed") and not inside:
            found.append(f"{where}: torch.distributed only in {TORCH_DISTRIBUTED} and named files")
        if here in ONLY_STANDARD and top not in STANDARD | OPTIONAL:
            found.append(f"{where}: {here} needs only the standard library, torch and numpy")
        if top != "benchsuite" or module in DOORS:
            continue
        target = known_module(name, MODULES)
        if target in DOORS:
            found.append(f"{where}: nobody imports the package's face or a door")
        elif ROOMS.index(room(target)) > ROOMS.index(here):
            found.append(f"{where}: {room(target)} comes after {here}")
        elif room(target) not in ONLY.get(here, ROOMS):
            found.append(f"{where}: {here} may import {sorted(ONLY[here])}")
    return found


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one file (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in edges.get(node, ()):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def file_edges() -> dict[str, set[str]]:
    """Which file imports which, doors left out: nobody imports those."""
    edges = {}
    for module, path in MODULES.items():
        names = (name for name, _ in imports(module, path.read_text(encoding="utf-8")))
        targets = {known_module(name, MODULES) for name in names}
        edges[module] = targets - {module, "", *DOORS}
    return edges


def test_every_folder_of_the_package_is_a_room_and_every_room_is_there() -> None:
    assert {room(module) for module in MODULES if module not in DOORS} == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_comes_before_its_room(module: str) -> None:
    assert offences(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_no_file_is_in_a_circle_of_imports() -> None:
    assert circles(file_edges()) == []


def test_a_circle_through_a_lazy_import_is_found() -> None:
    edges = file_edges()
    edges["benchsuite.plan.cell"] = edges["benchsuite.plan.cell"] | {"benchsuite.running.api"}
    found = circles(edges)
    assert any(
        {"benchsuite.plan.cell", "benchsuite.running.api"} <= set(circle) for circle in found
    )


@pytest.mark.parametrize(
    ("module", "line", "why"),
    [
        ("benchsuite.results.store", "import torch", "no torch in results"),
        ("benchsuite.analysis.made_up", "def f():\n    from torch import Tensor", "no torch in analysis"),
        ("benchsuite.topology.made_up", "import torch.distributed as dist", "torch.distributed only in"),
        ("benchsuite.sync.made_up", "from benchsuite.parallel.data import Parallel", "sync may import"),
        ("benchsuite.report.made_up", "from benchsuite.cli import main", "cli comes after report"),
        ("benchsuite.plan.made_up", "from benchsuite.worker.main import run_rank", "worker comes after plan"),
        ("benchsuite.comm.made_up", "import importlib\nimportlib.import_module('benchsuite.sync.ddp')", "sync comes after comm"),
        ("benchsuite.topology.made_up", "from benchsuite.results.store import Store", "results comes after topology"),
        ("benchsuite.topology.made_up", "from benchsuite.sync.ddp import Strategy", "sync comes after topology"),
        ("benchsuite.workloads.made_up", "from benchsuite.comm import Comm", "workloads may import"),
        ("benchsuite.workloads.made_up", "from ..comm import Comm", "workloads may import"),
        ("benchsuite.comm.made_up", "import pandas", "only the standard library"),
        ("benchsuite.cli.made_up", "import benchsuite", "nobody imports the package's face"),
    ],
)  # fmt: skip  # a table: one offender a line
def test_the_rules_catch_a_made_up_offender(module: str, line: str, why: str) -> None:
    assert why in " ".join(offences(module, line)), offences(module, line)
    under = "if TYPE_CHECKING:\n" + "\n".join(f"    {part}" for part in line.splitlines())
    assert why in " ".join(offences(module, under)), "imports for types count too"


def test_the_package_has_at_most_25_entries() -> None:
    entries = [path.name for path in (ROOT / "benchsuite").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 25, sorted(entries)


def test_importing_the_package_and_its_light_verbs_loads_nothing_heavy() -> None:
    """By sys.modules in a fresh process, not by time: `--help` and `list` owe their 0.2 s to it."""
    program = (
        "import sys, benchsuite; benchsuite.Cell\n"
        "from benchsuite.cli.main import main\n"
        "for arguments in (['--help'], ['list'], ['list', 'sync', '--json'], ['plan', '--help']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pandas', 'scipy', 'seaborn', 'rich'}\n"
        "found = sorted({name.split('.')[0] for name in sys.modules} & heavy)\n"
        "sys.exit(f'loaded: {found}' if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
