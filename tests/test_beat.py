"""The beat says where a rank is, and faults strike where a cell asks for them; records are whole or
absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchsuite.errors import UsageError
from benchsuite.measure import beat
from benchsuite.measure.beat import Beat, Phase
from benchsuite.measure.faults import InjectedFault, check, open_beat
from benchsuite.worker.job import CannotWrite, rank_complete, write_rank_file


def test_a_reader_sees_the_last_beat(tmp_path: Path) -> None:
    writer = Beat(tmp_path / "beat")
    writer.enter(Phase.COMPUTE, 3)
    writer.enter(Phase.SEND, 4)
    pulse = beat.read(tmp_path / "beat")
    assert (pulse.pid, pulse.step, pulse.seq, pulse.phase_name) == (os.getpid(), 4, 2, "send")


def test_a_beat_is_allocated_before_its_rank_exists_and_reads_as_nothing(tmp_path: Path) -> None:
    beat.create(tmp_path / "beat")
    assert beat.read(tmp_path / "beat") == beat.Pulse() == beat.read(tmp_path / "absent")
    assert (tmp_path / "beat").stat().st_size == 40


def test_a_foreign_file_reads_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "beat").write_bytes(b"\xff" * 40)
    assert beat.read(tmp_path / "beat") == beat.Pulse()


def test_a_fault_strikes_its_own_rank_from_its_step_on() -> None:
    faults = [{"rank": 1, "phase": "send", "step": 3, "signal": "raise"}]
    other = open_beat("", rank=0, faults=faults)
    other.enter(Phase.SEND, 9)
    mine = open_beat("", rank=1, faults=faults)
    mine.enter(Phase.SEND, 2)
    mine.enter(Phase.COMPUTE, 3)
    with pytest.raises(InjectedFault):
        mine.enter(Phase.SEND, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "sned"}, "fault phase 'sned' is unknown; known: start, data, compute"),
        (
            {"signal": "SIGTERM"},
            "fault signal 'SIGTERM' is unknown; known: SIGKILL, SIGSTOP, exit0, raise, spin",
        ),
        ({"rank": 2}, "fault rank 2 is not below the cell's 2 ranks"),
        ({"host": 1}, "needs exactly the keys rank, phase, step, signal"),
    ],
)
def test_an_impossible_fault_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check([{"rank": 1, "phase": "send", "step": 3, "signal": "raise", **change}], 2)


def test_a_record_is_complete_only_with_its_marker_and_its_size(tmp_path: Path) -> None:
    assert not rank_complete(tmp_path, 0)
    path = write_rank_file(tmp_path, 0, '{"a": 1}')
    assert rank_complete(tmp_path, 0)
    path.write_text('{"a"')
    assert not rank_complete(tmp_path, 0)
    (tmp_path / "rank0.ok").unlink()
    assert not rank_complete(tmp_path, 0)


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "rank0.json").mkdir()
    with pytest.raises(CannotWrite):
        write_rank_file(tmp_path, 0, "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.json"]
