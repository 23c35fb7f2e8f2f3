"""Convolutions and GroupNorm split along their channels, which torch's library does not offer.

They are styles for `parallelize_module`. As with matrices, a convolution split by its output
channels needs its whole input, and one split by its input channels adds up what the parts have. A
GroupNorm between the two keeps whole groups on a part. What is sent are the library's own
all-reduces, of DTensors at the borders; in between are plain tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ParallelStyle


class OutputChannels(ParallelStyle):
    """Splits a convolution by its output channels.

    Its input is whole on every part, so the input's gradient is the sum of what the parts have.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Leaves this part's output channels in the module; `parallelize_module` calls it."""
        assert isinstance(module, nn.Conv2d)

        for parameter in module.parameters():
            _keep(parameter, 0, device_mesh)

        module.out_channels //= device_mesh.size()

        def whole_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            """The input as it is; its gradient is summed over the parts on the way back."""
            x = DTensor.from_local(inputs[0], device_mesh, [Replicate()], run_check=False)
            return x.to_local(grad_placements=[Partial()])

        module.register_forward_pre_hook(whole_input)
        return module


class InputChannels(ParallelStyle):
    """Splits a convolution by its input channels.

    Its output is the sum of what the parts have, plus the bias, which is added once.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Leaves this part's input channels in the module; `parallelize_module` calls it."""
        assert isinstance(module, nn.Conv2d)

        _keep(module.weight, 1, device_mesh)
        module.in_channels //= device_mesh.size()

        def forward(x: Tensor) -> Tensor:
            """The sum of what all parts have of the output, and the bias, which is added once."""
            y = module._conv_forward(x, module.weight, None)
            # Partial to Replicate is the library's all-reduce.
            y = DTensor.from_local(y, device_mesh, [Partial()], run_check=False).redistribute(
                placements=[Replicate()]
            )

            y = y.to_local()
            return y if module.bias is None else y + module.bias.view(-1, 1, 1)

        module.forward = forward  # type: ignore[method-assign, assignment]  # a hook comes after the bias
        return module


class GroupedChannels(ParallelStyle):
    """A GroupNorm of the channels that a part holds, in whole groups.

    A group's mean and variance are made of its own channels only, so nothing is sent.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Leaves this part's groups in the module; `parallelize_module` calls it."""
        assert isinstance(module, nn.GroupNorm)

        for parameter in module.parameters():
            _keep(parameter, 0, device_mesh)

        module.num_groups //= device_mesh.size()
        module.num_channels //= device_mesh.size()

        return module


def _keep(parameter: Tensor, dim: int, mesh: DeviceMesh) -> None:
    """Puts this part's slice along `dim` in the place of the whole parameter.

    It is copied: as a view it would keep all of the parameter in memory.
    """
    slices = torch.chunk(parameter.data, mesh.size(), dim)
    mine = slices[mesh.get_local_rank()]
    parameter.data = mine.contiguous()
