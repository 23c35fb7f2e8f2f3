"""`code_id` changes with every file that a cell's run reaches, and with no other.

What a run reaches is found out twice: by `code_id` from the text of the files, and here by running cells on real ranks
and under the virtual clock while every process notes what it imports (`tests/import_recorder.py`).
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchsuite import rules
from benchsuite.plan import declared, plugins
from benchsuite.plan import plan as plans
from benchsuite.plan.cell import AXES, Budget, Cell, resolve
from benchsuite.results import code_id
from benchsuite.results.code_id import ROOTS, Tree
from benchsuite.results.store import Store
from benchsuite.running.runner import run_cells
from benchsuite.running.setting import Setting
from tests import import_recorder

ROOT = Path(__file__).parent.parent


def cell(**fields: Any) -> Cell:
    """Four steps of a cell on two ranks or in two parts."""
    fields = {"replicas": 2, "preset": "smoke", "budget": Budget(steps=4, timeout_s=60)} | fields
    made = resolve(Cell(**fields))
    assert rules.validate(made) == []
    return made


RING = cell(topology="ring")
DILOCO = cell(sync="diloco", options={"diloco": {"outer_bits": 4, "local_steps": 2}})
SERVED = cell(sync="asynchronous", topology="parameter_server", compression="topk")
AGENT = cell(workload="rl_agent", topology="ring")
PIPELINE = cell(workload="transformer", parallel="pipeline", model_parallel=2, replicas=1)
ON_RANKS = (RING, DILOCO, SERVED, AGENT, PIPELINE)
SIMULATED = (
    cell(workload="mlp", sync="gossip", topology="ring_neighbours", clock="virtual"),
    cell(
        workload="mlp",
        sync="asynchronous",
        topology="parameter_server",
        clock="virtual",
        gradients="none",
    ),
)
# What these runs reach only by an import inside a function that they do not get to. None of them does today.
NOT_GOT_TO: frozenset[str] = frozenset()

Loaded = Mapping[str, frozenset[str]]  # cell id -> modules that its processes imported


def recorded(folder: Path, *arguments: str, said: str = "") -> str:
    """What a Python process prints; it and all that it starts note their imports in the folder."""
    import_recorder.prepare(folder)
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        input=said,
        text=True,
        capture_output=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    found = {}
    for world, cells in (("ranks", ON_RANKS), ("simulator", SIMULATED)):
        folder = tmp_path_factory.mktemp(world)
        documents = json.dumps([each.to_json() for each in cells])
        lines = recorded(
            folder, "-m", "tests.import_recorder", world, str(folder), said=documents
        ).splitlines()
        for each, line in zip(cells, lines, strict=True):
            found[each.id] = frozenset(json.loads(line)) & Tree().paths.keys()
    return found


def without_import(module: str, of: str) -> Tree:
    """The tree in which one file does not import another."""
    path = Tree().paths[module]

    def is_kept(prefix: str, alias: ast.alias) -> bool:
        return not f"{prefix}{alias.name}.".startswith(f"{of}.")

    class Remover(ast.NodeTransformer):
        def visit_Import(self, node: ast.Import) -> ast.stmt:
            node.names = [alias for alias in node.names if is_kept("", alias)]
            return node if node.names else ast.Pass()

        def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
            node.names = [alias for alias in node.names if is_kept(f"{node.module}.", alias)]
            return node if node.names else ast.Pass()

    changed = ast.unparse(Remover().visit(ast.parse(path.read_bytes()))).encode()
    return Tree(lambda other: changed if other == path else other.read_bytes())


def lone_imports(run: Cell) -> list[tuple[str, str]]:
    """(file, what it imports) where no other file that the run reaches imports that, and the run does not name it."""
    tree = Tree()
    importers: dict[str, list[str]] = {}
    for module in tree.reach(run):
        for of in tree.imports(module):
            importers.setdefault(of, []).append(module)
    named = set(itertools.chain.from_iterable(ROOTS.values()))
    named |= {f"{plugins.KINDS[axis][1]}.{getattr(run, axis)}" for axis in (*AXES, "cluster")}
    named |= set(declared.cluster(run.cluster).processes)
    return [(by[0], of) for of, by in sorted(importers.items()) if len(by) == 1 and of not in named]


# against what processes really import


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.parametrize("run", [*ON_RANKS, *SIMULATED], ids=lambda run: run.label)
def test_a_run_imports_what_it_can_reach(run: Cell, loaded: Loaded) -> None:
    reached = Tree().reach(run)
    assert loaded[run.id] - reached == set(), "imported by its processes, and not in its code_id"
    assert reached - loaded[run.id] <= NOT_GOT_TO, (
        "in its code_id, and not imported by its processes"
    )


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.parametrize("run", [DILOCO, SIMULATED[0]], ids=lambda run: run.label)
def test_a_graph_that_lacks_any_one_import_is_found_out(run: Cell, loaded: Loaded) -> None:
    imports = lone_imports(run)
    assert len(imports) > 15
    for module, of in imports:
        missed = loaded[run.id] - without_import(module, of).reach(run)
        assert of in missed, f"{module} without its import of {of}"


@pytest.mark.procs
@pytest.mark.slow
def test_editing_a_file_changes_exactly_the_cells_whose_processes_import_it(loaded: Loaded) -> None:
    contents = {path: path.read_bytes() for path in Tree().paths.values()}
    cells = [*ON_RANKS, *SIMULATED]
    before = {each.id: Tree(contents.__getitem__).code_id(each) for each in cells}
    for module, path in Tree().paths.items():
        edited = Tree((contents | {path: contents[path] + b"# edited\n"}).__getitem__)
        changed = {each.id for each in cells if edited.code_id(each) != before[each.id]}
        assert changed == {each.id for each in cells if module in loaded[each.id] | NOT_GOT_TO}, (
            module
        )


@pytest.mark.procs
def test_a_supervisor_imports_what_a_cell_under_torchrun_can_reach(tmp_path: Path) -> None:
    recorded(tmp_path, "-m", "benchsuite.worker", "--help")
    (modules,) = import_recorder.noted(
        tmp_path
    ).values()  # the door and the supervisor are one process
    assert "benchsuite.cluster.rank_supervisor" in modules
    assert modules <= Tree().reach(cell(cluster="torchrun")), modules - Tree().reach(
        cell(cluster="torchrun")
    )


# what once left old runs current


@pytest.mark.parametrize(
    ("run", "module"),
    [
        (RING, "benchsuite.comm.socket_barrier"),
        (RING, "benchsuite.plan.placement"),
        (RING, "benchsuite.measure.window"),
        (RING, "benchsuite.results.assemble.lag"),
        (RING, "benchsuite.cluster.cell_outcome"),
        (DILOCO, "benchsuite.compression.quantise"),
        (AGENT, "benchsuite.topology.direct"),
        (SIMULATED[0], "benchsuite.results.assemble.virtual"),
    ],
    ids=lambda value: value.rpartition(".")[2] if isinstance(value, str) else value.label,
)
def test_a_helper_behind_an_import_counts(run: Cell, module: str) -> None:
    assert module in Tree().reach(run)


def test_members_of_other_cells_reports_and_the_command_line_do_not_count() -> None:
    for run in (*ON_RANKS, *SIMULATED):
        for room in ("report", "analysis", "cli", "laws", "programs", "running", "rules"):
            assert not [
                name for name in Tree().reach(run) if name.startswith(f"benchsuite.{room}")
            ], run.label
    other = {
        "benchsuite.topology.native",
        "benchsuite.workloads.transformer",
        "benchsuite.sync.local_sgd",
    }
    assert not other & Tree().reach(RING)
    assert not [name for name in Tree().reach(RING) if name.startswith("benchsuite.virtual")]
    assert not Tree().reach(SIMULATED[0]) & {*ROOTS["rank"], "benchsuite.comm.process"}


def test_the_seed_does_not_change_the_code_and_a_member_does() -> None:
    assert Tree().code_id(RING) == Tree().code_id(RING.with_seed(7))
    assert Tree().code_id(RING) != Tree().code_id(cell(topology="native"))


def test_the_way_of_tuning_counts_for_tuned_cells_only() -> None:
    tuned = cell(topology="ring", tuning="per_strategy")
    assert set(ROOTS["tuning"]) <= Tree().reach(tuned)
    assert not set(ROOTS["tuning"]) & Tree().reach(RING)


# which imports are followed


def users(folder: Path, text: str, name: str = "mine.py") -> Cell:
    """A cell over a topology that is given by path."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{text}\n\n\nclass Topology:\n    pass\n", encoding="utf-8")
    return resolve(Cell(topology=str(path)))


