"""Environment, code id, load, wire bytes and memory: each figure is provoked and must show."""

from __future__ import annotations

import json
import mmap
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchsuite.measure import environment, load, memory, wire
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell, resolve
from benchsuite.results.record import environment_id

SPIN = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass\n"
MIB = 1 << 20


# environment


def test_environment_names_neither_host_nor_user_and_takes_variables_by_allow_list(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MY_SECRET_TOKEN", "hunter2")
    collected = environment.collect()
    text = json.dumps(collected)
    assert collected["variables"]["OMP_NUM_THREADS"] == "3"
    assert "hunter2" not in text and f"{Path.home()}/" not in text.replace("//", "")
    if len(socket.gethostname()) > 4:
        assert socket.gethostname() not in text
    assert (
        collected["versions"]["torch"]
        and collected["cores"] == load.num_cores()
        and collected["memory_bytes"] > 0
    )


def test_environment_id_is_stable_and_changes_with_the_content():
    collected = environment.collect()
    assert environment_id(collected) == environment_id(environment.collect())
    assert environment_id(collected) != environment_id(collected | {"kernel": "other"})


def test_machine_slug_is_a_folder_name_with_cores():
    slug = environment.machine()
    assert slug == environment.machine()
    assert f"-{load.num_cores()}c-" in slug
    assert set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(slug) <= 64


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "intel-xeon-e5-2680-v4-"),
        ("AMD EPYC 7B13 64-Core Processor", "amd-epyc-7b13-"),
        ("", "unknown-"),
    ],
)
def test_machine_slug_of_known_processors(monkeypatch, model, slug):
    monkeypatch.setattr(environment, "cpu_model", lambda: model)
    monkeypatch.setattr(environment, "gpus", lambda: ())
    assert environment.machine().startswith(slug)


