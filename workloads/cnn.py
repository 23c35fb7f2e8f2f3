"""CNN: image classification, the article's worked example. 1797 real 8x8 digits, ResNet-18 and
ResNet-50.

`digits`: scikit-learn's bundled digits, stratified 1280 train / 517 test; four convolutions with
GroupNorm, two linear layers, 25,370 parameters; reaches 97.5 % in about 4 epochs. `comm`: a
ResNet-18 on synthetic 32x32 images, 11,173,962 parameters (44.7 MB per gradient), to load links
rather than to learn. `gpu`: a ResNet-50, 25,557,032 parameters, on synthetic 224x224 images or
(`data = imagenet`) on an ImageNet of the user's; `cluster`: its rate grows with the batch.
`cifar10`: a ResNet-18 on the user's CIFAR-10. GroupNorm instead of BatchNorm: a shard's statistics
must not depend on how the batch is split.
"""

from __future__ import annotations

import glob
import importlib.util
import itertools
import math
import os
import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchsuite import workload
from benchsuite.errors import UsageError
from benchsuite.workload import Batch, Infer, Recipe, Target

presets = {
    "digits": {"global_batch": 64, "num_layers": 8, "budget_samples": 15360, "num_samples": 1280},
    "smoke": {"global_batch": 64, "num_layers": 8, "budget_samples": 2560, "num_samples": 1280},
    "comm": {
        "global_batch": 8,
        "num_layers": 11,
        "budget_samples": 96,
        "num_samples": 64,
        "model": "resnet18",
        "lr": 0.01,
    },
    "gpu": {
        "global_batch": 128,
        "num_layers": 19,
        "budget_samples": 12800,
        "model": "resnet50",
        "lr": 0.05,
        "weight_decay": 1e-4,
        "evaluate_every": 1_281_167,
    },
    "cluster": {
        "global_batch": 256,
        "num_layers": 19,
        "budget_samples": 51200,
        "model": "resnet50",
        "lr": 0.1,
        "lr_batch": 256,
        "weight_decay": 1e-4,
        "evaluate_every": 1_281_167,
    },
    "cifar10": {
        "global_batch": 128,
        "num_layers": 11,
        "budget_samples": 1_996_800,
        "num_samples": 50000,
        "model": "resnet18",
        "data": "cifar10",
        "lr": 0.1,
        "evaluate_every": 49920,
    },
}

# 1280 = 20 x 64, so that the last batch of an epoch is a whole one.
TRAIN = 1280
TEST = 517

BUDGET = 240 * 64  # samples; a preset or the cell's budget comes first

# Groups of a GroupNorm; those of ResNet-50 as in Wu and He 2018.
GROUPS = 8
GROUPS_50 = 32

# Model -> the shape of one image.
SHAPES = {"digits": (1, 8, 8), "resnet18": (3, 32, 32), "resnet50": (3, 224, 224)}

# Synthetic images of 224x224 (154 MB), which are used again and again, and their classes.
POOL = 256
CLASSES_50 = 1000