TREE_TOPOLOGY = "benchsuite.topology.tree"


@pytest.mark.parametrize(
    "text",
    [
        "import benchsuite.topology.tree",
        "from benchsuite.topology import tree as other",
        "from benchsuite.topology.tree import Topology as Other",
        "def late():\n    with open('x'):\n        from benchsuite.topology import tree",
        "try:\n    pass\nexcept ImportError:\n    import benchsuite.topology.tree",
        "match 1:\n    case 1:\n        import benchsuite.topology.tree",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import benchsuite.topology.tree",
    ],
)
def test_an_import_counts_wherever_it_stands(text: str, tmp_path: Path) -> None:
    assert TREE_TOPOLOGY in Tree().reach(users(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import benchsuite.topology.tree",
        "import typing\nif typing.TYPE_CHECKING:\n    import benchsuite.topology.tree",
        "if __name__ == '__main__':\n    import benchsuite.topology.tree",
        "NAME = 'benchsuite.topology.tree'",
    ],
)
def test_what_an_import_of_the_file_does_not_execute_does_not_count(
    text: str, tmp_path: Path
) -> None:
    assert TREE_TOPOLOGY not in Tree().reach(users(tmp_path, text))


def test_names_that_a_package_finds_when_asked_count_for_who_asks(tmp_path: Path) -> None:
    door = set(Tree().reach(users(tmp_path, "from benchsuite import load_results")))
    assert "benchsuite.running.api" in door and not {name for name in door if "__getattr__" in name}
    assert "benchsuite.running.api" in Tree().reach(users(tmp_path, "import benchsuite"))
    assert "benchsuite.running.api" not in Tree().reach(
        users(tmp_path, "from benchsuite import plan")
    )


