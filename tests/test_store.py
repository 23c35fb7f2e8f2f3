"""The store: written once, atomically, by several suites at once; resumes; the table has exactly
the stated columns."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import benchsuite
from benchsuite.plan.cell import Cell
from benchsuite.results.columns import COLUMNS
from benchsuite.results.record import Run, Status
from benchsuite.results.store import CACHE, ForeignFile, Store, StoreError

SCHEMA = json.loads(
    (Path(benchsuite.__file__).parent / "results" / "schema" / "run.schema.json").read_text()
)

STATED_COLUMNS = """run_id, cell_id, code_id, started_at, machine, commit, dirty, provenance, workload, preset, parallel,
sync, topology, compression, options, replicas, model_parallel, servers, server_placement, world_size, threads,
precision, backend, device, clock, cluster, hosts, link_mbit, straggler, batch_mode, tuning, seed, status, reason,
flags, diverged_step, samples, updates, wall_s, virtual_s, samples_per_s, samples_per_s_low, samples_per_s_high,
step_time_s_median, compute_s_median, blocked_comm_s_median, idle_share, predicted_bytes_per_step,
payload_bytes_per_step, payload_source, payload_bytes_per_sample, shm_bytes_per_step, control_bytes_per_step,
wire_bytes_per_step, messages_per_step, busiest_port_bytes_per_step, staleness_mean, staleness_max, lock_wait_share,
policy_lag_mean, env_steps_per_s, bubble_share, peak_memory_bytes, cpu_s_per_sample, mfu, final_loss, final_metric,
target_metric, time_to_easy_s, time_to_target_s, time_to_hard_s, samples_to_target, bytes_to_target, rank_placement,
link_latency_us, compute_time, virtual_samples_per_s, virtual_step_time_s_median, virtual_compute_s_median,
virtual_blocked_comm_s_median, virtual_time_to_easy_s, virtual_time_to_target_s, virtual_time_to_hard_s,
predicted_bytes, payload_bytes, shm_bytes, control_bytes, wire_bytes, gradients, receive_cost,
simulation_s, lr_factor, tuned_lr_factor, peak_model_bytes, peak_device_bytes,
flops_per_sample, flop_per_s, matmul_ceiling_flop_per_s, num_parameters, held_parameters, inside_bytes, between_bytes,
inside_bytes_per_step, between_bytes_per_step, bubble_slots, bubble_predicted, balance""".replace(
    "\n", " "
).split(", ")


def a_run(cell: Cell | None = None, **changes: Any) -> Run:
    result = {
        "samples": 64,
        "steps": 8,
        "updates": 8,
        "loss": [2.3, 1.5],
        "predicted_bytes": 800,
        "payload_bytes": 800,
        "payload_source": "counted",
        "messages": 16,
        "busiest_port_bytes": 400,
        "shm_bytes": 0,
        "samples_to": {"target": None},
        "target": {"metric": "accuracy", "target": 97.5},
        "final_loss": 1.5,
    }
    cost = {
        "provenance": "measured",
        "wall_s": 2.0,
        "control_bytes": 4,
        "wire_bytes": None,
        "time_to": {"easy": 1.0},
    }
    values: dict[str, Any] = {
        "code_id": "code",
        "status": Status.OK,
        "machine": "m",
        "started_at": "2026-11-23T00:00:00Z",
    }
    return Run(cell=cell or Cell(), **(values | {"result": result, "cost": cost} | changes))


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_a_written_run_is_read_back_equal_and_validates(tmp_path: Path) -> None:
    run = a_run(
        Cell(replicas=2, seed=3, straggler={"0": 4.0}),
        flags=("oversubscribed",),
        extra={"order": {"seed": 1, "position": 0}},
    )
    path = Store(tmp_path).write(run)
    assert path == tmp_path / "m" / run.cell.id / f"{run.run_id}.json"
    document = json.loads(path.read_text())
    jsonschema.validate(document, SCHEMA)
    assert [r.to_json() for r in Store(tmp_path).runs()] == [run.to_json()]


@pytest.mark.parametrize("status", [Status.FAILED, Status.TIMEOUT, Status.UNSUPPORTED])
def test_a_run_without_result_validates_and_needs_its_reason(
    tmp_path: Path, status: Status
) -> None:
    run = a_run(status=status, reason="rank 1 (worker) was killed by SIGKILL", result={}, cost={})
    jsonschema.validate(json.loads(Store(tmp_path).write(run).read_text()), SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(dataclasses.replace(run, reason=None).to_json(), SCHEMA)


def test_a_broken_document_does_not_validate() -> None:
    """Negative control of the schema: an ok run without bytes, and a status that no file may
    carry."""
    good = a_run()
    for broken in (
        dataclasses.replace(good, result={}).to_json(),
        good.to_json() | {"status": "not run"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Store(tmp_path).write(a_run(result={"final_loss": float("nan")}))
    assert files(tmp_path) == []


def test_a_taken_run_id_is_not_overwritten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = a_run(reason="first")
    path = store.write(first)
    other = store.write(dataclasses.replace(first, reason="second"))
    assert other != path and json.loads(path.read_text())["reason"] == "first"
    assert {run.reason for run in store.runs()} == {"first", "second"}


def test_two_writers_at_once_lose_no_file(tmp_path: Path) -> None:
    program = (
        "import sys; from benchsuite.results.store import Store; from tests.test_store import a_run\n"
        "for i in range(40): Store(sys.argv[1]).write(a_run(reason=f'{sys.argv[2]}{i}', run_id=f'20260101T000000Z-{i:08x}'))"
    )
    root = Path(__file__).parent.parent
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name], cwd=root)
        for name in "ab"
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert sorted(str(run.reason) for run in Store(tmp_path).runs()) == sorted(
        f"{w}{i}" for w in "ab" for i in range(40)
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_truncated_and_foreign_files_are_skipped_with_a_warning_that_names_them(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    good = store.write(a_run())
    for name, text in (
        ("truncated", good.read_text()[:200]),
        ("foreign", "{}"),
        ("list", "[]"),
        ("binary", "\0\1"),
    ):
        (good.parent / f"{name}.json").write_text(text)
    newer = json.loads(good.read_text()) | {"schema": 99}
    (good.parent / "newer.json").write_text(json.dumps(newer))
    for read in (store.runs, store.rows):
        (tmp_path / CACHE).unlink(missing_ok=True)
        with pytest.warns(ForeignFile) as caught:
            assert len(read()) == 1
        warned = " ".join(str(w.message) for w in caught)
        assert all(
            f"{name}.json" in warned for name in ("truncated", "foreign", "list", "binary", "newer")
        )


def said(read: Callable[[], Any]) -> list[str]:
    """The warnings of a call, however often they were said before."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read()
    return [str(each.message) for each in caught]


