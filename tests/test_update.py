"""The step of a long vector: in chunks that stay in the cache, with the same bits, and its state as
whole vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchsuite.errors import UsageError
from benchsuite.update import CHUNK_BYTES, Updater, in_chunks, state_vectors
from benchsuite.workload import Recipe, muon, numel, views

LONG = CHUNK_BYTES // 4 * 2 + 12_345  # of float32: three chunks, the last one shorter
OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], list[str]]] = {
    "sgd": (lambda params: torch.optim.SGD(params, lr=0.1), []),
    "nesterov": (
        lambda params: torch.optim.SGD(
            params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        ["momentum_buffer"],
    ),
    "adam": (lambda params: torch.optim.AdamW(params, lr=0.1), ["exp_avg", "exp_avg_sq"]),
}


def recipe(name: str) -> Recipe:
    return Recipe(
        make_optimizer=OPTIMIZERS[name][0], lr=lambda progress: 0.1, global_batch=1, budget=100
    )


def gradients(count: int, numel: int = LONG) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(numel, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_long_vector_is_stepped_to_the_bits_of_one_tensor(name: str) -> None:
    start, *steps = gradients(6)
    ours = start.clone()
    whole = start.clone()
    updater = Updater(ours, recipe(name))
    optimizer = OPTIMIZERS[name][0]([whole])
    for number, gradient in enumerate(steps):
        updater.step(gradient.clone(), samples=0)
        whole.grad = gradient.clone()
        optimizer.step()
        different = int((ours != whole).sum())
        assert different == 0, f"{different} of {LONG} elements differ after step {number + 1}"
    vectors = updater.state()
    assert [len(vector) for vector in vectors] == [LONG] * len(OPTIMIZERS[name][1])
    assert state_vectors(recipe(name), {"all": torch.Size([LONG])}) == tuple(
        len(vector) for vector in vectors
    )
    for vector, of in zip(vectors, OPTIMIZERS[name][1], strict=True):
        assert torch.equal(vector, optimizer.state[whole][of]), of


@pytest.mark.parametrize("numel", [1, CHUNK_BYTES // 4, LONG])
def test_chunks_cover_a_vector_in_order_without_a_copy(numel: int) -> None:
    vector = torch.arange(numel, dtype=torch.float32)
    chunks = in_chunks(vector)
    assert torch.equal(torch.cat(chunks), vector)
    assert [chunk.data_ptr() for chunk in chunks] == [
        vector.data_ptr() + k * CHUNK_BYTES for k in range(len(chunks))
    ]
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
    one = start.clone()
    two = start.clone()
    alone = start.clone()
    whole = Updater(one, recipe("nesterov"))
    first = Updater(two, recipe("nesterov"))
    second = Updater(two, recipe("nesterov"))
    forgetful = Updater(alone, recipe("nesterov"))
    for updater in (whole, first, forgetful):
        updater.step(steps[0], samples=0)
    second.share_state(first)
    forgetful.forget_state()
    for updater in (whole, second, forgetful):
        updater.step(steps[1], samples=0)
    assert torch.equal(one, two)
    assert not torch.equal(one, alone)


# an optimiser of whole tensors

SHAPES = {
    name: torch.Size(shape)
    for name, shape in {"norm": (6,), "up": (24, 6), "embedding": (9, 6), "down": (6, 24)}.items()
}
HIDDEN = ("up", "down")
needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on"
)


def muon_recipe() -> Recipe:
    def make(named: Any) -> torch.optim.Optimizer:
        return muon(named, lambda name: name in HIDDEN, lr=0.1, weight_decay=0.1)

    return Recipe(make, lambda progress: 0.1, global_batch=1, budget=100, elementwise=False)


@needs_muon
def test_muon_steps_hidden_matrices_and_adamw_the_rest_as_views_of_one_vector() -> None:
    start, *steps = gradients(4, numel(SHAPES))
    flat = start.clone()
    apart = {name: view.clone() for name, view in views(start, SHAPES).items()}
    updater = Updater(flat, muon_recipe(), shapes=SHAPES)
    theirs = [
        torch.optim.Muon(
            [apart[name] for name in HIDDEN],
            lr=0.1,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [apart["norm"], apart["embedding"]], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1
        ),
    ]
    for gradient in steps:
        updater.step(gradient.clone(), samples=0)
        for name, view in views(gradient, SHAPES).items():
            apart[name].grad = view.clone()
        for optimizer in theirs:
            optimizer.step()
    for name, view in views(flat, SHAPES).items():
        assert torch.equal(view, apart[name]), name
    moved = (views(flat, SHAPES)["up"] - views(start, SHAPES)["up"]).square().mean().sqrt()
    assert 0.05 < float(moved) / 0.1 < 1.0, f"three steps of AdamW's size are {float(moved)} long"


@needs_muon
def test_the_state_of_muon_is_one_vector_per_name_that_can_be_written_to_and_forgotten() -> None:
    first, second, third = gradients(3, numel(SHAPES))
    lengths = (
        60,
        60,
        288,
    )  # exp_avg, exp_avg_sq of norm and embedding; momentum_buffer of up and down
    assert state_vectors(muon_recipe(), SHAPES) == lengths
    ends = {}
    for factor in (1.0, 0.5, 0.0):
        updater = Updater(params := first.clone(), muon_recipe(), shapes=SHAPES)
        assert updater.state() == []
        updater.step(second.clone(), samples=0)
        for _ in range(2):
            assert tuple(len(vector) for vector in updater.state()) == lengths
            for vector in updater.state():
                vector.mul_(factor)
        if not factor:
            updater.forget_state()
            assert updater.state() == []
        updater.step(third.clone(), samples=0)
        ends[factor] = params
    for name, different in views(ends[1.0] - ends[0.5], SHAPES).items():
        assert bool(different.any()), f"{name} does not depend on its state"


@needs_muon
def test_tensors_without_a_hidden_matrix_are_adamw_s_alone() -> None:
    flat = torch.ones(12)
    updater = Updater(
        flat, muon_recipe(), shapes={"norm": torch.Size([6]), "embedding": torch.Size([2, 3])}
    )
    updater.step(torch.ones(12), samples=0)
    assert [len(vector) for vector in updater.state()] == [12, 12] and bool((flat < 1).all())


def test_an_optimiser_of_whole_tensors_cannot_step_a_slice() -> None:
    with pytest.raises(UsageError, match=r"elementwise = False.* use one over a collective"):
        Updater(torch.zeros(4), muon_recipe())


def test_before_torch_2_9_muon_is_refused_with_the_version_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UsageError, match="optimizer = muon needs torch >= 2.9, this is"):
        muon([("up", torch.zeros(2, 2))], lambda name: True, lr=0.1, weight_decay=0.0)