# How the layers of the digits' chain split under tensor parallelism.
DIGITS_PLAN = {
    "0.0": "columns",
    "0.1": "channels",
    "1.0": "rows",
    "2.0": "columns",
    "2.1": "channels",
    "3.0": "rows",
    "5": "columns",
    "7": "rows",
}
TARGETS = {"own": (96.0, 97.5, 98.0), "cifar10": (92.0, 94.0, 95.0), "imagenet": (70.0, 75.9, 76.5)}
SCALES = {  # data -> mean and standard deviation of its colours
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

CHANGES = 11  # purpose of a random stream: how pictures are cropped and mirrored
MARGIN = 4  # pixels by which a crop of CIFAR-10 moves at most
DECODERS = 8  # threads that decode images, at most

# Images to train on, or their files, and their classes; then those to test on.
Split = tuple[Any, Tensor, Any, Tensor]


@dataclass
class Workload(workload.Workload):
    """The model tells what an image shows: a digit, a synthetic class, or one of the user's."""

    later = ("data", "path", "optimizer", "lr_batch")
    tensor_divides = (8,)  # GROUPS
    refuses = (
        {
            "rule": "data",
            "when": 'data == "cifar10" and model != "resnet18"',
            "reason": (
                "data = {data} with model = {model}: its images and classes are those of resnet18"
            ),
            "remedy": "set options.{name}.model = resnet18",
        },
        {
            "rule": "data",
            "when": 'data == "imagenet" and model != "resnet50"',
            "reason": (
                "data = {data} with model = {model}: its images and classes are those of resnet50"
            ),
            "remedy": "set options.{name}.model = resnet50",
        },
    )
    model: Literal["digits", "resnet18", "resnet50"] = "digits"
    """Which chain of layers, and which size of images."""

    lr: float = 0.03
    """Peak learning rate; of SGD it goes with Nesterov momentum."""

    momentum: float = 0.9
    """Nesterov momentum of SGD (0 = plain)."""

    weight_decay: float = 5e-4
    """L2 penalty of the optimiser."""

    global_batch: int = 64
    """Images per synchronous step."""

    evaluate_every: int = 320
    """Images between two evaluations."""

    data: Literal["own", "cifar10", "imagenet"] = "own"
    """Digits or synthetic images, or what `path` holds: the CIFAR-10 batches, or train/CLASS/* and
    val/CLASS/*."""

    path: str = ""
    """The folder of `data = cifar10` or `imagenet`, by its whole path."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW (0.9, 0.999), which wants a smaller rate."""

    lr_batch: int = 0
    """Global batch that `lr` is meant for: the rate grows in proportion (Goyal et al. 2017); 0 =
    `lr` as it stands."""

    @property
    def target(self) -> Target:
        """The test accuracy in percent, and the values of it that count as reached.

        Synthetic images have nothing to reach, so they are not evaluated on the way.
        """
        every = self.evaluate_every if self.model == "digits" or self.data != "own" else 0
        return Target("accuracy", *TARGETS[self.data], evaluate_every=every, unit="%")

    def start(self, *, seed: int, dtype: torch.dtype) -> None:
        """Loads or makes the images; those of a folder stay files until their turn comes."""
        self._seed = seed
        self._dtype = dtype

        self._x, self._y, self._x_test, self._y_test = self._split()
        self._endless = self.model == "resnet50" and self.data == "own"
        has = len(self._x)

        if not self._endless and has < self.global_batch:
            raise UsageError(
                f"global_batch({self.global_batch}) > {has} images, {self.path or self.model}: set "
                "fewer"
            )

        # The permutation of the epoch that is under way; no epoch is yet.
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def _split(self) -> Split:
        """Returns the images to train on and those to test on, as the cell asks for them."""
        if self.data == "own" and self.model == "digits":
            return _digits(self._dtype)

        if self.data == "own":
            return _synthetic(self._seed, self._dtype, self.model)

        # A rank runs in a folder of its own, where a path from here leads nowhere.
        path = Path(self.path).expanduser()

        if not path.is_absolute() or not path.is_dir():
            raise UsageError(
                f"path = {self.path!r}, but data = {self.data} needs a folder's whole path: "
                "set path"
            )

        return _image_folder(path) if self.data == "imagenet" else _cifar10(path)

    def place(self, device: torch.device) -> None:
        """Moves images that are kept in memory to where the model is; files stay where they are."""
        self._y = self._y.to(device)
        self._y_test = self._y_test.to(device)

        if isinstance(self._x, Tensor):
            self._x = self._x.to(device)

        if isinstance(self._x_test, Tensor):
            self._x_test = self._x_test.to(device)

    def layers(self) -> list[nn.Module]:
        """The chain of the model that the cell asks for."""
        if self.model == "digits":
            return _digits_chain()

        return _resnet18_chain() if self.model == "resnet18" else _resnet50_chain()

    def tensor_plan(self) -> Mapping[str, str]:
        """Two convolutions of every block split, the first by its outputs and the next by inputs.

        Of a bottleneck these are the 3x3 and the last 1x1.
        """
        if self.model == "digits":
            return DIGITS_PLAN

        # Where the first of them stands in a block's body, and the layer behind the last block.
        first, end = (0, 9) if self.model == "resnet18" else (3, 17)
        places = {first: "columns", first + 1: "channels", first + 3: "rows"}
        plan: dict[str, str] = {}

        for block in range(1, end):
            for at, how in places.items():
                plan[f"{block}.body.{at}"] = how

        return plan

    def layer_flops(self) -> list[int]:
        """Counts the forward operations of each layer for one image.

        A multiply-add of a convolution or a matrix product counts as 2, everything else as
        nothing. The chain runs once on the meta device, where nothing is computed.
        """
        counts: list[int] = []

        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            """Adds what one module needs: every output element is a product with one filter."""
            counts[-1] += 2 * module.weight[0].numel() * output.numel()  # type: ignore[index]

        with torch.device("meta"):
            x = torch.empty(1, *SHAPES[self.model])
            for layer in self.layers():
                for module in layer.modules():
                    if isinstance(module, (nn.Conv2d, nn.Linear)):
                        module.register_forward_hook(count)

                counts.append(0)
                x = layer(x)

        return counts

    def recipe(self) -> Recipe:
        """The optimiser that the cell asks for, over a warm-up and a linear fall."""

        def make_optimizer(params: Iterable[Tensor]) -> torch.optim.Optimizer:
            """Makes the optimiser; its learning rate is set anew before every step."""
            lr = self.lr
            decay = self.weight_decay
            momentum = self.momentum

            if self.optimizer == "adamw":
                return torch.optim.AdamW(params, lr=lr, weight_decay=decay)

            return torch.optim.SGD(
                params, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decay
            )

        return Recipe(
            make_optimizer=make_optimizer,
            lr=self._lr,
            global_batch=self.global_batch,
            budget=BUDGET,
        )

    def _lr(self, progress: float) -> float:
        """The learning rate: it rises over 10 % of the budget, then falls in a line to 1 %."""
        peak = self.lr * (self.global_batch / self.lr_batch if self.lr_batch else 1)
        if progress < 0.1:
            return peak * (progress + 0.004) / 0.104

        return peak * (1 - 0.99 * (progress - 0.1) / 0.9)

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        """Returns the shard's slice of batch `index` of the epoch's permutation.

        x is (B/n, c, h, w), y is (B/n,). What happens to a picture is drawn for the whole batch, so
        that it does not depend on how the batch is split.
        """
        share = self.global_batch // num_shards
        rows = self._rows(index, shard * share, share)
        if self.data == "own":
            return Batch(self._x[rows], self._y[rows], share)

        stream = np.random.default_rng([CHANGES, self._seed, index])
        draws = stream.random((self.global_batch, 5))[shard * share : (shard + 1) * share]
        pictures = (_decoded if self.data == "imagenet" else _moved)(self._x[rows], draws)

        return Batch(self._scaled(pictures), self._y[rows], share)

    def _rows(self, index: int, first: int, share: int) -> Any:
        """Returns the rows of a shard: their numbers, or a slice where a view will do.

        A view matters for large images: 128 of 224x224 are 77 MB, which need not be copied.
        """
        if self._endless:
            at = (index * self.global_batch + first) % POOL
            if at + share <= POOL:
                return slice(at, at + share)

            return torch.arange(at, at + share) % POOL

        epoch, position = divmod(index, len(self._x) // self.global_batch)

        if epoch != self._epoch:
            stream = np.random.default_rng([self._seed, epoch])
            self._order = torch.from_numpy(stream.permutation(len(self._x)))
            self._epoch = epoch

        begin = position * self.global_batch + first
        return self._order[begin : begin + share]

    def _scaled(self, pictures: Tensor) -> Tensor:
        """Turns bytes (n, 3, h, w) into numbers of mean 0 and variance 1 in each colour."""
        scales = torch.tensor(SCALES[self.data], dtype=self._dtype, device=pictures.device)
        mean, deviation = scales.view(2, 3, 1, 1)

        return pictures.to(self._dtype).div_(255).sub_(mean).div_(deviation)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The mean cross-entropy: output is (B, classes), y is (B,)."""
        return nn.functional.cross_entropy(output, batch.y)

    def evaluate(self, infer: Infer) -> float:
        """Returns the test accuracy in percent, over every test image once."""
        right = 0
        at_once = 100 if self.model == "resnet50" else 1000

        for first in range(0, len(self._y_test), at_once):
            x = self._x_test[first : first + at_once]
            if self.data != "own":
                x = self._scaled(x if isinstance(x, Tensor) else _decoded(x, None))

            answers = self._y_test[first : first + at_once]
            right += int((infer(x).argmax(1).to(answers.device) == answers).sum())

        return 100.0 * float(right) / len(self._y_test)


# -- data ------------------------------------------------------------------------------------------


def _digits(dtype: torch.dtype) -> Split:
    """Returns scikit-learn's digits in one fixed split, stratified by class.

    (1280, 1, 8, 8), (1280,), (517, 1, 8, 8), (517,). The split is the same for every seed: it is
    part of the task.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images, labels, train_size=TRAIN, test_size=TEST, stratify=labels, random_state=0
    )

    x, x_test = (torch.tensor(part / 16.0, dtype=dtype).view(-1, 1, 8, 8) for part in split[:2])
    y, y_test = (torch.tensor(part, dtype=torch.long) for part in split[2:])

    return x, y, x_test, y_test


def _synthetic(seed: int, dtype: torch.dtype, model: str) -> Split:
    """Returns random colour images with random classes, and 16 more of them as a test set.

    They are 64 of 32x32, or POOL of 224x224.
    """
    train, classes = (POOL, CLASSES_50) if model == "resnet50" else (64, 10)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(train + 16, *SHAPES[model], generator=generator, dtype=torch.float32).to(dtype)
    y = torch.randint(0, classes, (train + 16,), generator=generator)

    return x[:train], y[:train], x[train:], y[train:]


def _cifar10(folder: Path) -> Split:
    """Reads the files of CIFAR-10's version for Python; pictures stay bytes.

    (50000, 3, 32, 32), (50000,), (10000, 3, 32, 32), (10000,).
    """
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    lacking = [name for name in names if not (folder / name).is_file()]

    if lacking:
        needed = (
            f"data = cifar10 reads {names[0]} .. 5 and {names[5]}; set path to the folder "
            "cifar-10-batches-py"
        )

        raise UsageError(f"path = {folder} has no {', '.join(lacking)}: {needed}")

    batches = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
    x = [
        torch.from_numpy(np.asarray(batch[b"data"], dtype=np.uint8)).view(-1, 3, 32, 32)
        for batch in batches
    ]

    y = [torch.tensor(batch[b"labels"], dtype=torch.long) for batch in batches]
    return torch.cat(x[:5]), torch.cat(y[:5]), x[5], y[5]


def _image_folder(folder: Path) -> Split:
    """Lists the files of train/CLASS/* and val/CLASS/*, and the numbers of their classes.

    A file is decoded when its turn comes: all of ImageNet would not fit into memory.
    """
    if importlib.util.find_spec("PIL") is None:
        raise UsageError(
            "data = imagenet decodes images with Pillow: pip install 'benchsuite[images]'"
        )

    files = [sorted(glob.glob(str(folder / part / "*" / "*"))) for part in ("train", "val")]
    named = [[file.split(os.sep)[-2] for file in each] for each in files]
    names, tested = (sorted(set(each)) for each in named)

    if not 0 < len(names) <= CLASSES_50 or not tested or not set(tested) <= set(names):
        known = (
            f"path = {folder} has {len(names)} classes with images in train/ and {len(tested)} "
            "in val/"
        )

        needed = f"1 to {CLASSES_50} are needed, and in val/ none that train/ lacks"
        raise UsageError(
            f"{known}: {needed}; set path to a folder of train/CLASS/* and val/CLASS/*"
        )

    numbers = {name: number for number, name in enumerate(names)}
    y, y_test = (torch.tensor([numbers[name] for name in each]) for each in named)

    return np.array(files[0], dtype=object), y, np.array(files[1], dtype=object), y_test


def _moved(pictures: Tensor, draws: np.ndarray) -> Tensor:
    """Moves each picture by up to MARGIN pixels on black, and mirrors every other one.

    pictures: (n, 3, 32, 32) bytes; draws: (n, 5), of which 0 and 1 move and 4 mirrors. All are
    taken out of the padded pictures by one gather of rows and columns.
    """
    padded = nn.functional.pad(pictures, [MARGIN] * 4)
    side = pictures.shape[-1]
    steps = torch.from_numpy((draws[:, :2] * (2 * MARGIN + 1)).astype(np.int64))
    along = torch.arange(side)
    mirrored = torch.from_numpy(draws[:, 4] < 0.5)
    rows = steps[:, :1] + along  # (n, 32)
    columns = steps[:, 1:] + torch.where(mirrored[:, None], side - 1 - along, along)  # (n, 32)
    each = torch.arange(len(pictures))[:, None, None, None]  # (n, 1, 1, 1)
    colour = torch.arange(3)[:, None, None]  # (3, 1, 1)

    return padded[each, colour, rows[:, None, :, None], columns[:, None, None, :]]


def _decoded(paths: Iterable[str], draws: np.ndarray | None) -> Tensor:
    """Decodes files into (n, 3, 224, 224) bytes.

    Of each image a random part is taken, mirrored or not; without draws its middle.
    """
    given = itertools.repeat(None) if draws is None else draws

    # Threads are enough: Pillow decodes without Python's lock.
    with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as threads:
        pictures = list(threads.map(_picture, paths, given))

    return torch.from_numpy(np.stack(pictures))


def _picture(path: str, draw: np.ndarray | None) -> np.ndarray:
    """Decodes one file into (3, 224, 224) bytes; the five numbers of `draw` say which part."""
    # Pillow is an extra, and only this data needs it.
    from PIL import Image

    with Image.open(path) as image:
        wide, high = image.size

        # The middle, as if the image had been scaled to 256 and cut to 224.
        width = height = min(image.size) * 224 / 256
        left = (wide - width) / 2
        top = (high - height) / 2

        # A part of 8 to 100 % of the area, from 3:4 to 4:3 (Szegedy et al. 2015).
        if draw is not None:
            area = wide * high * (0.08 + 0.92 * draw[0])
            shape = math.exp((2 * draw[1] - 1) * math.log(4 / 3))
            width = min(math.sqrt(area * shape), wide)
            height = min(math.sqrt(area / shape), high)
            left = draw[2] * (wide - width)
            top = draw[3] * (high - height)

        box = (left, top, left + width, top + height)
        picture = np.asarray(
            image.convert("RGB").resize(SHAPES["resnet50"][1:], Image.Resampling.BILINEAR, box=box)
        )

    turned = picture[:, ::-1] if draw is not None and draw[4] < 0.5 else picture
    return np.ascontiguousarray(turned.transpose(2, 0, 1))


# -- models ----------------------------------------------------------------------------------------


def _layer(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = GROUPS
) -> list[nn.Module]:
    """Makes a convolution without bias and its GroupNorm.

    Height and width are divided by the stride.
    """
    return [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.GroupNorm(groups, outputs),
    ]


def _digits_chain() -> list[nn.Module]:
    """Makes the chain of 8 for digits.

    Four blocks of a convolution, of which 2 and 4 end in a pooling; then two linear layers, with
    what stands between them.

    (B, 1, 8, 8) -> (B, 16, 8, 8) -> (B, 16, 4, 4) -> (B, 32, 4, 4) -> (B, 32, 2, 2) -> (B, 64) ->
    (B, 10)
    """
    blocks = [
        nn.Sequential(*_layer(*width), nn.ReLU())
        for width in ((1, 16), (16, 16), (16, 32), (32, 32))
    ]

    for block in blocks[1::2]:
        block.append(nn.MaxPool2d(2))

    return [*blocks, nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]


class ResidualBlock(nn.Module):
    """A block of He et al. 2016, with GroupNorm in the place of BatchNorm.

    Two 3x3 convolutions; or with `inner` channels a bottleneck, one of 3x3 between two of 1x1. What
    comes in is added to what comes out, by way of a 1x1 convolution where their shapes differ.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, inner: int = 0) -> None:
        super().__init__()
        groups = GROUPS_50 if inner else GROUPS
        shapes = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]

        if not inner:
            shapes = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]

        # The last ReLU stands behind the addition, in `forward`.
        parts: list[nn.Module] = []
        for shape in shapes:
            parts += [*_layer(*shape, groups), nn.ReLU()]

        self.body = nn.Sequential(*parts[:-1])

        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(*_layer(inputs, outputs, 1, stride, groups))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return torch.relu(self.body(x) + self.skip(x))


def _resnet18_chain() -> list[nn.Module]:
    """Makes ResNet-18 in its form for CIFAR, 10 classes: 11,173,962 parameters, chain of 11."""
    stem = nn.Sequential(*_layer(3, 64), nn.ReLU())
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [ResidualBlock(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]

    return [stem, *blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(512, 10)]


def _resnet50_chain() -> list[nn.Module]:
    """Makes ResNet-50 for 1000 classes: 25,557,032 parameters, chain of 19."""
    stem = nn.Sequential(*_layer(3, 64, 7, 2, GROUPS_50), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    widths = [64, *[256] * 3, *[512] * 4, *[1024] * 6, *[2048] * 3]
    blocks = [
        ResidualBlock(a, b, 2 if b == 2 * a else 1, inner=b // 4)
        for a, b in itertools.pairwise(widths)
    ]

    return [
        stem,
        *blocks,
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(2048, CLASSES_50),
    ]
