"""What the processes of ranks import, and from where. No torch is imported here.

A fork server imports these modules once, so that a fresh process per rank costs 0.02 s instead of
the seconds that importing torch takes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from benchsuite.errors import UsageError
from benchsuite.plan import plugins

# What every rank calls with its job, `module:function`.
RANK_ENTRY = "benchsuite.worker.main:run_rank"

_SHARED_BY_ALL_RANKS = (
    "torch",
    "torch.distributed",
    "torch._dynamo",  # optimisers import it at their first step: 1.45 s of CPU
    "torch.nn.parallel",
    "numpy",
    "benchsuite.cluster.rank_entry",
    # what the main module imports: every fresh process executes that module again
    "benchsuite.cluster.rank_processes",
    "benchsuite.worker.main",
    # what the workloads that ship with the suite import at first use
    "sklearn.datasets",
    "sklearn.model_selection",
)


def preloaded_modules() -> list[str]:
    """Everything that cells of the suite's own members need: torch, the worker, the plug-ins."""
    modules = list(_SHARED_BY_ALL_RANKS)

    for kind, (_, prefix, _) in plugins.KINDS.items():
        if kind == "cluster":  # engines are loaded where ranks are started, never inside a rank
            continue
        # A plug-in folder that cannot be read costs the ranks that need it, not all of them.
        with contextlib.suppress(UsageError, OSError):
            modules += [f"{prefix}.{name}" for name in plugins.names(kind)]

    return modules


def python_path(more: Sequence[str] = ()) -> str:
    """PYTHONPATH for a process that we start: `more`, what the user had, and the package's folder.

    In a clone the folder `workloads` lies beside the package, so that every entry that the clone
    comes before loses its own package of that name. The clone therefore comes last, or not at all
    where it is found without; only where the user's entries hold another benchsuite it is first.
    """
    root = Path(__file__).resolve().parents[2]
    given = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]

    if any(_holds_another(Path(each), root) for each in given):
        entries = [*more, str(root), *given]
    elif "site-packages" in root.parts or _is_installed_for_editing(root):
        entries = [*more, *given]
    else:
        entries = [*more, *given, str(root)]

    return os.pathsep.join(entries)


def _holds_another(entry: Path, root: Path) -> bool:
    return (entry / "benchsuite" / "__init__.py").is_file() and entry.resolve() != root


def _is_installed_for_editing(root: Path) -> bool:
    """Whether a finder that pip installed leads to the clone in every process of this Python."""
    for finder in sys.meta_path:
        if finder is PathFinder:  # it looks through sys.path, which a fresh process has not
            continue
        # All three arguments: asv's finder, which is there under `asv run`, has no default for one.
        spec = finder.find_spec("benchsuite", None, None)
        if spec is not None and spec.origin == str(root / "benchsuite" / "__init__.py"):
            return True

    return False


def set_one_thread() -> None:
    """One thread for every numerical library of the processes that this one starts.

    The variables are read when the libraries are loaded: in the fork server, not in the rank. A
    pool of threads would also not survive the fork: the child has its locks and not its threads.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
