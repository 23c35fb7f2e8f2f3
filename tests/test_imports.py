"""Who may import whom (ARCHITECTURE.md section 3), read with `ast`; the rules catch a made-up
offender."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "benchsuite").rglob("*.py"), *(ROOT / "workloads").glob("*.py")])
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}

# Room -> what of our own package it may import, at module level or inside a function. Absent: no
# rule.
MAY_IMPORT = {
    "workloads": {"workload"},
    "sync": {"topology", "compression", "comm", "workload", "training", "update", "cell"},
    "topology": {"comm", "workload", "update", "training"},
    "compression": {"comm", "workload", "topology"},
    "report": {
        "analysis",
        "cell",
        "errors",
        "plan",
        "plugins",
        "record",
        "rules",
        "store",
        "frame",
        "report",
    },
    "analysis": {"analysis", "cell", "compute_time", "errors", "plugins", "record", "frame"},
    "store": {"cell", "errors", "frame", "record"},
    "record": {"cell"},
}
NO_TORCH = (
    "cell",
    "compute_time",
    "members",
    "placement",
    "plugins",
    "plan",
    "rules",
    "record",
    "frame",
    "store",
    "export",
    "runner",
    "tune",
    "progress",
    "analysis",
    "report",
    "cli",
    "verbs",
    "api",
)
ONLY_INSIDE = ("comm", "worker", "sync", "topology", "parallel", "compression", "measure", "record")
TORCH_DISTRIBUTED = ("comm", "parallel", "cluster", "laws")  # laws: groups of thread ranks
# the library's strategy, a hand-written loop, and who watches the library
TORCH_DISTRIBUTED_FILES = (
    "benchsuite.sync.ddp",
    "benchsuite.programs.selfcheck.baseline_loops",
    "benchsuite.programs.selfcheck.parallel_loops",
    "benchsuite.worker.traffic_mode",
)
# The parameter server serves a `sync.ServerPolicy` and decodes a `compression.Codec`: the
# protocols, no member.
PROTOCOLS = {"topology": ("sync", "compression")}
STANDARD = sys.stdlib_module_names | {"torch", "numpy", "benchsuite", "workloads"}
# used where they are found, with a fallback or `unsupported` where they are not
OPTIONAL = {"psutil", "sklearn", "gymnasium", "greenlet", "scipy"}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "workloads" else parts[1] if len(parts) > 1 else ""


def imports(tree: ast.AST, *, type_checking: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import, those under `if TYPE_CHECKING` left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for branch in node.orelse:
                yield from imports(branch)
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
        yield from imports(node)


def stems(folder: str) -> set[str]:
    return {
        module.split(".")[2] for module in MODULES if module.startswith(f"benchsuite.{folder}.")
    }


def allowed(here: str, name: str) -> set[str]:
    spoken = [  # a name of the package, not a file of it
        protocol
        for protocol in PROTOCOLS.get(here, ())
        if name.startswith(f"benchsuite.{protocol}.") and name.split(".")[2] not in stems(protocol)
    ]
    return {"", "errors", here, *MAY_IMPORT[here], *spoken}


def offences(module: str, source: str) -> list[str]:
    """What a module imports and may not, one line each."""
    found = []
    here = room(module)
    for name, line in imports(ast.parse(source)):
        where = f"{module}:{line} imports {name}"
        top, _, rest = name.partition(".")
        target = rest.split(".")[0] if top == "benchsuite" else ""
        if top == "torch" and here in NO_TORCH:
            found.append(f"{where}: no torch in {here}")
        inside = here in TORCH_DISTRIBUTED or module in TORCH_DISTRIBUTED_FILES
        if name.startswith("torch.distributed") and not inside:
            found.append(
                f"{where}: torch.distributed only in {TORCH_DISTRIBUTED} and {TORCH_DISTRIBUTED_FILES}"
            )
        if target in ("cli", "verbs") and here not in ("cli", "verbs"):
            found.append(f"{where}: nothing imports the command line")
        if name.startswith("benchsuite.worker.main") and here not in ("cluster", "worker"):
            found.append(f"{where}: the worker is imported only in the forked child")
        if {here, target} == {"sync", "parallel"} and rest != "parallel":
            found.append(f"{where}: sync and parallel do not know each other")
        if (
            top in ("benchsuite", "workloads")
            and here in MAY_IMPORT
            and target not in allowed(here, name)
        ):
            found.append(f"{where}: {here} may import {sorted(MAY_IMPORT[here])}")
        if here in ONLY_INSIDE and top not in STANDARD | OPTIONAL:
            found.append(f"{where}: {here} needs only the standard library, torch and numpy")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    assert offences(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "line", "why"),
    [
        ("benchsuite.results.store", "import torch", "no torch in store"),
        (
            "benchsuite.analysis.made_up",
            "def f():\n    from torch import Tensor",
            "no torch in analysis",
        ),
        (
            "benchsuite.topology.made_up",
            "import torch.distributed as dist",
            "torch.distributed only in",
        ),
        (
            "benchsuite.sync.made_up",
            "from benchsuite.parallel.data import Parallel",
            "sync and parallel",
        ),
        (
            "benchsuite.report.made_up",
            "from benchsuite import cli",
            "nothing imports the command line",
        ),
        (
            "benchsuite.run.api",
            "from benchsuite.worker.main import run_rank",
            "only in the forked child",
        ),
        (
            "benchsuite.topology.made_up",
            "from benchsuite.results.store import Store",
            "topology may import",
        ),
        (
            "benchsuite.topology.made_up",
            "from benchsuite.sync.synchronous import Strategy",
            "topology may import",
        ),
        ("workloads.made_up", "from benchsuite.comm import Comm", "workloads may import"),
        ("benchsuite.comm.made_up", "import pandas", "only the standard library"),
    ],
)
def test_the_rules_catch_a_made_up_offender(module: str, line: str, why: str) -> None:
    assert why in " ".join(offences(module, line)), offences(module, line)
    assert (
        offences(module, f"if TYPE_CHECKING:\n    import {'torch' if 'torch' in line else 'json'}")
        == []
    )


def test_files_stay_short() -> None:
    long = {
        module: n
        for module, path in MODULES.items()
        if (n := len(path.read_text().splitlines())) > 340
    }
    assert not long, f"split these (about 300 lines is the limit): {long}"


def test_importing_the_package_and_its_light_verbs_loads_nothing_heavy() -> None:
    """By sys.modules in a fresh process, not by time: `--help` and `list` owe their 0.2 s to it."""
    program = (
        "import sys, benchsuite; benchsuite.Cell\n"
        "from benchsuite import cli\n"
        "for arguments in (['--help'], ['list'], ['list', 'sync', '--json'], ['plan', '--help']):\n"
        "    try: cli.main(arguments)\n"
        "    except SystemExit: pass\n"
        "heavy = sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'pandas', 'scipy', 'seaborn', 'rich'})\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
