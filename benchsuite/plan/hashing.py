"""One written form for every document that is hashed, and the hash itself.

Cell ids, environment ids, code ids and the checksums of parameters all go through this file, so
that the same content has the same name everywhere. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# From here on a float stands for several integers, and none of them was written.
_EXACT_BELOW = 2**53


def canonical(document: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, NaN refused; 4.0 and 4 are one number.

    It is what is hashed, so a change here would rename every stored cell. NaN has no form in JSON
    that other readers know, and no two of them are equal.
    """
    return json.dumps(
        plain_numbers(document), sort_keys=True, separators=(",", ":"), allow_nan=False
    )


def plain_numbers(value: Any) -> Any:
    """The value in types that JSON has, each number in one form only.

    Mappings become dicts, sequences lists, paths text; a float that is a whole number becomes an
    int, so that 4.0 and 4 give the same id.
    """
    if isinstance(value, Mapping):
        return {str(k): plain_numbers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_numbers(v) for v in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_BELOW:
        return int(value)
    if isinstance(value, Path):
        return str(value)
    return value


def checksum(content: bytes) -> str:
    """The sha256 of these bytes, in 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def finite(value: float | None) -> float | None:
    """The value, or None where it is not finite (JSON has no NaN)."""
    if value is None or not math.isfinite(value):
        return None
    return value
