"""Actors and a learner: V-trace by its definition, trajectories on the wire, lag and queue of real
runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from benchsuite.workloads.rl_vtrace import vtrace
from torch import Tensor

from benchsuite import rules
from benchsuite.laws import actor_learner
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.plan.plan import load
from benchsuite.report.spec import parse
from benchsuite.results.assemble import lag
from benchsuite.sync.actor_learner import Strategy, pack, unpack
from benchsuite.topology.server_log import ServerLog
from benchsuite.worker.rollouts import Batches
from benchsuite.worker.setup import Training
from benchsuite.workload import Batch
from tests.bench import ROOT, Bench
from tests.test_rl_agent import made, model

# V-trace


def n_step_returns(
    rewards: Tensor, values: Tensor, ends: Tensor, beyond: Tensor, discount: float
) -> Tensor:
    """From each time to the end of the row, or of the episode: discounted rewards, then the value
    there. (B, T)."""
    count, steps = rewards.shape
    returns = torch.empty_like(rewards)
    for row in range(count):
        for begin in range(steps):
            total = 0.0
            factor = 1.0
            for time in range(begin, steps):
                total += factor * float(rewards[row, time])
                factor *= discount
                if ends[row, time]:
                    total += factor * float(beyond[row, time])
                    break
            else:
                total += factor * float(values[row, steps])
            returns[row, begin] = total
    return returns


def drawn(seed: int) -> dict[str, Tensor]:
    """Whole and half numbers, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).double()

    ends = (torch.rand(6, 9, generator=generator) < 0.25).double()
    return {
        "rewards": whole(6, 9),
        "values": whole(6, 10) / 2,
        "ends": ends,
        "beyond": whole(6, 9) / 2 * ends,
    }


@pytest.mark.parametrize("seed", range(5))
def test_with_equal_policies_v_trace_is_the_n_step_return_exactly(seed: int) -> None:
    """rho = c = 1 (and whatever is above 1 is cut to it), lambda = 1."""
    case = drawn(seed)
    returns = n_step_returns(**case, discount=0.5)
    for ratio in (1.0, 7.0):
        targets, advantages = vtrace(
            torch.full((6, 9), ratio, dtype=torch.float64), **case, discount=0.5, trace=1.0
        )
        assert torch.equal(targets, returns), (targets - returns).abs().max()
        assert torch.equal(advantages, returns - case["values"][:, :-1])


def test_other_policies_give_other_targets() -> None:
    """The control: a ratio of 1/2 at one step changes what comes at and before it, and nothing
    behind it."""
    case = drawn(0)
    case["ends"], case["beyond"] = torch.zeros(6, 9).double(), torch.zeros(6, 9).double()
    ratios = torch.ones(6, 9, dtype=torch.float64)
    ratios[:, 4] = 0.5
    targets, _ = vtrace(ratios, **case, discount=0.5, trace=1.0)
    returns = n_step_returns(**case, discount=0.5)
    assert torch.equal(targets[:, 5:], returns[:, 5:])
    assert (targets[:, :5] != returns[:, :5]).any(0).all(), "a step before is blind to the ratio"


def test_v_trace_by_hand() -> None:
    """Two steps, gamma 1/2, rho = c = (1/2, 1): delta_0 = 1/2 (2 + 1/2 4 - 6) = -1, delta_1 = 3 +
    1/2 8 - 4 = 3; v_1 = 4 + 3 = 7, v_0 = 6 - 1 + 1/2 1/2 3 = 5.75; advantages 2 + 1/2 7 - 6 = -0.5
    and 3 + 1/2 8 - 4 = 3."""
    values = torch.tensor([[6.0, 4.0, 8.0]], dtype=torch.float64)
    none = torch.zeros(1, 2, dtype=torch.float64)
    ratios = torch.tensor([[0.5, 2.0]]).double()
    rewards = torch.tensor([[2.0, 3.0]]).double()
    targets, advantages = vtrace(ratios, rewards, values, none, none, discount=0.5, trace=1.0)
    assert targets.tolist() == [[5.75, 7.0]], targets
    assert advantages.tolist() == [[-0.5, 3.0]], advantages


def test_on_its_own_trajectory_the_learner_s_gradient_is_the_plain_actor_critic_s() -> None:
    """Ratios are 1 there, so the clipped surrogate and IMPALA's policy gradient agree."""
    grads = []
    for algorithm in ("ppo", "a2c"):
        workload = made(algorithm=algorithm, dtype=torch.float64)
        network = model(workload).double()
        batch = workload.trajectory(network, workload.environments(shard=0, num_shards=2), 0, 4)
        network.requires_grad_(True)
        loss = workload.loss(network(batch.x), batch)
        grads.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
        )
    gap = float((grads[0] - grads[1]).abs().max())
    assert gap < 1e-12 and float(grads[0].norm()) > 1e-3, gap


# trajectories


@pytest.mark.parametrize("preset", ["cartpole", "comm"])
def test_a_trajectory_has_the_shape_that_was_told_and_survives_the_wire(preset: str) -> None:
    workload = made(preset)
    shape = workload.trajectory_shape(2, num_shards=4, dtype=torch.float32)
    batch = workload.trajectory(model(workload), workload.environments(shard=1, num_shards=4), 0, 2)
    assert (batch.x.shape, batch.y.shape, batch.x.dtype) == (shape.x, shape.y, shape.x_dtype)
    assert batch.num_samples == shape.num_samples == 16
    packed = pack(7, batch)
    assert packed.numel() == 8 + shape.num_bytes
    version, again = unpack(packed, shape)
    assert version == 7 and torch.equal(again.x, batch.x) and torch.equal(again.y, batch.y)


