"""How verbs print: the answer to standard output, as text or one JSON document with `--json`.

Everything else goes to standard error. Every command imports this file: what takes long to import
is imported inside.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchsuite.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


def print_json(document: Any) -> None:
    """Prints one JSON document; NaN, which JSON has not, is an error.

    Sorted and indented, so that two answers can be compared line by line. ValueError for a NaN.
    """
    import json

    json.dump(document, sys.stdout, indent=1, sort_keys=True, allow_nan=False)
    print()


def tell(verb: str, what: str) -> None:
    """One line of progress on standard error."""
    print(f"{verb}: {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """UsageError where the file or folder that a flag names cannot be written."""
    try:
        yield
    except BrokenPipeError:
        # It is an OSError too: a reader such as `head` that has seen enough is no failure to write.
        raise
    except OSError as error:
        # A file inside the folder may be the one that failed, and is the one to look at.
        inner = error.filename and str(error.filename) != str(path)
        where = f" ({error.filename})" if inner else ""
        raise UsageError(
            f"{path} cannot be written{where}: {error.strerror or error}; name another place"
        ) from error
