"""A server's log while another thread applies."""

from __future__ import annotations

from benchsuite.laws.harness.runs import push_log
from benchsuite.laws.server_log import tiling_residual
from benchsuite.topology.server_log import ServerLog


class _Racing(ServerLog):
    """Without a lock, at its worst: between any two looks at the version another thread has made an
    update."""

    def __getattribute__(self, name: str) -> object:
        if name == "version" and "_open_row" in self.__dict__:
            self.__dict__["version"] += 1
        return super().__getattribute__(name)


class _ReadsTwice(_Racing):
    """The broken twin: the worker's last read and its row are two looks."""

    def answered(self, worker: int) -> None:
        self.last_read[worker] = self.version
        self._rows[self._open_row[worker], 4] = self.version


def _residual(log: ServerLog) -> int:
    for push in range(5):
        log.push(push % 2, push, 0, 0)
        log.answered(push % 2)
    return tiling_residual(push_log(log))


def test_the_tiling_identity_survives_updates_between_any_two_looks() -> None:
    assert _residual(_Racing(5, 2)) == 0


def test_a_log_that_looks_twice_per_answer_breaks_it() -> None:
    assert _residual(_ReadsTwice(5, 2)) == 5  # one per answer
