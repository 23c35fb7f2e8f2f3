"""The laws on the whole grid of what is built: every legal strategy and topology, 1 to 4 workers. Thread ranks, float64."""

from __future__ import annotations

import pytest

from benchsuite.cell import Cell
from benchsuite.laws import Law
from benchsuite.laws.grid import WORKERS, means
from benchsuite.laws.ranks import thread_ranks
from benchsuite.laws.runs import remembered
from tests.law_cells import RECIPES, all_laws, cases, recipes, shapes, strict_ranks, tiny

RANKS = remembered(thread_ranks)  # laws that look at the same run share it
STRICT = remembered(strict_ranks)

ELSEWHERE = ("virtual_times", "momentum", "bridge", "graphs", "costs", "hierarchical")  # in tests of their own
TRAINING = (
    "synchronous", "parameter_server", "server_log", "replay", "asynchronous", "k_sync", "stale_synchronous", "replicas",
    "elastic_averaging", "gossip", "hogwild", "traffic", "memory",
)  # fmt: skip
WITHOUT_TRAINING = ("comm", "strict", "topology", "part", "update")

# These change what is run (given gradients, one more step), so they share no run: one recipe is enough for them.
ALONE = (
    "integer gradients give the bits of the serial sum on every topology",
    "gradients of ones: every answer is one whole version, the last one -U",
    "the library's collectives are seen with their sizes",
)

SHAPES = list(shapes())
GRID = [tiny(recipe, **shape) for shape in SHAPES for recipe in recipes(shape)]
# Each optimiser also with what it lacks above: clipped where it was not, unclipped where it was (at lr 0.05 nesterov
# would diverge in one process too, and amplify roundings from 1e-16 to 1e-4).
GRID += [
    tiny((optimizer, 0.01, 0.0 if clip_norm else 0.5), replicas=n, **shape)
    for optimizer, _, clip_norm in RECIPES[2:]
    for shape in ({"topology": "ring"}, {"topology": "parameter_server", "servers": 2})
    for n in (1, 3)
]
PLAIN = [tiny(**shape) for shape in SHAPES]
FLOAT32 = [
    tiny(**shape, precision="fp32") for shape in SHAPES if shape["sync"] == "synchronous" and shape["replicas"] == 3
]  # fmt: skip


def test_every_family_is_tested() -> None:
    assert set(all_laws()) == {*TRAINING, *WITHOUT_TRAINING, *ELSEWHERE}


@pytest.mark.parametrize(
    ("law", "cell"),
    [case for family in TRAINING for case in cases(family, GRID, only=lambda law: law.name not in ALONE)],
)
def test_training(law: Law, cell: Cell) -> None:
    figure = law.check(RANKS, cell)
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.parametrize(
    ("law", "cell"), [case for family in TRAINING for case in cases(family, PLAIN, only=lambda law: law.name in ALONE)]
)
def test_given_gradients(law: Law, cell: Cell) -> None:
    figure = law.check(RANKS, cell)
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.parametrize(("law", "cell"), [*cases("synchronous", FLOAT32)])
def test_float32(law: Law, cell: Cell) -> None:
    figure = law.check(RANKS, cell)
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.parametrize(
    ("law", "cell"),
    [
        case
        for family in ("synchronous", "server_log", "traffic")
        for case in cases(
            family,
            [tiny(RECIPES[1], **shape) for shape in SHAPES if shape["replicas"] == 3 and "none" not in str(shape)],
            only=lambda law: law.name not in ALONE,
        )
    ],
)
def test_with_nothing_that_nccl_refuses(law: Law, cell: Cell) -> None:
    figure = law.check(STRICT, cell)
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.parametrize(("law", "cell"), [*cases("topology", means(WORKERS))])
@pytest.mark.parametrize("ranks", [thread_ranks, strict_ranks], ids=["gloo", "nccl's rounds"])
def test_one_mean(law: Law, cell: Cell, ranks: object) -> None:
    figure = law.check(ranks, cell)  # type: ignore[arg-type]
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.parametrize(
    ("law", "cell"),
    [
        *(case for family in ("comm", "strict") for case in cases(family, [tiny(replicas=n) for n in (2, 3, 4)])),
        *(case for family in ("part", "update") for case in cases(family, [tiny(), tiny(precision="fp32")])),
    ],
)
def test_what_all_of_them_lean_on(law: Law, cell: Cell) -> None:
    figure = law.check(thread_ranks, cell)
    assert figure.holds, f"{law.name}: {figure}"
