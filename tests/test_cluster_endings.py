"""Every ending of a cell names the right rank, and the next cell runs. Real processes over gloo."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchsuite.cluster.local import Cluster
from benchsuite.measure import beat
from benchsuite.plan.cell import Budget, Cell
from benchsuite.results.record import LOST_WORKER, Status

pytestmark = [pytest.mark.procs, pytest.mark.timeout(60)]
HERE = str(Path(__file__).parent)


def new_cluster(entry: str) -> Cluster:
    return Cluster(
        entry=f"cluster_entries:{entry}",
        modules=("torch", "torch.distributed", "numpy"),
        path=(HERE,),
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with new_cluster("connected") as started:
        yield started


@pytest.fixture(scope="module")
def loose() -> Iterator[Cluster]:
    """Starts ranks of other entries; no torch, so it is there at once."""
    with Cluster(entry="cluster_entries:trivial", modules=(), path=(HERE,)) as started:
        yield started


def cell(
    *,
    faults: tuple[dict[str, object], ...] = (),
    servers: int = 0,
    timeout_s: float = 30.0,
    **more: object,
) -> Cell:
    topology = "parameter_server" if servers else "native"
    budget = Budget(steps=20, timeout_s=timeout_s)
    return Cell(
        replicas=2, servers=servers, topology=topology, budget=budget, faults=faults, **more
    )


def fault(rank: int, phase: str, how: str) -> tuple[dict[str, object], ...]:
    return ({"rank": rank, "phase": phase, "step": 3, "signal": how},)


@pytest.mark.parametrize(
    ("rank", "phase", "servers"),
    [
        (1, "compute", 0),
        (0, "compute", 0),
        (1, "send", 0),
        (0, "barrier", 0),
        (0, "send", 1),
        (2, "serve", 1),
        (2, "update", 1),
    ],
)
def test_a_killed_rank_is_named_within_5_s_and_the_next_cell_runs(
    cluster: Cluster, tmp_path: Path, rank: int, phase: str, servers: int
) -> None:
    begin = time.monotonic()
    outcome = cluster.run(
        cell(faults=fault(rank, phase, "SIGKILL"), servers=servers), tmp_path / "a"
    )
    seconds = time.monotonic() - begin
    assert outcome.status is Status.FAILED, outcome
    assert outcome.culprit is not None
    role = "server" if rank == 2 else "worker"
    assert dict(outcome.culprit) == {
        "rank": rank,
        "role": role,
        "how": "SIGKILL",
        "phase": phase,
        "step": 3,
    }
    assert outcome.reason == f"rank {rank} ({role}) was ended by SIGKILL in {phase} of step 3"
    assert seconds < 5.0
    assert cluster.run(cell(servers=servers), tmp_path / "b").status is Status.OK


@pytest.mark.parametrize("seed", range(6))
def test_a_rank_killed_at_a_random_moment_is_named(
    cluster: Cluster, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    rank = rng.randrange(2)
    servers = seed % 2
    endless = Cell(
        replicas=2,
        servers=servers,
        topology="parameter_server" if servers else "native",
        budget=Budget(steps=10**6, timeout_s=30),
    )
    killer = threading.Thread(
        target=_kill_later, args=(tmp_path / f"rank{rank}.beat", rng.uniform(0.0, 0.15))
    )
    killer.start()
    outcome = cluster.run(endless, tmp_path)
    killer.join()
    assert outcome.status is Status.FAILED, outcome
    assert outcome.culprit is not None
    assert (outcome.culprit["rank"], outcome.culprit["how"]) == (rank, "SIGKILL"), outcome
    assert outcome.seconds < 5.0


def _kill_later(path: Path, delay_s: float) -> None:
    while not beat.read(path).pid:
        time.sleep(0.001)
    time.sleep(delay_s)
    os.kill(beat.read(path).pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("rank", "phase", "how", "words", "servers"),
    [
        (1, "send", "SIGSTOP", "stopped", 0),
        (0, "barrier", "SIGSTOP", "stopped", 0),
        (2, "update", "SIGSTOP", "stopped", 1),
        (1, "compute", "spin", "no progress", 0),
        (1, "barrier", "spin", "no progress", 0),
        (2, "serve", "spin", "no progress", 1),
    ],
)
def test_a_silent_rank_is_a_timeout_at_the_deadline_and_is_named(
    cluster: Cluster, tmp_path: Path, rank: int, phase: str, how: str, words: str, servers: int
) -> None:
    outcome = cluster.run(
        cell(faults=fault(rank, phase, how), servers=servers, timeout_s=1.5), tmp_path
    )
    assert outcome.status is Status.TIMEOUT, outcome
    assert outcome.culprit is not None
    assert (outcome.culprit["rank"], outcome.culprit["how"], outcome.culprit["phase"]) == (
        rank,
        words,
        phase,
    ), outcome
    assert 1.5 <= outcome.seconds < 2.5, f"ended after {outcome.seconds:.2f} s, deadline 1.5 s"


def test_a_rank_that_exits_0_early_is_named(cluster: Cluster, tmp_path: Path) -> None:
    outcome = cluster.run(cell(faults=fault(1, "compute", "exit0")), tmp_path)
    assert outcome.status is Status.FAILED
    assert outcome.culprit is not None
    assert (outcome.culprit["rank"], outcome.culprit["how"]) == (1, "exit 0 without a result"), (
        outcome
    )
    assert outcome.seconds < 5.0


def test_a_rank_that_raises_is_named_with_the_last_line_of_its_traceback(
    cluster: Cluster, tmp_path: Path
) -> None:
    outcome = cluster.run(cell(faults=fault(1, "send", "raise")), tmp_path)
    assert outcome.status is Status.FAILED
    assert outcome.culprit is not None
    assert outcome.culprit["rank"] == 1, outcome
    assert outcome.culprit["how"].startswith(
        "error: benchsuite.measure.faults.InjectedFault: the fault"
    ), outcome
    assert (
        "InjectedFault: the fault that this cell asked for" in (tmp_path / "rank1.log").read_text()
    )
    assert outcome.seconds < 5.0


def test_a_finished_cell_leaves_records_and_logs_only(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.run(cell(), tmp_path).status is Status.OK
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"rank{rank}.{kind}" for rank in (0, 1) for kind in ("json", "log", "ok")]


def test_a_worker_that_can_be_spared_costs_a_flag_and_the_servers_hear_its_goodbye(
    tmp_path: Path,
) -> None:
    with Cluster(entry="cluster_entries:survivors", modules=(), path=(HERE,)) as survivors:
        spared = cell(
            faults=({"rank": 1, "phase": "compute", "step": 0, "signal": "SIGKILL"},),
            servers=1,
            sync="asynchronous",
        )
        outcome = survivors.run(spared, tmp_path)
    assert outcome.status is Status.OK, outcome
    assert outcome.flags == (LOST_WORKER,)
    assert outcome.culprit is not None
    assert (outcome.culprit["rank"], outcome.culprit["how"]) == (1, "SIGKILL")


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with Cluster(entry="cluster_entries:full_disk", modules=(), path=(HERE,)) as cluster:
        outcome = cluster.run(cell(), tmp_path)
    assert outcome.status is Status.FAILED
    assert outcome.culprit is not None
    assert (outcome.culprit["rank"], outcome.culprit["how"]) == (1, "cannot write"), outcome
    assert outcome.reason is not None
    assert "File too large" in outcome.reason
    assert not list(tmp_path.glob("rank1.json*")) and not list(tmp_path.glob(".*")), (
        "nothing half-written"
    )


def test_a_rank_that_hands_its_record_in_and_does_not_end_is_no_failure(tmp_path: Path) -> None:
    with Cluster(entry="cluster_entries:lingering", modules=(), path=(HERE,)) as cluster:
        outcome = cluster.run(cell(), tmp_path)
    assert outcome.status is Status.OK, outcome
    assert outcome.seconds < 5.0


def test_an_unusable_run_directory_is_one_clear_line(loose: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = loose.run(cell(), tmp_path / "file" / "run")
    assert outcome.status is Status.FAILED
    assert outcome.reason == f"cannot write to {tmp_path / 'file' / 'run'}: Not a directory"


def test_a_fault_that_names_no_rank_is_unsupported(loose: Cluster, tmp_path: Path) -> None:
    outcome = loose.run(cell(faults=fault(2, "send", "SIGKILL")), tmp_path)
    assert (outcome.status, outcome.reason) == (
        Status.UNSUPPORTED,
        "fault rank 2 is not below the cell's 2 ranks",
    )


def test_the_ranks_are_alone_in_their_network_or_the_reason_is_known(
    loose: Cluster, tmp_path: Path
) -> None:
    assert loose.run(cell(), tmp_path).status is Status.OK
    alone = '"private": true' in (tmp_path / "rank0.json").read_text()
    assert alone == (not loose.network_reason)


def test_a_long_tmpdir_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("t" * 125)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with Cluster(entry="cluster_entries:trivial", modules=(), path=(HERE,)) as started:
        outcome = started.run(cell(), tmp_path / "run")
        scratch = Path(started._scratch)
        assert outcome.status is Status.OK, outcome
        assert scratch.parent == Path("/tmp") and scratch.is_dir()
    assert not scratch.exists() and not list(long.iterdir())
