"""Plug-ins given by path are loaded by thread ranks at once."""

from __future__ import annotations

import threading
from pathlib import Path

from benchsuite.plan import plugins

SLOW = '''"""A user's strategy that takes a while to import."""
import time
time.sleep(0.2)


class Strategy:
    pass
'''


def test_a_file_given_by_path_is_imported_once_and_never_seen_half(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text(SLOW)
    loaded: list[object] = []
    threads = [
        threading.Thread(target=lambda: loaded.append(plugins.load("sync", str(path))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(loaded) == 4, f"{len(loaded)} of 4 threads got the class"
    assert len({id(found) for found in loaded}) == 1