def test_commit_is_that_of_the_clone_also_inside_a_git_hook(monkeypatch):
    clone = plugins.PACKAGE.parent
    if not (clone / ".git").exists():
        assert environment.code_version() == (f"wheel {environment.VERSION}", False)
        return
    head = subprocess.run(
        ["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert environment.code_version()[0] == head


def test_a_package_inside_a_foreign_repository_is_a_wheel(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(environment, "PACKAGE", tmp_path / "venv" / "site-packages" / "benchsuite")
    (tmp_path / "venv" / "site-packages" / "benchsuite").mkdir(parents=True)
    assert environment.code_version()[0].startswith("wheel ")


# load


def test_oversubscribed_counts_servers_and_threads():
    asynchronous = resolve(Cell(sync="asynchronous", topology="parameter_server", replicas=2))
    assert load.oversubscribed(asynchronous, cores=2)  # 2 workers + 1 server
    assert not load.oversubscribed(asynchronous, cores=3)
    assert not load.oversubscribed(resolve(Cell(replicas=2)), cores=2)
    assert load.oversubscribed(resolve(Cell(replicas=2, threads=2)), cores=3)


def test_own_cpu_time_contains_dead_children():
    meter = load.CpuMeter()
    subprocess.run([sys.executable, "-c", SPIN.format(seconds=0.3)], check=True)
    read = meter.read()
    assert read.own_s is not None and read.own_s >= 0.3 - 0.02
    assert read.busy_s is not None and read.busy_s >= 0.3 - 0.05


def test_own_cpu_time_contains_living_grandchildren():
    meter = load.CpuMeter()
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN.format(seconds=30)!r}])"
    child = subprocess.Popen([sys.executable, "-c", nested], start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while (meter.read().own_s or 0) < 0.2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (meter.read().own_s or 0) >= 0.2
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_foreign_load_is_seen_and_is_not_ours():
    """A spinner outside the tree (the meter's root is a sleeping child) makes the run
    `contended`."""
    sleeper = subprocess.Popen(["sleep", "60"])
    meter = load.CpuMeter(root=sleeper.pid)
    spinner = subprocess.Popen([sys.executable, "-c", SPIN.format(seconds=60)])
    try:
        deadline = time.monotonic() + 20
        while (meter.read().busy_s or 0) < 0.4 and time.monotonic() < deadline:
            time.sleep(0.05)
        read = meter.read()
    finally:
        for process in (spinner, sleeper):
            process.kill()
            process.wait()
    assert read.own_s is not None and read.own_s < 0.05
    assert read.foreign_share is not None and read.foreign_share > load.CONTENDED_ABOVE
    assert read.contended


def test_contended_begins_above_five_percent_of_our_cores():
    assert not load.CpuLoad(
        seconds=10, cores=2, busy_s=11.0, own_s=10.0
    ).contended  # 1 of 20 core seconds
    assert load.CpuLoad(seconds=10, cores=2, busy_s=11.1, own_s=10.0).contended
    assert (
        load.CpuLoad(seconds=10, cores=2, busy_s=None, own_s=None, reason="x").foreign_share is None
    )


# wire


def _in_private_network(body: str) -> dict[str, object]:
    """Runs a script alone in a network namespace with `lo` up; its last line is JSON. Skips where
    there is none."""
    script = f"""
import ctypes, fcntl, json, os, socket, struct, threading
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x40000000) != 0 and libc.unshare(0x50000000) != 0:
    raise SystemExit(70)
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))
from benchsuite.measure import wire
{body}
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    if done.returncode == 70:
        pytest.skip("no network namespace: neither root nor user namespaces are allowed here")
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


SEND = """
def send(num_bytes):
    listener = socket.create_server(("127.0.0.1", 0))
    def drain():
        connection, _ = listener.accept()
        while connection.recv(1 << 16):
            pass
        connection.close()
    thread = threading.Thread(target=drain)
    thread.start()
    with socket.create_connection(listener.getsockname()) as s:
        s.sendall(bytes(num_bytes))
    thread.join()
    listener.close()
"""


@pytest.mark.netns
def test_one_mebibyte_over_loopback_is_seen_once():
    body = (
        SEND + "meter = wire.WireMeter(lambda: None, private=True)\nmeter.start()\nsend(1 << 20)\n"
    )
    answer = _in_private_network(body + "print(json.dumps(meter.stop().to_json()))")
    assert answer["reason"] is None and answer["idle_bytes"] == 0 and answer["retransmits"] == 0
    assert isinstance(answer["bytes"], int)
    assert 1.0 <= answer["bytes"] / MIB < 1.02, (
        f"{answer['bytes']} bytes on the wire for {MIB} sent"
    )


@pytest.mark.netns
def test_what_the_barriers_send_is_taken_off():
    """A barrier of 3000 bytes: the idle correction takes exactly a reading's two barriers off."""
    body = SEND + (
        "meter = wire.WireMeter(lambda: send(3000), private=True)\nmeter.start()\n"
        "idle = meter.stop()\nmeter.start()\nsend(1 << 20)\nbusy = meter.stop()\n"
        "print(json.dumps({'idle': idle.to_json(), 'busy': busy.to_json()}))"
    )
    answer = _in_private_network(body)
    idle = answer["idle"]
    busy = answer["busy"]
    assert isinstance(idle, dict) and isinstance(busy, dict)
    assert idle["idle_bytes"] > 6000  # without the correction the idle interval would show this
    assert idle["bytes"] < 300
    assert 1.0 <= busy["bytes"] / MIB < 1.02


def test_without_a_private_network_there_is_a_reason_and_every_barrier_is_still_held():
    barriers = []
    meter = wire.WireMeter(
        lambda: barriers.append(1), private=False, reason="unshare: not permitted"
    )
    meter.start()
    assert meter.stop() == wire.WireBytes(reason="unshare: not permitted")
    meant = []
    reading = wire.WireMeter(lambda: meant.append(1), private=True)
    reading.start()
    reading.stop()
    assert len(barriers) == len(meant) > 0


def test_an_unknown_interface_is_a_reason_and_names_the_known_ones():
    meter = wire.WireMeter(lambda: None, private=True, interface="nosuch0")
    meter.start()
    result = meter.stop()
    assert (
        result.bytes is None
        and "nosuch0" in (result.reason or "")
        and "lo" in (result.reason or "")
    )


# memory


def _in_fork(function) -> list[int]:
    """Runs the function in a forked child and returns the integers that it gave."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write_end, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer: list[int] = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return answer


def _touch(num_bytes: int) -> None:
    """Fresh pages: a heap that earlier tests have grown would give old ones."""
    with mmap.mmap(-1, num_bytes) as block:
        for page in range(0, num_bytes, mmap.PAGESIZE):
            block[page] = 1


@pytest.mark.skipif(threading.active_count() > 1, reason="fork with threads")
def test_a_forked_child_does_not_inherit_its_parents_peak():
    _touch(96 * MIB)
    parent = memory.peak_rss_bytes()
    before, after = _in_fork(
        lambda: [memory.peak_rss_bytes(), _touch(32 * MIB) or memory.peak_rss_bytes()]
    )
    assert parent - before > 48 * MIB, f"parent's peak {parent}, child starts with {before}"
    assert 31 * MIB < after - before < 48 * MIB


_AGAIN = """
import resource, sys
import numpy as np
from benchsuite.measure.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(40 * 2**20, dtype=np.uint8).fill(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
@pytest.mark.parametrize(
    ("order", "variables", "kept"),
    [
        ("keep", {}, True),
        ("leave", {}, False),
        ("keep", {"MALLOC_MMAP_THRESHOLD_": "131072"}, False),
    ],
)
def test_freed_memory_is_kept_unless_the_user_tunes_the_allocator(
    order: str, variables: dict[str, str], kept: bool
) -> None:
    command = [sys.executable, "-c", _AGAIN, order]
    done = subprocess.run(
        command,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    faults = int(done.stdout)  # all again: 10,240 small pages or 20 huge ones
    assert (faults < 10) == kept, f"{faults} page faults in a vector whose memory was freed before"


@pytest.mark.skipif(not memory.reset_peak(), reason="this system does not reset peaks")
def test_reset_peak_forgets_what_was_freed():
    _touch(64 * MIB)
    high = memory.peak_rss_bytes()
    assert memory.reset_peak()
    assert high - memory.peak_rss_bytes() > 32 * MIB
    resident = memory.rss_bytes()
    assert resident is not None and abs(memory.peak_rss_bytes() - resident) < 8 * MIB


@pytest.mark.skipif(not memory.reset_peak(), reason="this system does not reset peaks")
def test_what_training_takes_is_its_peak_minus_what_was_there_before():
    """Not what imports and data took before, nor what an evaluation takes after; the whole peak has
    all of it."""
    _touch(96 * MIB)
    of_rank = memory.RankMemory()
    of_rank.begin_model()
    _touch(48 * MIB)
    of_rank.end_loop()
    _touch(64 * MIB)
    assert of_rank.peak_model_bytes is not None
    assert 47 * MIB < of_rank.peak_model_bytes < 60 * MIB, (
        f"{of_rank.peak_model_bytes / MIB:.1f} MiB, not 48"
    )
    assert of_rank.base_rss_bytes is not None
    assert of_rank.peak_rss_bytes - of_rank.base_rss_bytes > 60 * MIB
