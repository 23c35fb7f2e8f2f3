"""The CNN: sizes and operations of its chains, and data read from a user's folders, which the tests
make."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchsuite.workloads.cnn import POOL, SCALES, Workload, presets
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchsuite.errors import UsageError
from benchsuite.workload import seeded_layers, trained_parameters

SIZES = {
    "digits": 25_370,
    "smoke": 25_370,
    "comm": 11_173_962,
    "cifar10": 11_173_962,
    "gpu": 25_557_032,
    "cluster": 25_557_032,
}
DIGITS = [18_432, 294_912, 147_456, 294_912, 0, 16_384, 0, 1_280]


def asked(preset: str, **options: Any) -> Workload:
    fields = {field.name for field in dataclasses.fields(Workload)}
    return Workload(
        **{**{key: value for key, value in presets[preset].items() if key in fields}, **options}
    )


def started(
    preset: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Workload:
    workload = asked(preset, **options)
    workload.start(seed=seed, dtype=dtype)
    return workload


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Six batches of 20 pictures, each of one colour: that of sample n (counted over all batches)
    is n."""
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        colours = np.arange(20 * number, 20 * number + 20, dtype=np.uint8)
        batch = {
            b"data": np.repeat(colours[:, None], 3072, axis=1),
            b"labels": [int(c) % 10 for c in colours],
        }
        (tmp_path / name).write_bytes(pickle.dumps(batch))
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """6 images of each of 3 classes to train on and 2 to test on, of unequal sizes; class k has the
    colour 60 k."""
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 6), ("val", 2)):
        for number, name in enumerate(("ape", "bee", "cat")):
            (tmp_path / part / name).mkdir(parents=True)
            for at in range(count):
                picture = image.new("RGB", (300 + 40 * at, 260 + 10 * number), (60 * number,) * 3)
                picture.save(tmp_path / part / name / f"{at}.png")
    return tmp_path


# sizes


@pytest.mark.parametrize("preset", presets)
def test_parameters_of_every_preset_on_the_meta_device(preset: str) -> None:
    with torch.device("meta"):
        chain = nn.Sequential(*asked(preset).layers())
    found = sum(p.numel() for p in trained_parameters(chain).values())
    assert found == SIZES[preset], f"{found} parameters, known {SIZES[preset]}"
    assert len(chain) == presets[preset]["num_layers"]
    assert not list(chain.buffers()), "statistics of a batch would depend on how it is split"


@pytest.mark.parametrize("preset", ["digits", "comm", "gpu"])
def test_operations_by_formula_are_those_that_torch_counts(preset: str) -> None:
    workload = started(preset)
    formulas = workload.layer_flops()
    x = workload.batch(0, shard=0, num_shards=workload.global_batch).x
    if preset == "digits":
        assert formulas == DIGITS, f"{formulas}, known {DIGITS}"
    with torch.no_grad():
        for number, (layer, formula) in enumerate(zip(workload.layers(), formulas, strict=True)):
            with FlopCounterMode(display=False) as counter:
                x = layer(x)
            counted = counter.get_total_flops()
            assert counted == formula, f"layer {number}: {counted} counted, {formula} by formula"


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)]
)
def test_the_optimiser_is_the_one_asked_for(optimizer: str, kind: type) -> None:
    made = asked("digits", optimizer=optimizer).recipe().make_optimizer([torch.zeros(2)])
    assert type(made) is kind


def test_the_rate_of_cluster_grows_with_the_batch_and_others_do_not() -> None:
    rates = [
        asked(preset, global_batch=batch).recipe().lr(0.1)
        for preset in ("cluster", "gpu")
        for batch in (256, 1024)
    ]
    assert rates == pytest.approx([0.1, 0.4, 0.05, 0.05]), rates


# data


def test_synthetic_images_of_a_gpu_are_views_of_a_pool_that_goes_round() -> None:
    workload = started("gpu", global_batch=96)
    again = started("gpu", global_batch=96)
    for index in range(6):
        whole = workload.batch(index, shard=0, num_shards=1)
        rows = [(index * 96 + at) % POOL for at in range(96)]
        assert torch.equal(whole.x, workload._x[rows]) and torch.equal(
            whole.y, workload._y[rows]
        ), index
        shards = [again.batch(index, shard=shard, num_shards=4) for shard in range(4)]
        assert torch.equal(torch.cat([shard.x for shard in shards]), whole.x), index
    first = workload.batch(0, shard=0, num_shards=1)
    assert first.x.data_ptr() == workload._x.data_ptr(), "copied"
    assert first.x.shape == (96, 3, 224, 224) and int(first.y.max()) > 9
    assert workload.target.evaluate_every == 0


def test_cifar_10_is_read_from_its_batches(cifar: Path) -> None:
    workload = started("cifar10", path=str(cifar), global_batch=20, dtype=torch.float64)
    assert workload._x.shape == (100, 3, 32, 32) and workload._x_test.shape == (20, 3, 32, 32)
    mean, deviation = (torch.tensor(each, dtype=torch.float64) for each in SCALES["cifar10"])
    seen = []
    for index in range(5):  # an epoch
        batch = workload.batch(index, shard=0, num_shards=1)
        middle = (batch.x[:, :, 16, 16] * deviation + mean) * 255
        assert torch.allclose(middle, middle[:, :1]), "the colours of a pixel"
        numbers = middle[:, 0].round().long()
        assert torch.equal(numbers % 10, batch.y)
        seen += numbers.tolist()
    assert sorted(seen) == list(range(100)), "every picture once"
    assert workload.target.target == 94.0 and workload.target.evaluate_every > 0

    def told(x: torch.Tensor) -> torch.Tensor:
        numbers = ((x[:, 0, 16, 16] * deviation[0] + mean[0]) * 255).round().long()
        assert numbers.min() >= 100
        return nn.functional.one_hot(numbers % 10, 10)

    assert workload.evaluate(told) == 100.0
    assert workload.evaluate(lambda x: torch.eye(10)[torch.zeros(len(x), dtype=torch.long)]) == 10.0