def written(root: Path) -> tuple[int, int]:
    """Changes with every rewriting of the cache, which replaces the file."""
    status = (root / CACHE).stat()
    return status.st_ino, status.st_mtime_ns


@pytest.mark.parametrize("first", ["runs", "rows"])
def test_a_foreign_file_is_told_once_and_the_cache_is_left_alone_until_it_changes(
    tmp_path: Path, first: str
) -> None:
    store = Store(tmp_path)
    good = store.write(a_run())
    foreign = good.parent / "foreign.json"
    foreign.write_text("{}")
    assert ["foreign.json" in text for text in said(getattr(store, first))] == [True]
    store.rows()  # its rows, where `runs` came first
    before = written(tmp_path)
    for read in (store.runs, store.rows, store.runs, Store(tmp_path).rows, Store(tmp_path).frame):
        assert said(read) == []
    assert written(tmp_path) == before
    foreign.write_text("{}  ")
    assert len(said(store.rows)) == 1 and written(tmp_path) != before
    assert said(store.rows) == []
    foreign.write_text(json.dumps(a_run(Cell(seed=7)).to_json()))
    assert said(store.rows) == [] and sorted(row["seed"] for row in store.rows()) == [0, 7]
    assert len(store.runs()) == 2


def test_a_foreign_file_is_told_every_time_where_no_cache_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    (store.write(a_run()).parent / "foreign.json").write_text("{}")
    monkeypatch.setattr(
        Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only"))
    )
    assert [len(said(read)) for read in (store.runs, store.rows, store.rows)] == [1, 1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_file_that_cannot_be_read_now_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gives the rights back changes neither its time nor its size."""
    store = Store(tmp_path)
    store.write(a_run())
    with monkeypatch.context() as patch:
        patch.setattr(
            Path,
            "read_text",
            lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")),
        )
        assert [len(said(read)) for read in (store.rows, store.runs)] == [1, 1]
    assert said(store.rows) == [] and len(store.rows()) == 1


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_run_deleted_between_listing_and_reading_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    store = Store(tmp_path)
    store.write(a_run(Cell(seed=1)))
    run = a_run(Cell(seed=2, replicas=2))
    gone = store.write(run)
    gone.unlink()
    listing, look = Store._files, Path.iterdir

    def delete() -> None:
        gone.unlink(missing_ok=True)
        if gone.parent.exists():
            gone.parent.rmdir()

    def files_then_deletion(self: Store) -> Iterator[Path]:
        listed = list(listing(self))
        delete()
        return iter(listed)

    def deletion_then_look(folder: Path) -> Iterator[Path]:
        if folder == gone.parent:
            delete()
        return look(folder)

    read: Callable[[], list[Any]]
    for read in (store.rows, store.runs):
        assert store.write(run) == gone
        with monkeypatch.context() as patch:
            if what == "file":
                patch.setattr(Store, "_files", files_then_deletion)
            else:
                patch.setattr(Path, "iterdir", deletion_then_look)
            found: list[Any] = []
            assert said(lambda read=read, found=found: found.extend(read())) == []  # type: ignore[misc]
        assert len(found) == 1 and not gone.exists()


def test_a_run_deleted_while_it_is_opened_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.write(a_run())

    def gone(*_: Any, **__: Any) -> str:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(Path, "read_text", gone)
    assert said(store.runs) == said(store.rows) == [] and store.rows() == []


@pytest.mark.parametrize(
    "changed",
    [
        {"cost": None},
        {"raw": 3},
        {"cell": []},
        {"result": {"samples": "many"}},
        {"result": {"staleness": [1]}},
    ],
)
def test_a_run_file_that_makes_no_row_is_skipped_with_a_warning(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    store = Store(tmp_path)
    kept = store.write(a_run())
    document = json.loads(kept.read_text()) | {"run_id": "other"} | changed
    (kept.parent / "other.json").write_text(json.dumps(document))
    for read in (store.rows, store.runs):
        (tmp_path / CACHE).unlink(missing_ok=True)
        with pytest.warns(ForeignFile, match="other.json"):
            assert len(read()) == 1


def test_missing_is_what_has_no_ok_timeout_or_unsupported_run_of_this_code(tmp_path: Path) -> None:
    store = Store(tmp_path)
    done, timeout, refused, failed, never = cells = [Cell(replicas=n) for n in range(1, 6)]
    for cell, status in zip(
        cells, (Status.OK, Status.TIMEOUT, Status.UNSUPPORTED, Status.FAILED), strict=False
    ):
        store.write(a_run(cell, status=status, reason="r"))
    assert store.missing(cells, [0], "code") == [failed, never]
    assert [
        (c.replicas, c.seed) for c in store.missing([done, timeout, refused], [0, 1], "code")
    ] == [
        (1, 1),
        (2, 1),
        (3, 1),
    ]
    assert store.missing([done], None, lambda cell: "code") == []
    assert store.missing([done], None, "newer code") == [done]
    assert [row["code_id"] for row in store.stale([done], None, "newer code")] == ["code"]
    assert store.stale(cells, [0], "code") == []


def test_the_frame_has_exactly_the_stated_columns_and_null_where_not_applicable(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    environment_id = store.write_environment("m", {"commit": "abc", "dirty": False})
    store.write(a_run(Cell(topology="parameter_server", replicas=2), environment_id=environment_id))
    store.write(
        a_run(
            Cell(clock="virtual"),
            cost={"provenance": "virtual", "wall_s": 1.0, "time_to": {"easy": 9.0}},
        )
    )
    frame = store.frame()
    assert list(frame.columns) == STATED_COLUMNS == list(COLUMNS)
    wall = frame[frame.clock == "wall"].iloc[0]
    virtual = frame[frame.clock == "virtual"].iloc[0]
    assert (wall.commit, wall.dirty, wall.world_size, wall.servers) == ("abc", False, 3, 1)
    assert (wall.payload_bytes, wall.payload_bytes_per_step, wall.payload_bytes_per_sample) == (
        800,
        100.0,
        12.5,
    )
    assert (wall.time_to_easy_s, virtual.virtual_time_to_easy_s) == (1.0, 9.0)
    nulls = (
        wall.wire_bytes,
        wall.samples_to_target,
        wall.virtual_time_to_easy_s,
        virtual.time_to_easy_s,
        virtual.wall_s,
    )
    assert all(value is frame.wire_bytes.iloc[0] for value in nulls), nulls  # pandas.NA


def test_the_cache_follows_the_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.write(a_run(Cell(seed=1)))
    second = store.write(a_run(Cell(seed=2)))
    assert sorted(row["seed"] for row in store.rows()) == [1, 2]
    changed = json.loads(first.read_text())
    changed["result"]["final_loss"] = 7.25
    first.write_text(json.dumps(changed))
    os.utime(first, ns=(1, 1))
    second.unlink()
    assert [(row["seed"], row["final_loss"]) for row in store.rows()] == [(1, 7.25)]
    (tmp_path / ".frame-cache.json").write_text("not json")
    assert len(store.rows()) == 1


def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "results")
    for attempt in (store.check_writable, lambda: store.write(a_run())):
        with pytest.raises(
            StoreError, match=r"cannot be written: Not a directory; .*--results DIR"
        ):
            attempt()


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        Store(tmp_path).write(a_run())
    assert files(tmp_path) == []


def test_an_environment_is_written_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.write_environment("m", {"commit": "abc", "threads": 1.0})
    assert store.write_environment("m", {"threads": 1, "commit": "abc"}) == first
    assert [path.name for path in files(tmp_path)] == [f"{first}.json"]
    assert store.environment("m", first) == {"commit": "abc", "threads": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.runs() == [] and store.environment("m", "none") == {}


@pytest.mark.parametrize("root", ["results", "results/reference"])
def test_what_a_gpu_check_found_is_no_broken_run(tmp_path: Path, root: str) -> None:
    folder = tmp_path / "results" / "reference" / "gpu"
    folder.mkdir(parents=True)
    (folder / "gpu-check-20261127T135616Z.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Store(tmp_path / root).runs() == []
