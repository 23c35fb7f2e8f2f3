"""First module of the fork server: ends the server with its parent, imports what every rank needs.

Importing this module IS its work (the standard library's fork server offers no other hook), and
only the fork server imports it: it does nothing where `BENCHSUITE_SERVER_PARENT` is not set. It
only imports: CUDA or a process group would not survive the fork. What cannot be imported is
reported and left out.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

from benchsuite.cluster.private_network import die_with_parent
from benchsuite.worker.job import EXIT_PARENT_GONE

PARENT_VARIABLE = "BENCHSUITE_SERVER_PARENT"  # process id of whoever starts the server
MODULES_VARIABLE = "BENCHSUITE_SERVER_MODULES"  # what to import, separated by commas

MODULES = (
    "torch",
    "torch.distributed",
    "torch._dynamo",  # optimisers import it: 1.45 s of CPU
    "torch.nn.parallel",
    "numpy",
    "benchsuite.cluster.rank_entry",
    # what the main module imports: every fresh process executes that module again
    "benchsuite.cluster.rank_processes",
    "benchsuite.worker.main",
)

server_pid = 0  # set in the fork server, inherited by every rank


def _serve() -> None:
    global server_pid
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return
    die_with_parent(int(parent), exit_code=EXIT_PARENT_GONE)
    server_pid = os.getpid()
    for name in filter(None, os.environ.pop(MODULES_VARIABLE, "").split(",")):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  one broken plug-in must not cost all cells; its rank will say so
            print(f"preload: {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    gc.freeze()  # ranks share these pages; no collector walks (and copies) them


_serve()
