"""What the processes of ranks import, and from where. No torch is imported here.

A fork server imports these modules once, so that a fresh process per rank costs 0.02 s instead of
the seconds that importing torch takes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
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
    """PYTHONPATH for a process that we start: `more`, this package where it is not installed, then
    what the user had."""
    parent = Path(__file__).resolve().parents[2]
    installed = "site-packages" in parent.parts
    entries = [*more, *([] if installed else [str(parent)]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(entry for entry in entries if entry)


def set_one_thread() -> None:
    """One thread for every numerical library of the processes that this one starts.

    The variables are read when the libraries are loaded: in the fork server, not in the rank. A
    pool of threads would also not survive the fork: the child has its locks and not its threads.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
