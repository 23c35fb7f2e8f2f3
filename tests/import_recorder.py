"""Which modules of the project the processes of a run really import, for tests/test_code_id.py.

`python -m tests.import_recorder ranks|simulator FOLDER` reads cells as a JSON list from its standard input, runs each
with a tiny budget and prints one JSON list per cell: the modules that its processes imported. FOLDER holds
`sitecustomize.py` and is the first entry of PYTHONPATH, so that every process that Python starts, cell host and fork
server included, notes its imports in a file of its own as they happen (ranks end without any clean-up).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

SITECUSTOMIZE = """
import os, sys

class Recorder:
    # Asked first for every module that is not imported yet, whoever imports it and in which way.
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "benchsuite":
            with open(os.path.join({folder!r}, f"{{os.getpid()}}.imports"), "a") as file:
                file.write(name + "\\n")
        return None

sys.meta_path.insert(0, Recorder)
"""


def prepare(folder: Path) -> None:
    """Writes what every process of the run loads first."""
    (folder / "sitecustomize.py").write_text(
        SITECUSTOMIZE.format(folder=str(folder)), encoding="utf-8"
    )


def noted(folder: Path) -> dict[str, set[str]]:
    """Process id -> what that process imported so far."""
    return {path.stem: set(path.read_text().split()) for path in folder.glob("*.imports")}


def ranks(cells: list[dict[str, Any]], folder: Path) -> None:
    """Real ranks. The fork server holds nothing of the project, so what a rank imports it imports itself."""
    from benchsuite.cluster.local import Cluster
    from benchsuite.measure.load import CpuMeter
    from benchsuite.plan.cell import from_json
    from benchsuite.results.assemble import assemble

    with Cluster(modules=("torch", "torch.distributed", "torch._dynamo", "numpy")) as cluster:
        cluster.start()
        standing = set(noted(folder))  # this process, the cell host and the fork server
        for document in cells:
            cell, meter = from_json(document), CpuMeter()
            before = set(noted(folder)) - standing
            with tempfile.TemporaryDirectory() as run_dir:
                outcome = cluster.run(cell, Path(run_dir))
                load = meter.read()
                run = assemble(
                    cell,
                    Path(run_dir),
                    outcome,
                    code_id="c",
                    machine="m",
                    environment_id="e",
                    cores=load.cores,
                    foreign_cpu_share=load.foreign_share,
                )
            assert run.status == "ok", run.reason
            print_modules([modules for pid, modules in noted(folder).items() if pid not in before])


def simulator(cells: list[dict[str, Any]], folder: Path) -> None:
    """The virtual clock: a process per cell, forked before anything of the project is imported."""
    import greenlet  # noqa: F401

    for document in cells:
        pid = os.fork()
        if pid == 0:
            _simulate(document)
        assert os.waitpid(pid, 0)[1] == 0, document
        print_modules([noted(folder)[str(pid)]])


def _simulate(document: dict[str, Any]) -> None:
    """One cell as the simulator's process runs it; never returns."""
    code = 1
    try:
        from benchsuite.cluster.simulator_process import Kept, answer

        with tempfile.TemporaryDirectory() as run_dir:
            said = answer(document, Path(run_dir), Kept())
        print(said, file=sys.stderr)
        code = 0 if said["status"] == "ok" else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def print_modules(of_processes: list[set[str]]) -> None:
    """One line: what any of the processes imported."""
    print(json.dumps(sorted(set().union(*of_processes))), flush=True)


if __name__ == "__main__":
    {"ranks": ranks, "simulator": simulator}[sys.argv[1]](json.load(sys.stdin), Path(sys.argv[2]))
