"""The teacher-student workload: stated sizes, samples that depend on (seed, number) alone, a known
optimum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchsuite.plan import plugins


def workload(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    made = plugins.load("workload", "mlp")(**options)
    made.start(seed=seed, dtype=dtype)
    return made


def preset(name: str) -> dict[str, Any]:
    options = dict(plugins.find("workload", "mlp").presets[name])
    return {
        key: value
        for key, value in options.items()
        if key in plugins.find("workload", "mlp").options
    }


def count(layers: list[nn.Module]) -> int:
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


@pytest.mark.parametrize(("name", "stated"), [("small", 1441), ("smoke", 1441), ("wide", 49_665)])
def test_presets_have_the_stated_number_of_parameters(name: str, stated: int) -> None:
    assert count(workload(**preset(name)).layers()) == stated


def test_every_preset_has_a_stated_number_of_parameters_and_of_layers_on_the_meta_device() -> None:
    presets = plugins.find("workload", "mlp").presets
    for name, stated in {"small": 1441, "smoke": 1441, "wide": 49_665}.items():
        made = workload(**preset(name))
        with torch.device("meta"):
            layers = made.layers()
        assert count(layers) == stated, f"{name}: {count(layers)} parameters, known {stated}"
        assert len(layers) == presets[name]["num_layers"]
    assert len(presets) == 3


@pytest.mark.parametrize("options", [{}, {"hidden": 256, "inputs": 64}, {"num_parameters": 2000}])
def test_operations_by_formula_are_those_that_torch_counts(options: dict[str, int]) -> None:
    made = workload(**options)
    x = torch.zeros(1, made.inputs)
    for layer, formula in zip(made.layers(), made.layer_flops(), strict=True):
        with FlopCounterMode(display=False) as counter:
            x = layer(x)
        assert counter.get_total_flops() == formula, (
            f"{layer}: {counter.get_total_flops()} counted, {formula} by formula"
        )


@pytest.mark.parametrize("asked", [1_048_576, 4_194_304, 1441])
def test_ballast_fills_up_to_the_number_asked_for(asked: int) -> None:
    assert count(workload(num_parameters=asked).layers()) == asked


def test_fewer_parameters_than_the_network_has_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="num_parameters = 1000, but the network alone has 1441"):
        workload(num_parameters=1000).layers()


def test_ballast_learns_nothing_and_changes_nothing() -> None:
    plain = workload()
    loaded = workload(num_parameters=2000)
    torch.manual_seed(0)
    network, heavy = (nn.Sequential(*made.layers()).double() for made in (plain, loaded))
    heavy.load_state_dict(network.state_dict(), strict=False)
    batch = plain.batch(0, shard=0, num_shards=1)
    losses = [made.loss(net(batch.x), batch) for made, net in ((plain, network), (loaded, heavy))]
    assert losses[0].item() == losses[1].item()
    losses[1].backward()
    ballast = [p for name, p in heavy.named_parameters() if p.numel() == 559]
    assert len(ballast) == 1 and ballast[0].grad is None


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    """Also across the border of a block of 8,192, whatever was asked for before, and however the
    batch is cut."""
    first = workload(global_batch=96)
    second = workload(global_batch=96)
    for index in (200, 3, 85, 84, 86):
        second.batch(index, shard=0, num_shards=1)
    for index in (0, 85, 86):  # 85: samples 8160 .. 8255
        mine, its = (made.batch(index, shard=0, num_shards=1) for made in (first, second))
        assert torch.equal(mine.x, its.x) and torch.equal(mine.y, its.y)


def test_seeds_differ_in_their_samples_and_share_the_task() -> None:
    first = workload(0)
    second = workload(1)
    other = workload(0, teacher_seed=1)
    x, y, z = (made.batch(0, shard=0, num_shards=1).x for made in (first, second, other))
    assert not torch.equal(x, y) and torch.equal(x, z)
    assert torch.equal(first._x_test, second._x_test) and torch.equal(first._y_test, second._y_test)
    assert not torch.equal(first._x_test, other._x_test)
    assert not torch.equal(first._answers(x), other._answers(x))


@pytest.mark.parametrize("num_shards", [1, 2, 4, 96])
def test_shards_put_together_are_the_global_batch(num_shards: int) -> None:
    made = workload(global_batch=96)
    whole = made.batch(85, shard=0, num_shards=1)
    parts = [made.batch(85, shard=shard, num_shards=num_shards) for shard in range(num_shards)]
    assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
    assert torch.equal(torch.cat([part.y for part in parts]), whole.y)
    assert sum(part.num_samples for part in parts) == whole.num_samples == 96


def test_a_batch_larger_than_two_blocks_is_drawn_whole() -> None:
    large = workload(global_batch=20_000).batch(1, shard=0, num_shards=1)
    small = workload(global_batch=4_000)
    pieces = torch.cat([small.batch(5 + i, shard=0, num_shards=1).x for i in range(5)])
    assert torch.equal(large.x, pieces)


def test_no_sample_comes_twice_and_none_is_held_out() -> None:
    made = workload(global_batch=8192)
    seen = torch.cat([made.batch(index, shard=0, num_shards=1).x[:, 0] for index in range(6)])
    everything = torch.cat([seen, made._x_test[:, 0]])
    assert everything.unique().numel() == 6 * 8192 + 1024


def test_the_teacher_has_excess_loss_0_and_a_constant_1() -> None:
    made = workload()

    def teacher(x: Tensor) -> Tensor:
        return made._answers(x)

    assert made.evaluate(teacher) == 0.0
    mean = float(made._y_test.mean())
    constant = made.evaluate(lambda x: torch.full((len(x), 1), mean, dtype=x.dtype))
    assert constant == pytest.approx(1023 / 1024, rel=1e-12)  # `var` divides by n - 1


def test_answers_have_variance_1_and_the_stated_noise() -> None:
    batch = workload(global_batch=65_536).batch(0, shard=0, num_shards=1)
    clean = workload(global_batch=65_536, noise=0.0).batch(0, shard=0, num_shards=1)
    assert torch.equal(batch.x, clean.x)
    assert float(clean.y.var()) == pytest.approx(1.0, abs=0.05) and float(
        clean.y.mean()
    ) == pytest.approx(0.0, abs=0.05)
    assert float((batch.y - clean.y).std()) == pytest.approx(0.1, rel=0.02)


def test_the_rate_follows_its_rule_and_ends_near_0() -> None:
    peaks = {
        rule: max(workload(global_batch=64, lr_rule=rule).recipe().lr(i / 100) for i in range(100))
        for rule in ("sqrt", "linear", "none")
    }
    lr = workload().lr
    assert peaks == {
        rule: pytest.approx(lr * factor, rel=0.01)
        for rule, factor in (("sqrt", 2), ("linear", 4), ("none", 1))
    }
    rates = [workload().recipe().lr(i / 100) for i in range(101)]
    assert (
        rates[0] < 0.1 * lr and rates[-1] < 0.05 * lr and math.isclose(max(rates), lr, rel_tol=0.01)
    )


def test_in_fp32_the_samples_are_the_same_rounded() -> None:
    single, double = (
        workload(dtype=dtype).batch(7, shard=0, num_shards=1)
        for dtype in (torch.float32, torch.float64)
    )
    assert single.x.dtype == torch.float32 and torch.equal(single.x, double.x.float())
