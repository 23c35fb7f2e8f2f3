"""cells.json: the cells that a torchrun of the user's own is to run.

It holds `{"schema": 1, "cells": [..]}`. `benchsuite plan PLAN --write` writes it, and every
supervisor of the job reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from benchsuite.errors import UsageError
from benchsuite.plan.cell import Cell, from_json

SCHEMA = 1


def write(path: Path, cells: Sequence[Cell]) -> None:
    """Writes the cells whole or not at all. UsageError where the file cannot be written.

    path: replaced where it exists.
    """
    document = {"schema": SCHEMA, "cells": [cell.to_json() for cell in cells]}

    # In the same folder, because only inside one file system `replace` puts a whole file in the
    # place of the old one; with the process id, so that two commands do not write to one file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")

    try:
        text = json.dumps(document, indent=1, sort_keys=True)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def read(path: Path) -> list[Cell]:
    """The cells of a file, in its order, which all supervisors of a job share.

    Raises UsageError where it is not one of ours: another schema, no JSON, unknown fields.
    """
    try:
        document = json.loads(path.read_text())

        if document["schema"] != SCHEMA:
            raise UsageError(
                f"{path} has schema {document['schema']}, this version reads {SCHEMA}: write it "
                "again"
            )

        return [from_json(cell) for cell in document["cells"]]
    # UsageError is a ValueError for the last clause; its own message says more.
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}: write it with `benchsuite plan PLAN --write {path}`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no cells file: {error!r}") from error
