"""The step of a long vector: in chunks that stay in the cache, with the same bits, and its state as whole vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchsuite.update import CHUNK_BYTES, Updater, in_chunks, state_vectors
from benchsuite.workload import Recipe

LONG = CHUNK_BYTES // 4 * 2 + 12_345  # of float32: three chunks, the last one shorter
OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], list[str]]] = {
    "sgd": (lambda params: torch.optim.SGD(params, lr=0.1), []),
    "nesterov": (
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        ["momentum_buffer"],
    ),
    "adam": (lambda params: torch.optim.AdamW(params, lr=0.1), ["exp_avg", "exp_avg_sq"]),
}


def recipe(name: str) -> Recipe:
    return Recipe(make_optimizer=OPTIMIZERS[name][0], lr=lambda progress: 0.1, global_batch=1, budget=100)


def gradients(count: int, numel: int = LONG) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(numel, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_long_vector_is_stepped_to_the_bits_of_one_tensor(name: str) -> None:
    start, *steps = gradients(6)
    ours, whole = start.clone(), start.clone()
    updater, optimizer = Updater(ours, recipe(name)), OPTIMIZERS[name][0]([whole])
    for number, gradient in enumerate(steps):
        updater.step(gradient.clone(), samples=0)
        whole.grad = gradient.clone()
        optimizer.step()
        different = int((ours != whole).sum())
        assert different == 0, f"{different} of {LONG} elements differ after step {number + 1}"
    vectors = updater.state()
    assert len(vectors) == len(OPTIMIZERS[name][1]) == state_vectors(recipe(name))
    for vector, of in zip(vectors, OPTIMIZERS[name][1], strict=True):
        assert torch.equal(vector, optimizer.state[whole][of]), of


@pytest.mark.parametrize("numel", [1, CHUNK_BYTES // 4, LONG])
def test_chunks_cover_a_vector_in_order_without_a_copy(numel: int) -> None:
    vector = torch.arange(numel, dtype=torch.float32)
    chunks = in_chunks(vector)
    assert torch.equal(torch.cat(chunks), vector)
    assert [chunk.data_ptr() for chunk in chunks] == [vector.data_ptr() + k * CHUNK_BYTES for k in range(len(chunks))]
    assert max(chunk.numel() for chunk in chunks) * 4 <= CHUNK_BYTES


@pytest.mark.parametrize("name", ["nesterov", "adam"])
@pytest.mark.parametrize("numel", [100, LONG])
def test_who_writes_to_the_state_s_vectors_changes_the_next_step(name: str, numel: int) -> None:
    first, second, third = gradients(3, numel)
    ends = {}
    for factor in (1.0, 0.5):
        params = first.clone()
        updater = Updater(params, recipe(name))
        assert updater.state() == []
        updater.step(second, samples=0)
        for _ in range(2):  # the second time they are still one vector's chunks
            for vector in updater.state():
                vector.mul_(factor)
        assert [vector.data_ptr() for vector in updater.state()] == [
            vector.data_ptr() for vector in updater.state()
        ]
        updater.step(third, samples=0)
        ends[factor] = params
    assert not torch.equal(ends[1.0], ends[0.5])


def test_state_that_is_shared_goes_on_and_state_that_is_forgotten_begins_again() -> None:
    start, *steps = gradients(3)
    one, two, alone = start.clone(), start.clone(), start.clone()
    whole, first = Updater(one, recipe("nesterov")), Updater(two, recipe("nesterov"))
    second, forgetful = Updater(two, recipe("nesterov")), Updater(alone, recipe("nesterov"))
    for updater in (whole, first, forgetful):
        updater.step(steps[0], samples=0)
    second.share_state(first)
    forgetful.forget_state()
    for updater in (whole, second, forgetful):
        updater.step(steps[1], samples=0)
    assert torch.equal(one, two)
    assert not torch.equal(one, alone)
