"""Nothing survives 5 s, whoever of command, cell host and fork server is killed, and however the
ranks are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchsuite.cluster import local
from benchsuite.cluster.local import Cluster
from benchsuite.measure import beat
from benchsuite.plan.cell import Budget, Cell
from benchsuite.results.record import Status

pytestmark = [pytest.mark.procs, pytest.mark.timeout(60)]
HERE = Path(__file__).parent
LIMIT_S = 5.0


def stat(pid: int) -> list[str]:
    """State, parent, group, session .. of a process; [] where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def session(host: int) -> set[int]:
    """The living processes of a host's session: the host, its fork server, ranks and resource
    tracker."""
    found = set()
    for folder in Path("/proc").iterdir():
        fields = stat(int(folder.name)) if folder.name.isdigit() else []
        if fields and int(fields[3]) == host and fields[0] not in "ZX":
            found.add(int(folder.name))
    return found


def until(condition: Callable[[], object], *, limit_s: float, what: str) -> float:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < limit_s, f"{what}: not within {limit_s:g} s"
        time.sleep(0.01)
    return time.monotonic() - begin


def rank_pids(run_dir: Path, num_ranks: int = 2) -> list[int]:
    """Process ids of the ranks, once all are in compute."""
    pulses = [beat.read(run_dir / f"rank{rank}.beat") for rank in range(num_ranks)]
    return [pulse.pid for pulse in pulses] if all(pulse.seq for pulse in pulses) else []


def host_of(rank: int) -> int:
    return int(stat(rank)[3])


def server_of(rank: int) -> int:
    return int(stat(rank)[1])


@contextmanager
def driver(
    folder: Path, *, fault: str = "", entry: str = "asleep", num_cells: int = 1
) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        str(HERE / "cluster_driver.py"),
        str(folder),
        f"cluster_entries:{entry}",
        fault,
        str(num_cells),
    ]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()