def test_relative_imports_are_followed() -> None:
    package = "benchsuite.results.assemble"
    path = Tree().paths[package]
    for text in (b"from . import lag", b"from .lag import queue", b"from ..assemble import lag"):
        made = Tree(lambda other, text=text: text if other == path else other.read_bytes())
        assert made.imports(package) - {"benchsuite", "benchsuite.results"} == {f"{package}.lag"}, (
            text
        )


# a file given by path


def test_a_users_file_counts_with_its_content_and_what_it_imports_of_the_project(
    tmp_path: Path,
) -> None:
    mine = users(tmp_path, "from benchsuite.topology.ring import Topology as Ring")
    assert "benchsuite.topology.ring" in Tree().reach(mine)
    before = Tree().code_id(mine)
    path = Path(mine.topology)
    times = path.stat().st_mtime_ns
    path.write_text(path.read_text() + "# edited\n", encoding="utf-8")
    os.utime(path, ns=(times, times))  # a coarse clock must not hide the edit
    assert Tree().code_id(mine) != before


def test_users_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, other = users(tmp_path / "one", "A = 1"), users(tmp_path / "other", "A = 2")
    same = users(tmp_path / "same", "A = 1")
    tree = Tree()
    assert tree.code_id(one) == tree.code_id(same) != tree.code_id(other)


def test_a_file_that_is_no_python_is_named_with_its_line() -> None:
    path = Tree().paths["benchsuite.comm.process"]
    broken = Tree(lambda other: b"a = 1\nb = = 2\n" if other == path else other.read_bytes())
    with pytest.raises(plugins.PluginError, match=r"process\.py: line 2: invalid syntax"):
        broken.code_id(RING)


# the tree


def test_every_root_is_a_module_and_one_that_is_gone_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for roots in ROOTS.values():
        assert set(roots) <= Tree().paths.keys()
    monkeypatch.setattr(code_id, "ROOTS", {**ROOTS, "rank": ("benchsuite.gone",)})
    with pytest.raises(LookupError, match=r"starts with benchsuite\.gone, .* ROOTS of code_id\.py"):
        Tree().code_id(RING)


def test_a_plan_reads_each_file_once() -> None:
    reads: Counter[Path] = Counter()

    def read(path: Path) -> bytes:
        reads[path] += 1
        return path.read_bytes()

    tree = Tree(read)
    cells = plans.load("scaling").cells
    assert len(cells) > 200
    assert len({tree.code_id(each) for each in cells}) > 10
    assert reads.most_common(1)[0][1] == 1


def test_an_installed_package_has_the_ids_of_a_clone(tmp_path: Path) -> None:
    """Where it is installed the workloads are inside the package."""
    shutil.copytree(
        plugins.PACKAGE, tmp_path / "benchsuite", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(
        plugins.KINDS["workload"][0], tmp_path / "benchsuite" / "workloads", dirs_exist_ok=True
    )
    program = (
        "import json, sys; from benchsuite.plan.cell import from_json; from benchsuite.results.code_id import Tree\n"
        "print(Tree().code_id(from_json(json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-P", "-c", program, json.dumps(RING.to_json())]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    said = subprocess.check_output(command, cwd="/", env=environment, text=True)
    assert said.strip() == Tree().code_id(RING)


# refusals


def edited(module: str) -> Tree:
    path = Tree().paths[module]
    return Tree(lambda other: other.read_bytes() + (b"# edited\n" if other == path else b""))


def test_a_refusal_depends_on_the_rules_what_they_import_and_the_cells_members() -> None:
    now = Tree().rules_id(RING)
    counting = (
        "benchsuite.rules",
        "benchsuite.rules.numbers",
        "benchsuite.rules.refusals",
        "benchsuite.plan.compute_time",
        "benchsuite.plan.cell",
        "benchsuite.plan.faults",
        "benchsuite.plan.declared",
        "benchsuite.topology.ring",
    )
    for module in counting:
        assert edited(module).rules_id(RING) != now, module
    for module in ("benchsuite.topology.tree", "benchsuite.report.page", "benchsuite.comm.process"):
        assert edited(module).rules_id(RING) == now, module
    assert now.startswith("rules-") and len(now) == len("rules-") + 12


def test_a_refused_cell_is_recorded_again_where_its_own_rules_changed(tmp_path: Path) -> None:
    store, refused = Store(tmp_path), [(RING, "why"), (DILOCO, "why")]

    def record(tree: Tree) -> int:
        setting = Setting(
            machine="m", environment_id="e", code_id=tree.code_id, rules_id=tree.rules_id
        )
        return len(
            run_cells(
                [], store, setting=setting, launch=lambda _: pytest.fail(), refused=refused
            ).paths
        )

    assert [record(Tree()), record(Tree()), record(edited("benchsuite.topology.ring"))] == [2, 0, 1]