def test_crops_of_cifar_10_move_by_at_most_4_pixels_and_half_are_mirrored(cifar: Path) -> None:
    workload = started("cifar10", path=str(cifar), global_batch=50)
    ramp = torch.arange(32, dtype=torch.uint8) + 100  # the column that a pixel came from
    workload._x = (ramp * torch.ones(100, 3, 32, 1, dtype=torch.uint8)).contiguous()
    steps = set()
    mirrored = 0
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in SCALES["cifar10"])
    for index in range(40):
        pictures = (
            (workload.batch(index, shard=0, num_shards=1).x * deviation + mean) * 255
        ).round()
        for picture in pictures:
            row = picture[0, 16]
            inside = row[row > 0]
            turned = bool(inside[0] > inside[-1])
            mirrored += turned
            ordered = inside.flip(0) if turned else inside
            assert torch.equal(ordered.diff(), torch.ones(len(ordered) - 1)), (
                "columns stay neighbours"
            )
            black_left = int((row[:16] == 0).sum())
            steps.add(-black_left if black_left else 32 - len(inside))
    assert steps == set(range(-4, 5)), sorted(steps)
    assert 850 < mirrored < 1150, f"{mirrored} of 2000 mirrored"


def test_a_folder_of_images_is_read_by_its_class_folders(folder: Path) -> None:
    workload = started(
        "gpu", data="imagenet", path=str(folder), global_batch=9, dtype=torch.float64
    )
    mean, deviation = (
        torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in SCALES["imagenet"]
    )
    classes = []
    for index in range(2):  # an epoch
        batch = workload.batch(index, shard=0, num_shards=1)
        assert batch.x.shape == (9, 3, 224, 224) and batch.x.dtype == torch.float64
        colours = ((batch.x * deviation + mean) * 255).round()
        assert torch.equal(colours[:, 0, 5, 7].long(), 60 * batch.y), "the class of a colour"
        assert all(picture.unique().numel() == 1 for picture in colours), "one colour"
        classes += batch.y.tolist()
    assert sorted(classes) == [0] * 6 + [1] * 6 + [2] * 6

    def told(x: torch.Tensor) -> torch.Tensor:
        colours = ((x * deviation + mean) * 255).round()
        return nn.functional.one_hot(colours[:, 0, 0, 0].long() // 60, 1000)

    assert workload.evaluate(told) == 100.0
    assert workload.target.target == 75.9 and workload.target.evaluate_every == 1_281_167


@pytest.mark.parametrize("data", ["cifar10", "imagenet"])
def test_shards_of_any_number_of_workers_are_the_same_global_batch(
    data: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue("cifar" if data == "cifar10" else "folder")
    options = {
        "data": data,
        "path": str(path),
        "global_batch": 12,
        "model": "resnet18" if data == "cifar10" else "resnet50",
    }
    one, again, other = (started("gpu", **options, seed=seed) for seed in (0, 0, 1))
    for index in (3, 0):
        whole = one.batch(index, shard=0, num_shards=1)
        for workers in (2, 3):
            shards = [
                again.batch(index, shard=shard, num_shards=workers) for shard in range(workers)
            ]
            assert torch.equal(torch.cat([shard.x for shard in shards]), whole.x), (index, workers)
            assert torch.equal(torch.cat([shard.y for shard in shards]), whole.y), (index, workers)
        assert not torch.equal(other.batch(index, shard=0, num_shards=1).x, whole.x)


def test_what_a_folder_lacks_is_said(cifar: Path) -> None:
    (cifar / "data_batch_3").unlink()
    (cifar / "train" / "ape").mkdir(parents=True)
    (cifar / "train" / "ape" / "1.png").touch()
    image: dict[str, Any] = {"data": "imagenet", "path": str(cifar)}
    for preset, options, said in (
        ("cifar10", {"path": str(cifar)}, "has no data_batch_3: data = cifar10 reads"),
        (
            "cifar10",
            {"path": "batches"},
            "path = 'batches', but data = cifar10 needs a folder's whole path",
        ),
        ("cifar10", {"path": str(cifar / "nowhere")}, "needs a folder's whole path"),
        ("gpu", image, "has 1 classes with images in train/ and 0 in val/"),
    ):
        with pytest.raises(UsageError, match=said):
            started(preset, **options)
    (cifar / "val" / "bee").mkdir(parents=True)
    (cifar / "val" / "bee" / "1.png").touch()
    with pytest.raises(UsageError, match="in val/ none that train/ lacks"):
        started("gpu", **image)
    (cifar / "val" / "bee").rename(cifar / "val" / "ape")
    with pytest.raises(UsageError, match=r"global_batch\(128\) > 1 images, /.*: set fewer"):
        started("gpu", **image)


def test_a_step_of_resnet_50_trains_all_its_parameters() -> None:
    workload = started("gpu", global_batch=2)
    network = nn.Sequential(*seeded_layers(workload, 0))
    batch = workload.batch(0, shard=0, num_shards=1)
    output = network(batch.x[:, :, :64, :64])
    assert output.shape == (2, 1000)
    workload.loss(output, batch).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters())