@pytest.mark.parametrize("victim", ["command", "host", "fork server"])
@pytest.mark.parametrize("fault", ["", "SIGSTOP"])
def test_nothing_survives_the_death_of(victim: str, fault: str, tmp_path: Path) -> None:
    with driver(tmp_path, fault=fault) as command:
        until(lambda: rank_pids(tmp_path / "0"), limit_s=10, what="ranks")
        ranks = rank_pids(tmp_path / "0")
        if fault:
            until(lambda: stat(ranks[1])[0] == "T", limit_s=5, what="the stopped rank")
        host = host_of(ranks[0])
        server = server_of(ranks[0])
        everyone = session(host)
        assert {host, server, *ranks} <= everyone
        os.kill(
            {"command": command.pid, "host": host, "fork server": server}[victim], signal.SIGKILL
        )
        until(
            lambda: not session(host),
            limit_s=LIMIT_S,
            what=f"end of {len(everyone)} processes after {victim}",
        )
        command.wait(LIMIT_S)
        said = command.stdout.read() if command.stdout else ""
    if victim == "host":
        assert said == "failed host lost: it was ended by SIGKILL\n"
    if victim == "fork server":
        assert (
            said == "failed the fork server of the ranks was lost; the next cell gets a new one\n"
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fault", ["", "SIGSTOP"])
def test_ctrl_c_ends_with_130_and_leaves_nothing(
    number: signal.Signals, fault: str, tmp_path: Path
) -> None:
    with driver(tmp_path, fault=fault) as command:
        until(lambda: rank_pids(tmp_path / "0"), limit_s=10, what="ranks")
        host = host_of(rank_pids(tmp_path / "0")[0])
        command.send_signal(number)
        assert command.wait(LIMIT_S) == 130
        assert until(lambda: not session(host), limit_s=0.5, what="end of the host's session") < 0.5


def test_ctrl_c_while_the_host_starts_leaves_nothing(tmp_path: Path) -> None:
    with driver(tmp_path) as command:
        until(lambda: children(command.pid), limit_s=5, what="the host")
        (host,) = children(command.pid)
        until(lambda: session(host), limit_s=5, what="the host's session")
        command.send_signal(signal.SIGINT)
        assert command.wait(LIMIT_S) == 130
        until(lambda: not session(host), limit_s=LIMIT_S, what="end of the host's session")


def children(parent: int) -> list[int]:
    return [
        int(text) for text in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ]


@pytest.mark.parametrize("victim", [host_of, server_of])
def test_the_next_cell_runs_after_the_death_of_the_host_or_its_fork_server(
    victim: Callable[[int], int], tmp_path: Path
) -> None:
    def kill() -> None:
        until(lambda: rank_pids(tmp_path / "0"), limit_s=10, what="ranks")
        os.kill(victim(rank_pids(tmp_path / "0")[0]), signal.SIGKILL)

    cell = Cell(replicas=2, budget=Budget(timeout_s=20))
    with Cluster(entry="cluster_entries:first_asleep", modules=(), path=(str(HERE),)) as cluster:
        thread = threading.Thread(target=kill)
        thread.start()
        first = cluster.run(cell, tmp_path / "0")
        thread.join()
        second = cluster.run(cell.with_seed(1), tmp_path / "1")
    assert first.status is Status.FAILED
    assert first.culprit is None
    assert first.seconds < LIMIT_S
    assert second.status is Status.OK, second


def test_a_silent_host_is_lost_after_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        until(lambda: rank_pids(tmp_path), limit_s=10, what="ranks")
        os.kill(host_of(rank_pids(tmp_path)[0]), signal.SIGSTOP)

    monkeypatch.setattr(local, "GRACE_S", 0.5)
    with Cluster(entry="cluster_entries:asleep", modules=(), path=(str(HERE),)) as cluster:
        thread = threading.Thread(target=stop)
        thread.start()
        outcome = cluster.run(Cell(replicas=2, budget=Budget(timeout_s=0.5)), tmp_path)
        thread.join()
    assert outcome.reason == "host lost: no word from it for 1 s"


def test_an_interrupted_cell_leaves_the_cluster_usable(tmp_path: Path) -> None:
    def interrupt() -> None:
        until(lambda: rank_pids(tmp_path / "0"), limit_s=10, what="ranks")
        os.kill(os.getpid(), signal.SIGINT)

    with Cluster(entry="cluster_entries:first_asleep", modules=(), path=(str(HERE),)) as cluster:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            cluster.run(Cell(replicas=2), tmp_path / "0")
        thread.join()
        assert cluster.run(Cell(replicas=2, seed=1), tmp_path / "1").status is Status.OK


def test_two_suites_at_once_do_not_mix(tmp_path: Path) -> None:
    with (
        driver(tmp_path / "a", entry="named", num_cells=15) as a,
        driver(tmp_path / "b", entry="named", num_cells=15) as b,
    ):
        said = [process.communicate(timeout=30)[0] for process in (a, b)]
    assert said == ["ok None\n" * 15] * 2
    for suite in ("a", "b"):
        for path in (tmp_path / suite).glob("*/rank*.json"):
            assert path.read_text() == str(path.parent), "a rank of the other suite wrote here"


def test_a_cluster_works_from_another_thread(tmp_path: Path) -> None:
    outcomes = []

    def suite() -> None:
        with Cluster(entry="cluster_entries:trivial", modules=(), path=(str(HERE),)) as cluster:
            outcomes.append(cluster.run(Cell(replicas=2), tmp_path))

    thread = threading.Thread(target=suite)
    thread.start()
    thread.join()
    assert [outcome.status for outcome in outcomes] == [Status.OK]


def test_without_user_namespaces_the_cells_run_and_the_reason_is_known(
    tmp_path: Path,
) -> None:
    cluster = Cluster(entry="cluster_entries:trivial", modules=(), path=(str(HERE),))
    cluster.network_reason = "no private network: tried before"
    with cluster:
        assert cluster.run(Cell(replicas=2), tmp_path).status is Status.OK
        assert cluster.network_reason == "no private network: tried before"
    assert '"private": false' in (tmp_path / "rank0.json").read_text()
