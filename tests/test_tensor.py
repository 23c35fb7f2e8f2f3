"""`parallel/tensor.py` without ranks: plans of all workloads, slices, collectives and bytes by
hand, refused plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchsuite.laws.harness import tiny
from benchsuite.parallel.pieces import cut, join
from benchsuite.parallel.replica import sum_traffic
from benchsuite.parallel.split import Split
from benchsuite.parallel.tensor import Parallel
from benchsuite.plan import cell as cells
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell
from benchsuite.worker import model_parallel, setup
from benchsuite.workload import Batch, Workload, trained_parameters

PRESETS = [
    (name, preset)
    for name in ("cnn", "transformer", "mlp", "rl_agent")
    for preset in plugins.find("workload", name).presets
    if (name, preset) != ("rl_agent", "atari")  # needs a game
]


def workload_of(name: str, preset: str = "") -> Workload:
    return setup.make_workload(
        cells.resolve(Cell(workload=name, **({"preset": preset} if preset else {})))
    )


def tokens(workload: Any, batch: int) -> Batch:
    return Batch(torch.zeros(batch, workload.context, dtype=torch.long, device="meta"), None, batch)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_preset_has_a_plan_whose_slices_make_the_whole(name: str, preset: str) -> None:
    workload = workload_of(name, preset)
    layers = model_parallel.meta_layers(workload)
    shapes = {name: p.shape for name, p in trained_parameters(nn.Sequential(*layers)).items()}
    whole = sum(shape.numel() for shape in shapes.values())
    for size in (1, 2, 4):
        parts = Parallel().pieces(workload, layers, size)
        owned = [sum(piece.shape.numel() for piece in part if piece.owned) for part in parts]
        assert sum(owned) == whole, (size, owned)
        held = sum(piece.shape.numel() for piece in parts[-1])
        assert size == 1 or held < 0.7 * whole, f"a part of {size} holds {held} of {whole}"


@pytest.mark.parametrize("cut_tokens", [False, True])
def test_slices_put_together_are_the_model_and_order_of_parts_vectors_agrees(
    cut_tokens: bool,
) -> None:
    workload = workload_of("transformer")
    layers = workload.layers()
    named = trained_parameters(nn.Sequential(*layers))
    shapes = {name: p.shape for name, p in named.items()}
    pieces = Parallel(sequence_parallel=cut_tokens).pieces(workload, layers, 4)
    joined = join([cut(named, part) for part in pieces], pieces, shapes)
    assert torch.equal(joined, nn.utils.parameters_to_vector(named.values()))
    assert len({tuple((piece.name, piece.shape) for piece in part) for part in pieces}) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_a_transformer_sends_8_times_its_activation_per_block_whatever_it_holds(size: int) -> None:
    workload: Any = workload_of("transformer", "comm")
    layers = model_parallel.meta_layers(workload)
    traffic = Parallel().predicted_traffic(
        workload, layers, tokens(workload, 8), size=size, itemsize=4, clip=False
    )
    activation = 8 * workload.context * workload.width * 4
    assert traffic.payload_bytes == workload.blocks * 8 * (size - 1) * activation
    assert len(set(traffic.payload.values())) == 1, "every part sends as much"


def test_with_cut_tokens_a_block_scatters_and_gathers_and_norms_are_summed_once() -> None:
    workload: Any = workload_of("transformer", "comm")
    layers = model_parallel.meta_layers(workload)
    found = Parallel(sequence_parallel=True).collectives(workload, layers, tokens(workload, 8), 2)
    activation = 8 * workload.context * workload.width
    norms = workload.blocks * 2 * workload.width
    kinds = {
        kind: sum(each == (kind, activation) for each in found)
        for kind in ("all_gather", "reduce_scatter")
    }
    assert kinds == {"all_gather": 4 * workload.blocks + 2, "reduce_scatter": 4 * workload.blocks}
    assert ("all_reduce", norms) in found and len(found) == sum(kinds.values()) + 1


def test_the_norm_of_a_clipped_gradient_is_in_the_prediction() -> None:
    workload = tiny.Workload()
    batch = Batch(torch.zeros(24, 8, device="meta"), None, 24)
    layers = model_parallel.meta_layers(workload)
    without, clipped = (
        Parallel().predicted_traffic(workload, layers, batch, size=2, itemsize=8, clip=clip)
        for clip in (False, True)
    )
    assert clipped.payload == (without + sum_traffic(2)).payload
    # 8 layers gather 24 x 8 outputs, 7 of them add up the gradient of their input: the first one's
    # is data
    assert without.payload_bytes == (8 * 1 + 7 * 2) * 24 * 8 * 8


def test_an_image_gets_no_gradient_and_costs_no_collective() -> None:
    workload = workload_of("cnn")
    image = Batch(torch.zeros(64, 1, 8, 8, device="meta"), None, 64)
    found = Parallel().collectives(workload, model_parallel.meta_layers(workload), image, 2)
    forward = [64 * 16 * 8 * 8, 64 * 32 * 4 * 4, 64 * 10]  # behind each pair
    backward = [64 * 16 * 4 * 4, 64 * 128]  # before the second and the third
    assert sorted(found) == sorted([("all_reduce", numel) for numel in (*forward, *backward)])


class Shared(nn.Module):
    """A matrix of another layer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


@pytest.mark.parametrize(
    ("layers", "plan", "said"),
    [
        ([nn.Linear(4, 6)], {"0": "columns"}, "0.weight: 6 is not divisible by model_parallel(4)"),
        ([nn.Linear(6, 4)], {"0": "rows"}, "0.weight: 6 is not divisible by model_parallel(4)"),
        (
            [nn.GroupNorm(2, 8)],
            {"0": "channels"},
            "0.num_groups: 2 is not divisible by model_parallel(4)",
        ),
        ([nn.Linear(4, 4)], {"0": "columms"}, "'columms' of a Linear; known: "),
        (
            [nn.ReLU()],
            {"0": "columns"},
            "'columns' of a ReLU; known: {'columns': 'Linear or Conv2d'",
        ),
        ([nn.Conv2d(4, 4, 1, groups=4)], {"0": "rows"}, "a convolution in groups is not split"),
        (
            [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))],
            {"0.0": "tokens", "0.1": "gathered"},
            "in a layer of tokens: columns and rows only",
        ),
    ],
)
def test_a_plan_that_cannot_be_carried_out_says_why(
    layers: list[nn.Module], plan: dict[str, str], said: str
) -> None:
    with pytest.raises(ValueError) as error:
        Split(nn.Sequential(*layers), plan, size=4, tokens=True)
    assert said in str(error.value)
    Split(nn.Sequential(*layers), plan, size=1, tokens=True)  # one part splits nothing


def test_a_tied_parameter_is_not_split() -> None:
    first = nn.Linear(4, 4, bias=False)
    chain = nn.Sequential(first, Shared(first.weight))
    with pytest.raises(
        ValueError, match=r"1\.weight, which is 0\.weight too: a tied parameter stays whole"
    ):
        Split(chain, {"0": "columns"}, size=2, tokens=False)
