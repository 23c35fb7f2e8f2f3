"""Files as a user writes them, one per kind of member; tests copy them into a folder of their own.

They are never imported from here: a member given by path is found and loaded by path.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def user_file(name: str) -> str:
    """The text of one of them."""
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")
