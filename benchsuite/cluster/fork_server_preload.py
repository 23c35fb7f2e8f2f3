"""The first module that a fork server imports: it ties the server to its parent and imports the
rest.

Importing this module IS its work, because the standard library's fork server offers no other hook.
Only the fork server imports it to that end: where `BENCHSUITE_SERVER_PARENT` is not set it does
nothing. It only imports: CUDA or a process group would not survive the fork. A module that cannot
be imported is reported and left out, and the rank that needs it will say so.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

from benchsuite.cluster import lifeline

PARENT_VARIABLE = "BENCHSUITE_SERVER_PARENT"  # process id of whoever starts the server
MODULES_VARIABLE = "BENCHSUITE_SERVER_MODULES"  # what to import, separated by commas


def _serve() -> None:
    """Ties this fork server to its parent, and imports what the ranks will share."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return

    # Before the imports, which take seconds: a command that is killed meanwhile must leave nothing
    # behind.
    lifeline.become_fork_server(int(parent))

    for name in filter(None, os.environ.pop(MODULES_VARIABLE, "").split(",")):
        try:
            importlib.import_module(name)
        # One broken plug-in must not cost all cells; the rank that needs it will say so.
        except Exception as error:  # noqa: BLE001
            print(f"preload: {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    gc.freeze()  # ranks share these pages; no collector walks (and copies) them


_serve()