def test_trajectories_join_where_they_meet() -> None:
    """The last state of one is the first of the next, and actions are not drawn twice."""
    workload = made()
    own = workload.environments(shard=0, num_shards=8)
    act = model(workload)
    first, second = (
        workload.trajectory(act, own, number, 4).x.view(2, 9, 4) for number in range(2)
    )
    assert torch.equal(first[:, -1], second[:, 0])


def test_a_worker_counts_its_own_trajectories() -> None:
    strategy: Any = Strategy(batches_per_trajectory=4)
    batches = Batches(made(), strategy=strategy)
    lengths = [
        batches.fetch((index, 0, 2), model(made())).y.shape for index in (9, 2, 5)
    ]  # as they were handed out
    assert lengths == [(8, 8, 5)] * 3 and batches.events == {"rollouts": 3}
    assert (batches.per_rollout, batches.per_push) == (1, 4)


def cell(**fields: Any) -> Cell:
    options = fields.pop("options", {})
    return resolve(
        Cell(
            workload="rl_agent",
            preset="smoke",
            sync="actor_learner",
            topology="parameter_server",
            precision="fp64",
            budget=Budget(steps=32),
            options={"actor_learner": options},
            **fields,
        )
    )


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_it_runs_on_ranks_of_virtual_time_too_and_replays(replicas: int) -> None:
    figure = actor_learner.log_replay(virtual_ranks, cell(replicas=replicas))
    assert figure.holds, str(figure)


def test_a_trajectory_of_another_version_than_the_log_says_is_refused() -> None:
    def miscounted(training: Training) -> Training:
        if training.is_server:
            whole = training.strategy.policy

            def policy() -> Any:
                made = whole()
                made.reads_ahead = 0  # though actors send one more before they read
                return made

            training.strategy.policy = policy  # type: ignore[method-assign]
        return training

    impatient: Any = partial(
        thread_ranks, timeout_s=3.0
    )  # the actor waits for an answer that does not come
    with pytest.raises(
        RuntimeError, match="a trajectory of version 0 from worker 0, whose log says 8"
    ):
        actor_learner.log_replay(
            impatient,
            cell(replicas=1, options={"ahead": 1, "batches_per_trajectory": 8}),
            change=miscounted,
        )


def test_reads_ahead_are_about_the_first_version() -> None:
    log = ServerLog(4, 1)
    log.read_ahead(1)
    versions = []
    for _ in range(3):
        versions.append(log.version_of(log.push(0, 0, 0, 0)))
        log.applied()
        log.answered(0)
    assert versions == [0, 0, 1]


def test_virtual_cells_are_refused_with_the_reason() -> None:
    found = rules.validate(cell(replicas=2, clock="virtual"))
    assert [problem.rule for problem in found] == ["virtual clock"] and "compute none" in found[
        0
    ].reason


# runs


def test_the_queue_is_what_was_sent_and_not_taken() -> None:
    assert lag.queue([0, 1, 2, 9], [1, 3, 4, 10]) == [2, 2, 1, 1]


@pytest.mark.procs
def test_a_run_states_lag_queue_and_bytes(bench: Bench) -> None:
    run = bench.ok(
        workload="rl_agent",
        preset="smoke",
        sync="actor_learner",
        topology="parameter_server",
        replicas=2,
        steps=64,
        timeout_s=60.0,
        options={"actor_learner": {"steps_per_trajectory": 2}},
    )
    result = run.result
    pushes = 64 * 2 // 16
    assert result["samples"] == 2048 and result["updates"] == 2 * pushes
    assert len(result["loss"]) == pushes and None not in result["loss"]
    assert result["policy_lag"] == result["staleness"] and result["policy_lag"]["max"] >= 2
    assert result["predicted_bytes"] == result["payload_bytes"] > 0
    assert result["evaluations"]["version"][-1] == result["updates"], (
        "the last parameters are those that count"
    )
    assert result["evaluations"]["samples"][-1] == 2048 and result["diverged_step"] is None
    assert 1 <= run.cost["queue_length"]["mean"] <= run.cost["queue_length"]["max"] <= 4
    assert len(run.raw["queue_length"]) == pushes


def test_a_batch_that_is_no_trajectory_is_packed_as_it_is() -> None:
    batch = Batch(torch.arange(3.0), torch.ones(2), 1)
    assert pack(1, batch).numel() == 8 + 12 + 8


def test_the_plan_of_agents_asks_for_all_three_at_equal_samples_and_shows_lag_and_seeds() -> None:
    plan = load(ROOT / "reports" / "rl.toml")
    cells = {cell.sync: cell for cell in plan.cells}
    assert set(cells) == {"synchronous", "asynchronous", "actor_learner"} and len(plan.seeds) == 10
    assert {(cell.budget.samples, cell.replicas) for cell in cells.values()} == {(65_536, 2)}
    assert all(rules.validate(cell) == [] for cell in cells.values())
    figures = parse(plan.figures, plan.cells)
    assert {"seeds", "metric_against", "table"} <= {figure.kind for figure in figures}
    assert any("policy_lag" in figure.values.get("columns", ()) for figure in figures)
