"""Who is to blame, decided without any process: the order of evidence of `classify`."""

from __future__ import annotations

import pytest

from benchsuite.cluster.cell_outcome import SERVER_LOST, RankEnd, classify
from benchsuite.measure.beat import Phase, Pulse
from benchsuite.results.record import LOST_WORKER, Outcome, Status
from benchsuite.worker.job import EXIT_ABORTED, EXIT_CANNOT_WRITE


def end(
    rank: int, code: int | None, *, seq: int = 10, phase: Phase = Phase.RECV, **more: object
) -> RankEnd:
    pulse = Pulse(pid=100 + rank, step=seq // 2, seq=seq, phase=phase, time_ns=seq)
    given = {
        "role": "worker",
        "state": "S" if code is None else "",
        "order": 0 if code is None else 1,
        "pulse": pulse,
    }
    return RankEnd(rank=rank, exit_code=code, **{**given, **more})  # type: ignore[arg-type]


def judge(*ends: RankEnd, at_deadline: bool = False, survives: bool = False) -> Outcome:
    return classify(ends, timeout_s=7.5, at_deadline=at_deadline, survives=survives)


def culprit(outcome: Outcome) -> tuple[int, str]:
    assert outcome.culprit is not None, outcome
    return outcome.culprit["rank"], outcome.culprit["how"]


def test_complete_records_prove_success_whatever_the_exit_codes() -> None:
    assert judge(end(0, 0, complete=True), end(1, -11, complete=True)).status is Status.OK
    assert (
        judge(end(0, None, complete=True), end(1, 0, complete=True), at_deadline=True).status
        is Status.OK
    )


def test_exit_codes_of_0_prove_nothing() -> None:
    outcome = judge(end(0, 0, complete=True), end(1, 0))
    assert (outcome.status, culprit(outcome)) == (Status.FAILED, (1, "exit 0 without a result"))


def test_the_first_of_several_early_exits_is_named() -> None:
    assert culprit(judge(end(0, 0, order=2, seq=1), end(1, 0, order=1)))[0] == 1


def test_a_rank_that_cannot_write_goes_before_everything_else() -> None:
    outcome = judge(
        end(0, -9), end(1, EXIT_CANNOT_WRITE, error="No space left on device: /r/rank1.json")
    )
    assert culprit(outcome) == (1, "cannot write")
    assert (
        outcome.reason
        == "rank 1 (worker) could not write its record: No space left on device: /r/rank1.json"
    )


def test_a_lost_fork_server_has_no_culprit() -> None:
    outcome = judge(end(0, SERVER_LOST), end(1, SERVER_LOST))
    assert (outcome.status, outcome.culprit) == (Status.FAILED, None)
    assert judge(end(0, EXIT_ABORTED), end(1, SERVER_LOST)).culprit is None


def test_a_killed_rank_goes_before_those_that_raised_because_of_it() -> None:
    outcome = judge(
        end(0, 1, order=1, error="RuntimeError: Connection closed by peer"), end(1, -9, order=2)
    )
    assert culprit(outcome) == (1, "SIGKILL")
    assert outcome.reason == "rank 1 (worker) was ended by SIGKILL in recv of step 5"


def test_an_abort_that_follows_does_not_hide_the_kill() -> None:
    assert culprit(judge(end(0, -6, order=1), end(1, -9, order=1))) == (1, "SIGKILL")
    assert culprit(judge(end(0, -9, order=2), end(1, -11, order=1))) == (1, "SIGSEGV")


def test_an_error_of_its_own_goes_before_one_that_follows() -> None:
    lost_peer = end(
        0,
        1,
        seq=2,
        order=1,
        error="RuntimeError: [gloo/pair.cc:525] Read error: Connection reset by peer",
    )
    own = end(1, 1, seq=9, order=2, error="ValueError: no such layer")
    assert culprit(judge(lost_peer, own)) == (1, "error: ValueError: no such layer")
    assert culprit(judge(lost_peer, end(1, EXIT_ABORTED, seq=1)))[0] == 1, (
        "no primary error: the one furthest behind"
    )


def test_among_errors_of_their_own_the_rank_furthest_behind_is_named_and_the_first_of_equals() -> (
    None
):
    assert culprit(judge(end(0, 1, seq=9, error="A"), end(1, 1, seq=8, order=2, error="B")))[0] == 1
    assert culprit(judge(end(0, 1, order=2, error="A"), end(1, 1, order=1, error="B")))[0] == 1


def test_at_the_deadline_a_stopped_rank_is_named_even_if_it_is_ahead() -> None:
    outcome = judge(
        end(0, None, seq=3), end(1, None, state="T", seq=9, phase=Phase.BARRIER), at_deadline=True
    )
    assert (outcome.status, culprit(outcome)) == (Status.TIMEOUT, (1, "stopped"))
    assert (
        outcome.reason
        == "not finished after 7.5 s (budget.timeout_s): rank 1 (worker) was stopped in barrier of step 4"
    )


@pytest.mark.parametrize(
    ("waiting", "guilty"),
    [
        (end(0, None, seq=4), end(1, None, seq=9, state="R")),  # runs while the other sleeps
        (
            end(0, None, seq=4),
            end(1, None, seq=9, phase=Phase.COMPUTE),
        ),  # works while the other waits in recv
        (end(0, None, seq=9), end(1, None, seq=4)),  # is behind
        (
            end(0, None, phase=Phase.BARRIER),
            end(1, None, phase=Phase.SEND),
        ),  # is earlier in the step
    ],
)
def test_at_the_deadline_the_rank_that_holds_up_the_others_is_named(
    waiting: RankEnd, guilty: RankEnd
) -> None:
    assert culprit(judge(waiting, guilty, at_deadline=True)) == (1, "no progress")


def test_a_rank_that_never_began_is_said_to() -> None:
    outcome = judge(end(0, None), end(1, -9, pulse=Pulse()))
    assert outcome.reason == "rank 1 (worker) was ended by SIGKILL before it had begun"


def test_a_spared_worker_is_a_flag_only_if_the_strategy_survives_and_all_others_are_complete() -> (
    None
):
    dead = end(1, -9)
    done = end(0, 0, complete=True)
    server = end(2, 0, complete=True, role="server")
    outcome = judge(done, dead, server, survives=True)
    assert (outcome.status, outcome.flags, culprit(outcome)) == (
        Status.OK,
        (LOST_WORKER,),
        (1, "SIGKILL"),
    )
    assert judge(done, dead, server).status is Status.FAILED
    assert judge(end(0, 1), dead, server, survives=True).status is Status.FAILED
    assert (
        judge(end(0, 0, complete=True), end(2, -9, role="server"), survives=True).status
        is Status.FAILED
    )
