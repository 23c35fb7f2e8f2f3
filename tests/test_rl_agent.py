"""The agent: the pole has gymnasium's bits, sizes and operations, N workers make the update of one,
lags and bytes."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from benchsuite.workloads.rl_agent import Workload, presets
from benchsuite.workloads.rl_worlds import TIME_LIMIT, CartPole, Frames
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchsuite import rules
from benchsuite.laws import MakeRanks, synchronous, traffic
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.runs import remembered
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.worker.rollouts import Batches, agrees, example
from benchsuite.worker.setup import Training, make
from benchsuite.workload import seeded_layers, trained_parameters
from tests.bench import Bench

torch.set_num_threads(1)

SIZES = {"cartpole": 9_155, "smoke": 9_155, "cluster": 9_155, "comm": 1_687_719, "atari": 1_687_719}


def made(
    preset: str = "cartpole", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Workload:
    fields = {field.name for field in dataclasses.fields(Workload)}
    workload = Workload(
        **{**{key: value for key, value in presets[preset].items() if key in fields}, **options}
    )
    if workload.environment != "atari":
        workload.start(seed=seed, dtype=dtype)
    return workload


def model(workload: Workload, seed: int = 0) -> nn.Module:
    return nn.Sequential(*seeded_layers(workload, seed)).requires_grad_(False)


# the pole


def streams(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, number]) for number in range(count)]


def test_the_pole_has_the_bits_of_gymnasium_s() -> None:
    """Random and balancing actions, falls, time limits and restarts: states, observations, endings
    of every step."""
    gymnasium = pytest.importorskip("gymnasium")
    count = 16
    steps = 1500
    ends = 0
    late_ends = 0
    ours = CartPole(streams(count))
    theirs = [gymnasium.make("CartPole-v1") for _ in range(count)]
    for environment, stream in zip(theirs, streams(count), strict=True):
        environment.reset(seed=0)
        environment.unwrapped.np_random = stream
        environment.reset()
    draws = np.random.default_rng(7)
    for step in range(steps):
        tilt = ours.state[2] + 0.3 * ours.state[3] + 0.02 * ours.state[0] + 0.05 * ours.state[1]
        actions = np.where(np.arange(count) < 8, tilt > 0, draws.integers(2, size=count)).astype(
            int
        )
        rewards, fallen, late = ours.step(actions)
        before = ours.state.copy()
        ours.restart(fallen | late)
        seen = ours.observe()
        for at, environment in enumerate(theirs):
            observed, reward, terminated, truncated, _ = environment.step(int(actions[at]))
            assert np.array_equal(environment.unwrapped.state, before[:, at]), (
                f"step {step}, environment {at}"
            )
            assert (reward, terminated, truncated) == (rewards[at], fallen[at], late[at]), (
                f"step {step}, {at}"
            )
            if terminated or truncated:
                observed, _ = environment.reset()
            assert np.array_equal(observed, seen[at]) and observed.dtype == seen.dtype
        ends = ends + int(fallen.sum())
        late_ends = late_ends + int(late.sum())
    assert ends > 100 and late_ends > 10, f"{ends} falls, {late_ends} ends by time: too few to tell"


def test_one_bit_of_another_constant_is_seen() -> None:
    """The control of the test above: a length that is one unit in the last place off leaves other
    bits."""
    right = CartPole(streams(8))
    wrong = CartPole(streams(8))
    wrong.LENGTH = float(np.nextafter(0.5, 1.0))
    for _ in range(20):
        for pole in (right, wrong):
            pole.step(np.ones(8))
    assert not np.array_equal(right.state, wrong.state)


def test_a_pole_ends_at_its_time_limit_and_that_is_no_fall() -> None:
    pole = CartPole(streams(2))
    pole.age[:] = TIME_LIMIT - 1
    _, fallen, late = pole.step(np.array([0, 1]))
    assert not fallen.any() and late.all()


# the network


@pytest.mark.parametrize("preset", presets)
def test_parameters_of_every_preset_on_the_meta_device(preset: str) -> None:
    workload = made(preset)
    with torch.device("meta"):
        chain = nn.Sequential(*workload.layers())
    found = sum(p.numel() for p in trained_parameters(chain).values())
    assert found == SIZES[preset], f"{found} parameters, known {SIZES[preset]}"
    assert len(chain) == presets[preset]["num_layers"] == len(workload.layer_flops())


@pytest.mark.parametrize("preset", ["cartpole", "comm"])
def test_operations_by_formula_are_those_that_torch_counts(preset: str) -> None:
    workload = made(preset)
    states = workload.environments(shard=0, num_shards=8).world.observe()
    x = workload._tensor(states)
    for layer, formula in zip(model(workload), workload.layer_flops(), strict=True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            x = layer(x)
        counted = counter.get_total_flops() / len(states)
        assert counted == formula, (
            f"{type(layer).__name__}: {counted} counted, {formula} by formula"
        )


def test_what_the_options_say_of_actions_must_be_so() -> None:
    with pytest.raises(
        ValueError, match="num_actions = 3, but cartpole has 2: set num_actions = 2"
    ):
        made(num_actions=3)


@pytest.mark.skipif(importlib.util.find_spec("ale_py") is not None, reason="the package is there")
def test_without_the_game_package_the_remedy_is_named() -> None:
    with pytest.raises(ValueError, match="pip install ale-py"):
        made("atari").start(seed=0, dtype=torch.float32)


@pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="needs the ale-py package")
def test_a_game_plays() -> None:
    workload = made("atari")
    workload.start(seed=0, dtype=torch.float32)
    batch = example(workload, model(workload), num_shards=8)
    assert batch.x.dtype == torch.uint8 and batch.x.shape == (16, 4, 84, 84)


# rollouts


def test_minibatches_of_a_rollout_hold_every_step_once_per_epoch_and_are_the_same_for_any_number_of_workers() -> (
    None
):
    act = model(made())
    for algorithm, steps, epochs in (("ppo", 32, 4), ("a2c", 2, 1)):
        whole = Batches(made(algorithm=algorithm))
        parts = [Batches(made(algorithm=algorithm)) for _ in range(4)]
        per_rollout = whole.per_rollout
        seen: list[torch.Tensor] = []
        for index in range(per_rollout):
            batch = whole.fetch((index, 0, 1), act)
            shards = [part.fetch((index, shard, 4), act) for shard, part in enumerate(parts)]
            assert batch.num_samples == 32 == sum(shard.num_samples for shard in shards)
            assert torch.equal(torch.cat([shard.x for shard in shards]), batch.x), (
                algorithm,
                index,
            )
            seen.append(batch.x)
        rows = torch.cat(seen).unique(dim=0, return_counts=True)[1]
        assert len(rows) == 16 * steps and (rows == epochs).all()


def test_advantages_have_mean_0_and_deviation_1_over_the_minibatch() -> None:
    batch = Batches(made(dtype=torch.float64)).fetch((0, 0, 1), model(made()).double())
    advantages = batch.y[:, 2]
    assert (
        abs(float(advantages.mean())) < 1e-12
        and abs(float(advantages.std(correction=0)) - 1) < 1e-6
    )


def test_the_first_gradient_on_a_rollout_has_ratios_of_1() -> None:
    """Who acts and who learns are the same then: their log probabilities agree."""
    workload = made(dtype=torch.float64)
    act = model(workload).double()
    batch = Batches(workload).fetch((0, 0, 1), act)
    new = act(batch.x)[:, :2].log_softmax(-1).gather(-1, batch.y[:, :1].long()).squeeze(-1)
    gap = float((new - batch.y[:, 1]).abs().max())
    assert gap < 1e-12, gap


def test_generalised_advantages_by_hand() -> None:
    """One pole that falls at its last step: lambda = 1 and a critic that says 0 leave the plain
    discounted sums."""
    workload = made(trace=1.0, discount=0.5, reward_scale=1.0, dtype=torch.float64, algorithm="a2c")

    def act(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 3, dtype=torch.float64)

    own = workload.environments(shard=0, num_shards=16)
    own.world.state[:, 0] = (0.0, 0.0, 0.2094, 3.0)  # falls in the first step
    rollout = workload.collect(act, own, 0)
    batch = rollout.batch(0, torch.tensor([0.0, 1.0, 1.0]))  # mean 0, deviation 1: as it is
    returns = sorted(batch.y[:, 3].tolist())
    assert returns == [1.0, 1.0], (
        returns
    )  # 1 and nothing behind it; then the new episode's first step, critic 0
    own.world.state[:, 0] = 0.0
    own.world.age[:] = 0
    batch = workload.collect(act, own, 1).batch(0, torch.tensor([0.0, 1.0, 1.0]))
    assert sorted(batch.y[:, 3].tolist()) == [1.0, 1.5], batch.y[:, 3]


def test_frames_do_not_depend_on_who_owns_their_neighbours() -> None:
    alone = Frames(streams(4)[2:3])
    together = Frames(streams(4))
    for _ in range(3):
        alone.step(np.zeros(1))
        together.step(np.zeros(4))
    assert np.array_equal(alone.observe()[0], together.observe()[2])


# laws


def agent(**fields: Any) -> Cell:
    """36 steps: two whole rollouts and a part."""
    options = fields.pop("options", {})
    others = fields.pop("others", {})
    cell = resolve(
        Cell(
            workload="rl_agent",
            preset="smoke",
            precision="fp64",
            budget=Budget(steps=36),
            options={"rl_agent": options, **others},
            **{"topology": "ring", **fields},
        )
    )
    assert rules.validate(cell) == []
    return cell


def clock(ranks: MakeRanks) -> dict[str, str]:
    return {"clock": "virtual" if ranks is virtual_ranks else "wall"}


RANKS = pytest.mark.parametrize("ranks", [thread_ranks, virtual_ranks], ids=["gloo", "virtual"])


@pytest.mark.parametrize("topology", ["ring", "native", "parameter_server"])
@pytest.mark.parametrize("replicas", [1, 2, 4])
@RANKS
def test_workers_together_make_the_step_of_one_process(
    ranks: MakeRanks, replicas: int, topology: str
) -> None:
    figure = synchronous.equals_one_process(
        ranks, agent(replicas=replicas, topology=topology, **clock(ranks))
    )
    assert figure.value <= 1e-10, f"{figure.value} from one process, bound 1e-10: {figure.detail}"


@RANKS
def test_a2c_too(ranks: MakeRanks) -> None:
    cell = agent(replicas=2, options={"algorithm": "a2c"}, **clock(ranks))
    figure = synchronous.equals_one_process(ranks, cell)
    assert figure.value <= 1e-10, f"{figure.value} from one process, bound 1e-10: {figure.detail}"


def normalised_alone(training: Training) -> Training:
    # the other rank may still be connecting  # type: ignore[attr-defined]
    training.batches.kept = training.batches._direct
    training.batches._direct = None
    return training


def poles_of_rank_0(training: Training) -> Training:
    whole = training.workload.environments  # type: ignore[attr-defined]
    training.workload.environments = lambda shard, num_shards: whole(shard=0, num_shards=num_shards)  # type: ignore[attr-defined]
    return training


def poles_seeded_by_rank(training: Training) -> Training:
    training.workload._seed += training.comm.rank  # type: ignore[attr-defined]
    return training


@pytest.mark.parametrize("broken", [normalised_alone, poles_of_rank_0, poles_seeded_by_rank])
def test_the_law_catches(broken: Any) -> None:
    figure = synchronous.equals_one_process(thread_ranks, agent(replicas=2), change=broken)
    assert figure.value > 1e-3, f"{figure.value}: {broken.__name__} is not seen"


@pytest.mark.parametrize(
    ("sync", "topology"),
    [
        ("synchronous", "ring"),
        ("synchronous", "parameter_server"),
        ("delayed", "ring"),
        ("local_sgd", "ring"),
        ("asynchronous", "parameter_server"),
        ("stale_synchronous", "parameter_server"),
    ],
)
@RANKS
def test_bytes_of_a_run_are_the_predicted(ranks: MakeRanks, sync: str, topology: str) -> None:
    others = {"local_sgd": {"local_steps": 4}} if sync == "local_sgd" else {}
    cell = agent(replicas=2, sync=sync, topology=topology, others=others, **clock(ranks))
    once = remembered(ranks)
    for law in (traffic.counted_is_predicted, traffic.undisturbed_is_expected):
        figure = law(once, cell)
        assert figure.holds, str(figure)


def test_bytes_of_normalising_alone_are_fewer_than_predicted() -> None:
    figure = traffic.counted_is_predicted(thread_ranks, agent(replicas=2), change=normalised_alone)
    assert not figure.holds


def test_who_normalises_together() -> None:
    together = {
        name
        for name in (
            "synchronous",
            "ddp",
            "delayed",
            "asynchronous",
            "local_sgd",
            "diloco",
            "gossip",
            "hogwild",
            "k_sync",
            "stale_synchronous",
        )
        if agrees(make("sync", name, {}))
    }
    assert together == {"synchronous", "ddp", "delayed"}


# runs


def trained(bench: Bench, **fields: Any) -> Any:
    return bench.ok(workload="rl_agent", preset="smoke", steps=64, timeout_s=60.0, **fields)


@pytest.mark.procs
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_run_repeats_bit_for_bit_in_fresh_processes(bench: Bench, replicas: int) -> None:
    first, second = (trained(bench, replicas=replicas, topology="ring") for _ in range(2))
    assert first.result["checksum"] == second.result["checksum"]
    assert first.result["loss"] == second.result["loss"]
    assert first.result["evaluations"]["metric"] == second.result["evaluations"]["metric"]
    assert first.result["predicted_bytes"] == first.result["payload_bytes"]


@pytest.mark.procs
def test_policy_lag_is_0_to_15_together_and_larger_where_nobody_waits(bench: Bench) -> None:
    together = trained(bench, replicas=2, topology="ring").result["policy_lag"]
    assert together["histogram"] == {str(lag): 8 for lag in range(16)} and together["mean"] == 7.5
    alone = trained(bench, replicas=2, sync="asynchronous", topology="parameter_server").result
    assert (
        alone["policy_lag"]["max"] > 15
        and alone["policy_lag"]["mean"] > 7.5 + alone["staleness"]["mean"] / 2
    )
    assert sum(alone["policy_lag"]["histogram"].values()) == alone["updates"] == 128
    assert alone["predicted_bytes"] == alone["payload_bytes"]
